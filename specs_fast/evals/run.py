"""One model on some question files: sampled and greedy, in the asked format and in any.

For every split, sampled at a temperature and beside it greedily: strict accuracy (right format and right answer in its
tag), accuracy of the last answer in any style, format, unbiased pass@k (any style), mean length, clipped rate, with
standard errors over prompts. Every model is asked with the same seed and settings. Where there is a split "id" and at
least two others, those others are also pooled as "ood".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs_fast.config import EvalConfig
from specs_fast.data.encode import Encoder
from specs_fast.data.rows import load_prompts
from specs_fast.data.types import Completion, Prompt
from specs_fast.evals.metrics import generalization_factor, mean, pass_at_k, standard_error
from specs_fast.models.load import load_model, load_processor
from specs_fast.progress import SILENT, Progress, Task
from specs_fast.rewards.accuracy import check_answer, compare_answers
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.format import parse_response
from specs_fast.rewards.verify import Verdict
from specs_fast.rollout.engine import Engine
from specs_fast.rollout.sampler import Sampler
from specs_fast.stages.common import configured_eos, dump, eos_token_ids
from specs_fast.structured import to_data
from specs_fast.train.stage_dir import write_json

IN_DISTRIBUTION = "id"
"""Name of the split that the Generalization Factor takes as in-distribution, where there is one."""
POOLED_OUT = "ood"
"""Name of the pool of all other splits: every question of theirs counts once."""


@dataclass(frozen=True)
class Response:
    """One judged response.

    strict: the right answer, in its tag, in a response of the right format. any_style: the last answer in any style is
    right. given_up: a comparison ran out of time or broke the parser, and counts as wrong. tokens: end token included.
    """

    text: str
    strict: bool
    any_style: bool
    format: bool
    given_up: bool
    tokens: int
    clipped: bool


def evaluate(
    model_dir: str | Path,
    splits: Mapping[str, str | Path],
    config: EvalConfig,
    out_path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate a model folder on JSONL files; writes ``out_path`` (JSON) and ``<stem>.completions.jsonl`` beside it.

    splits: name -> file. Of ``config`` everything but ``splits`` is used. Returns what ``out_path`` holds: ``model``
    (the stem of ``out_path``), ``splits``, ``settings`` and, where a split is called "id", ``generalization_factor``.
    Image paths are written relative to the folder above that of ``out_path`` (the run folder), where they lie in it.

    ValueError, before the model is loaded, for a row that cannot be read or a gold answer that is missing or cannot be
    parsed (file, row, value), and for an incomplete model folder.
    """
    prompts = {name: _load(path, config.limit) for name, path in splits.items()}
    model = load_model(model_dir, dtype=dtype, device=device)
    model.requires_grad_(False)
    encoder = Encoder(load_processor(model_dir), configured_eos(model))
    sampler = Sampler(model, eos_token_ids=eos_token_ids(model, encoder), pad_token_id=encoder.pad_token_id)
    out_path = Path(out_path)
    result, rows = evaluate_prompts(sampler, encoder, prompts, config, progress=progress, name=out_path.stem)
    settings = to_data(config) | {
        "splits": {name: str(path) for name, path in splits.items()},
        "model_dir": str(model_dir),
        "device": str(model.device),
        "dtype": dtype,
    }
    result = {"model": out_path.stem, **result, "settings": settings}
    out_path.parent.mkdir(parents=True, exist_ok=True)
    _write_rows(out_path.with_name(f"{out_path.stem}.completions.jsonl"), rows, out_path.absolute().parent.parent)
    write_json(out_path, result)
    return result


def evaluate_prompts(
    engine: Engine,
    encoder: Encoder,
    splits: Mapping[str, Sequence[Prompt]],
    config: EvalConfig,
    *,
    progress: Progress = SILENT,
    name: str = "model",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The evaluation itself: (``{"splits": ..., "generalization_factor": ...}``, one row per prompt for the log).

    The randomness of a response depends on ``config.seed``, the split's name, the prompt's place in it, the sample's
    number and ``config.batch_prompts``: not on the model, the other splits or the number of samples.
    """
    for split, prompts in splits.items():
        if not prompts:
            raise ValueError(f"split {split!r} has no prompts")
        for prompt in prompts:
            check_answer(prompt)
    results: dict[str, Any] = {}
    judged: dict[str, tuple[list[list[Response]], list[list[Response]] | None]] = {}
    rows: list[dict[str, Any]] = []
    total = sum(len(prompts) for prompts in splits.values()) * (1 + config.greedy)
    with progress.track(f"evaluating {name}", total) as bar:
        for split, prompts in splits.items():
            sampled = _respond(engine, encoder, prompts, config, split, False, bar)
            greedy = _respond(engine, encoder, prompts, config, split, True, bar) if config.greedy else None
            judged[split] = (sampled, greedy)
            results[split] = _block(sampled, greedy, config)
            rows += [
                _row(split, prompt, sampled[index], greedy[index][0] if greedy is not None else None)
                for index, prompt in enumerate(prompts)
            ]
    result: dict[str, Any] = {"splits": results}
    outside = [split for split in results if split != IN_DISTRIBUTION]
    if IN_DISTRIBUTION in results and len(outside) > 1 and POOLED_OUT not in results:
        sampled = [group for split in outside for group in judged[split][0]]
        greedy = [group for split in outside for group in judged[split][1] or []]
        results[POOLED_OUT] = _block(sampled, greedy if config.greedy else None, config)
        result["pooled"] = {POOLED_OUT: outside}
    if IN_DISTRIBUTION in results and len(results) > 1:
        result["generalization_factor"] = _generalization(results)
    return result, rows


def _block(
    sampled: Sequence[Sequence[Response]], greedy: Sequence[Sequence[Response]] | None, config: EvalConfig
) -> dict[str, Any]:
    block: dict[str, Any] = {"n": len(sampled), "sampled": summarise(sampled, config.pass_k)}
    if greedy is not None:
        block["greedy"] = summarise(greedy, ())
    return block


def judge(prompt: Prompt, text: str, completion: Completion) -> Response:
    """Hold one response against its prompt's tags and gold answer."""
    gold = str(prompt.columns["answer"])
    parsed = parse_response(text, prompt.tags)
    found = extract_any(text)
    any_style = Verdict.DIFFERENT if found is None else compare_answers(found, gold)
    strict = compare_answers(str(parsed.answer), gold) if parsed.ok else Verdict.DIFFERENT
    return Response(
        text=text,
        strict=strict is Verdict.EQUAL,
        any_style=any_style is Verdict.EQUAL,
        format=parsed.ok,
        given_up=bool({strict, any_style} & {Verdict.TIMEOUT, Verdict.FAILED}),
        tokens=len(completion),
        clipped=not completion.finished,
    )


def summarise(groups: Sequence[Sequence[Response]], pass_k: Sequence[int]) -> dict[str, Any]:
    """Metrics over prompts of their responses' means: shares in [0, 1], ``mean_length`` in tokens, and
    ``standard_errors`` of each.

    ``unscorable``: responses whose comparison was given up (counted as wrong everywhere).
    """
    per_prompt: dict[str, list[float]] = {
        "accuracy_strict": [mean([r.strict for r in group]) for group in groups],
        "accuracy_any": [mean([r.any_style for r in group]) for group in groups],
        "format": [mean([r.format for r in group]) for group in groups],
    }
    for k in pass_k:
        per_prompt[f"pass@{k}"] = [pass_at_k(len(group), sum(r.any_style for r in group), k) for group in groups]
    per_prompt["mean_length"] = [mean([r.tokens for r in group]) for group in groups]
    per_prompt["clipped"] = [mean([r.clipped for r in group]) for group in groups]
    block: dict[str, Any] = {key: mean(values) for key, values in per_prompt.items()}
    block["unscorable"] = sum(r.given_up for group in groups for r in group)
    errors = {key: standard_error(values) for key, values in per_prompt.items()}
    block["standard_errors"] = {key: None if error != error else error for key, error in errors.items()}
    return block


def _load(path: str | Path, limit: int | None) -> list[Prompt]:
    prompts = load_prompts(path)[:limit]
    for prompt in prompts:
        check_answer(prompt)
    return prompts


def _respond(
    engine: Engine,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    split: str,
    greedy: bool,
    bar: Task,
) -> list[list[Response]]:
    groups: list[list[Response]] = []
    for start in range(0, len(prompts), config.batch_prompts):
        batch = prompts[start : start + config.batch_prompts]
        completions = engine.generate(
            [encoder.prompt(prompt) for prompt in batch],
            num_samples=1 if greedy else config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            greedy=greedy,
            seed=_seed(config.seed, split, start),
        )
        for prompt, group in zip(batch, completions, strict=True):
            groups.append([judge(prompt, encoder.decode(c.token_ids), c) for c in group])
        bar.advance(len(batch))
    return groups


def _seed(seed: int, split: str, start: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{split}/{start}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _generalization(results: Mapping[str, Any]) -> dict[str, Any]:
    """Γ of strict sampled accuracy, per split against "id": raw accuracies, which is what reproduces SPECS' curve."""
    inside = results[IN_DISTRIBUTION]["sampled"]["accuracy_strict"]
    return {
        "of": "accuracy_strict, sampled, beta 2",
        "splits": {
            split: generalization_factor(inside, block["sampled"]["accuracy_strict"])
            for split, block in results.items()
            if split != IN_DISTRIBUTION
        },
    }


def _row(split: str, prompt: Prompt, sampled: Sequence[Response], greedy: Response | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "split": split,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "images": list(prompt.image_paths),
        "answer": prompt.columns["answer"],
        "tags": list(prompt.tags),
        "samples": [response.text for response in sampled],
        "correct_strict": [response.strict for response in sampled],
        "correct_any": [response.any_style for response in sampled],
        "format": [response.format for response in sampled],
    }
    if greedy is not None:
        row |= {
            "greedy": greedy.text,
            "greedy_correct_strict": greedy.strict,
            "greedy_correct_any": greedy.any_style,
            "greedy_format": greedy.format,
        }
    return row


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]], run_dir: Path) -> None:
    """All rows, so that the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(dump({**row, "images": [_relative(image, run_dir) for image in row["images"]]}))
    os.replace(temporary, path)


def _relative(image: str, run_dir: Path) -> str:
    path = Path(image).absolute()
    return str(path.relative_to(run_dir)) if path.is_relative_to(run_dir) else str(path)

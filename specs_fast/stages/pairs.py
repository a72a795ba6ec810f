"""Self-distilled preference pairs: both sides correct, differing in form only (Metis-SPECS, arXiv 2510.25801).

Chosen: sampled from the zero model; must be finished, correct, complete in format, and its reasoning must agree with its
answer. Rejected: sampled from the base model; must be finished and correct, then its format is corrupted in one of five
ways. One pair per prompt that has both. Written in TRL's conversational preference format with images; the yield of
every filter is reported.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs_fast.config import ModelConfig, PairsConfig
from specs_fast.data.types import Prompt
from specs_fast.progress import SILENT, Progress
from specs_fast.rewards.accuracy import answers_equal
from specs_fast.rewards.consistency import Judge, load_judge
from specs_fast.rewards.corruption import corrupt_by_mix
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.format import parse_response
from specs_fast.stages.common import Policy, dump, stage_seed
from specs_fast.train.stage_dir import fingerprint, write_json

PROMPTS_PER_CALL = 64


@dataclass(frozen=True)
class Sample:
    """One sampled response and whether the model ended it itself."""

    text: str
    finished: bool


def run_pairs(
    config: PairsConfig,
    model_config: ModelConfig,
    *,
    base_dir: str | Path,
    zero_dir: str | Path,
    prompts: Sequence[Prompt],
    out_dir: Path,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Sample from both models, filter, corrupt, and write ``pairs.jsonl``, ``images/`` and ``yield.json`` into ``out_dir``.

    Deterministic in ``seed``. Returns the yield. ValueError, with the yield of every filter, when no pair is left.
    """
    started = time.perf_counter()
    prompts = list(prompts)[: config.prompts]
    chosen_dir = zero_dir if config.chosen_from == "zero" else base_dir
    counts: dict[str, Any] = {
        "prompts": len(prompts),
        "chosen_from": config.chosen_from,
        "rejected_from": config.rejected_from,
    }

    chosen_samples = sample_all(chosen_dir, prompts, config, model_config, seed, "pairs: chosen", progress)
    chosen, counts["zero"] = filter_chosen(prompts, chosen_samples, config)
    if config.rejected_from == "base":
        base_samples = sample_all(base_dir, prompts, config, model_config, seed + 1, "pairs: rejected", progress)
        rejected, counts["base"] = filter_correct(prompts, base_samples)
    else:
        rejected = chosen

    origin = {"base_model": fingerprint(base_dir), "chosen_model": fingerprint(chosen_dir)}
    rows, kinds = pair_rows(prompts, chosen, rejected, config, seed, origin)
    counts |= {"prompts_with_both": len(rows), "corruptions": dict(kinds)}
    rows = rows[: config.max_pairs]
    counts["pairs"] = len(rows)
    counts["seconds"] = time.perf_counter() - started
    write_json(out_dir / "yield.json", counts)
    if not rows:
        raise ValueError(empty_message(counts))
    write_rows(rows, {prompt.id: prompt for prompt in prompts}, out_dir)
    return counts


def sample_all(
    model_dir: str | Path,
    prompts: list[Prompt],
    config: PairsConfig,
    model_config: ModelConfig,
    seed: int,
    name: str,
    progress: Progress,
) -> list[list[Sample]]:
    """``samples_per_prompt`` responses per prompt from one model."""
    policy = Policy.load(model_dir, model_config, trainable=False)
    samples: list[list[Sample]] = []
    with progress.track(name, len(prompts)) as bar:
        for start in range(0, len(prompts), PROMPTS_PER_CALL):
            part = prompts[start : start + PROMPTS_PER_CALL]
            groups = policy.sample(part, config.sampling, config.samples_per_prompt, stage_seed(seed, "pairs", start))
            samples += [[Sample(policy.encoder.decode(c.token_ids), c.finished) for c in group] for group in groups]
            bar.advance(len(part))
    return samples


def is_correct(prompt: Prompt, text: str) -> bool:
    """Whether the last answer in the text, in any style, equals the prompt's gold answer."""
    found = extract_any(text)
    return found is not None and answers_equal(found, str(prompt.columns["answer"]))


def filter_correct(prompts: list[Prompt], samples: list[list[Sample]]) -> tuple[list[list[str]], dict[str, int]]:
    """Per prompt the finished and correct responses, and what each filter let through."""
    counts: Counter[str] = Counter()
    kept: list[list[str]] = []
    for prompt, group in zip(prompts, samples, strict=True):
        counts["sampled"] += len(group)
        finished = [sample.text for sample in group if sample.finished and sample.text.strip()]
        counts["finished"] += len(finished)
        kept.append([text for text in finished if is_correct(prompt, text)])
        counts["correct"] += len(kept[-1])
    return kept, {key: counts[key] for key in ("sampled", "finished", "correct")}


def filter_chosen(
    prompts: list[Prompt], samples: list[list[Sample]], config: PairsConfig
) -> tuple[list[list[str]], dict[str, int]]:
    """`filter_correct`, then format-complete, then reasoning that agrees with the answer."""
    judge = load_judge(config.judge)
    correct, counts = filter_correct(prompts, samples)
    counts |= {"format": 0, "consistent": 0}
    kept: list[list[str]] = []
    for prompt, texts in zip(prompts, correct, strict=True):
        parsed = [(text, parse_response(text, prompt.tags)) for text in texts]
        parsed = [(text, parts) for text, parts in parsed if parts.ok and _tag_answer_correct(prompt, parts.answer)]
        counts["format"] += len(parsed)
        kept.append([text for text, parts in parsed if _agrees(judge, prompt, str(parts.reasoning), str(parts.answer))])
        counts["consistent"] += len(kept[-1])
    return kept, counts


def _agrees(judge: Judge, prompt: Prompt, reasoning: str, answer: str) -> bool:
    try:
        return judge(reasoning, answer)
    except Exception as error:
        raise ValueError(
            f"{prompt.source}: the judge failed on answer {answer[:200]!r} ({type(error).__name__}: {error}); fix "
            "pairs.judge, or catch the error there and return False; the same command continues with this stage"
        ) from error


def _tag_answer_correct(prompt: Prompt, answer: str | None) -> bool:
    return answer is not None and answers_equal(answer, str(prompt.columns["answer"]))


def pair_rows(
    prompts: list[Prompt],
    chosen: list[list[str]],
    rejected: list[list[str]],
    config: PairsConfig,
    seed: int,
    origin: dict[str, str],
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """One row per prompt that has both sides, a seeded draw of each, and how often each corruption was used."""
    kinds: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
        if not good or not bad:
            continue
        rng = random.Random(f"{seed}/{prompt.id}")
        preferred = rng.choice(good)
        drawn = corrupt_first(rng.sample(bad, len(bad)), prompt, config, rng)
        if drawn is None:
            kinds["none applies"] += 1
            continue
        kind, broken = drawn
        kinds[kind] += 1
        rows.append(
            {
                "id": prompt.id,
                "prompt": list(prompt.messages),
                "chosen": assistant(preferred),
                "rejected": assistant(broken),
                **prompt.columns,
                "corruption": kind,
                **origin,
            }
        )
    return rows, kinds


def corrupt_first(texts: list[str], prompt: Prompt, config: PairsConfig, rng: random.Random) -> tuple[str, str] | None:
    """(kind, corrupted text) of the first response to which some corruption of the mix applies."""
    for text in texts:
        drawn = corrupt_by_mix(text, prompt.tags, config.corruptions, rng)
        if drawn is not None:
            return drawn
    return None


def assistant(text: str) -> list[dict[str, Any]]:
    """One assistant message whose content is a list of parts, as multimodal rows have it."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def write_rows(rows: list[dict[str, Any]], prompts: dict[str, Prompt], out_dir: Path) -> None:
    """``pairs.jsonl`` and copies of its images beside it, so that the folder stands alone."""
    (out_dir / "images").mkdir(exist_ok=True)
    copied: dict[str, str] = {}
    with (out_dir / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            files = []
            for path in prompts[row["id"]].image_paths:
                if path not in copied:
                    copied[path] = f"images/{len(copied):06d}{Path(path).suffix}"
                    shutil.copyfile(path, out_dir / copied[path])
                files.append(copied[path])
            file.write(dump({"id": row["id"], "prompt": row["prompt"], "images": files, **row}))


def empty_message(counts: dict[str, Any]) -> str:
    """Which filter ate the pairs."""

    def chain(side: str) -> str:
        return " -> ".join(f"{name} {number}" for name, number in counts.get(side, {}).items())

    return (
        f"no preference pair is left of {counts['prompts']} prompts. Chosen side ({counts['chosen_from']}): {chain('zero')}. "
        f"Rejected side ({counts['rejected_from']}): {chain('base') or 'as chosen'}. Prompts with both sides: "
        f"{counts['prompts_with_both']}. "
        "Raise pairs.samples_per_prompt or pairs.prompts, or train the zero model longer if 'format' is 0"
    )

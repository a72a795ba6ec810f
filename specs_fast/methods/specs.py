"""Metis-SPECS (arXiv 2510.25801): zero -> pairs -> cold start -> final.

1. zero: GRPO from the base model, a teacher of format that is the model itself;
2. pairs: chosen from zero, rejected from base, both correct, differing in form;
3. coldstart: DPO + lambda * SFT on the pairs, **from the base model again**;
4. final: GRPO from the cold start.

Each stage leaves a folder of its own that is complete or absent, so the same call continues after the last finished one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specs_fast.config import SpecsConfig
from specs_fast.data.encode import Encoder, check_lengths
from specs_fast.data.rows import load_pairs, load_prompts
from specs_fast.data.types import Prompt
from specs_fast.models.hub import local_folder
from specs_fast.models.load import load_processor, resolve_device
from specs_fast.progress import SILENT, Progress
from specs_fast.rewards.accuracy import check_answer
from specs_fast.rewards.compose import RESERVED, RewardSet
from specs_fast.rewards.consistency import load_judge
from specs_fast.stages.dpo import check_origin, run_dpo
from specs_fast.stages.grpo import run_grpo
from specs_fast.stages.pairs import run_pairs
from specs_fast.stages.sft import run_sft
from specs_fast.train.stage_dir import fingerprint, is_done, run_stage, write_json

CHECKPOINTS = ("zero", "coldstart", "final")


def run(config: SpecsConfig, run_dir: Path, progress: Progress = SILENT) -> dict[str, Path]:
    """Run or continue SPECS in ``run_dir``: name -> model folder of base, zero, coldstart and final.

    Everything that later stages and the evaluation need is checked before any training: data and question files, rewards,
    judge, device. ValueError names file, row, value and way out.
    """
    base_dir = local_folder(config.model.path)
    folders = {name: run_dir / name for name in (*CHECKPOINTS, "pairs")}
    if not all([is_done(folder) for folder in folders.values()]):
        prompts = check_inputs(config, base_dir, progress)
        _hold_to_inputs(config, base_dir, run_dir, any(folder.exists() for folder in folders.values()))
        with RewardSet.from_config(config.rewards) as rewards:
            _run_stages(config, base_dir, folders, prompts, rewards, progress)
    return {"base": base_dir, **{name: folders[name] for name in CHECKPOINTS}}


def _hold_to_inputs(config: SpecsConfig, base_dir: Path, run_dir: Path, started: bool) -> None:
    """Later stages must read what earlier ones read: remember the contents of data and model, and refuse to go on with others."""
    train = Path(config.data.train)
    found = {str(train): hashlib.sha256(train.read_bytes()).hexdigest(), str(base_dir): fingerprint(base_dir)}
    file = run_dir / "inputs.json"
    if started and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, digest in found.items():
            if before.get(name, digest) != digest:
                raise ValueError(
                    f"{name} has changed since the finished stages in {run_dir} read it; put the old one back, or start again "
                    "in another output_dir"
                )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def _run_stages(
    config: SpecsConfig,
    base_dir: Path,
    folders: dict[str, Path],
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    progress: Progress,
) -> None:
    run_stage(
        folders["zero"],
        lambda out_dir: run_grpo(
            config.zero,
            config.model,
            stage="zero",
            model_dir=base_dir,
            prompts=prompts,
            rewards=rewards,
            out_dir=out_dir,
            seed=config.seed,
            progress=progress,
        ),
    )
    run_stage(
        folders["pairs"],
        lambda out_dir: run_pairs(
            config.pairs,
            config.model,
            base_dir=base_dir,
            zero_dir=folders["zero"],
            prompts=prompts,
            out_dir=out_dir,
            seed=config.seed,
            progress=progress,
        ),
    )
    run_stage(folders["coldstart"], lambda out_dir: _cold_start(config, base_dir, folders["pairs"], out_dir, progress))
    run_stage(
        folders["final"],
        lambda out_dir: run_grpo(
            config.final,
            config.model,
            stage="final",
            model_dir=folders["coldstart"],
            prompts=prompts,
            rewards=rewards,
            out_dir=out_dir,
            seed=config.seed,
            progress=progress,
        ),
    )


def _cold_start(
    config: SpecsConfig, base_dir: Path, pairs_dir: Path, out_dir: Path, progress: Progress
) -> dict[str, Any]:
    """DPO + SFT from base on the pairs, or the control: SFT on their chosen side."""
    pairs = load_pairs(pairs_dir / "pairs.jsonl")
    if config.coldstart.kind == "sft":
        check_origin(pairs, fingerprint(base_dir))
        return run_sft(
            config.coldstart,
            config.model,
            stage="coldstart",
            model_dir=base_dir,
            rows=[(pair.prompt, pair.chosen) for pair in pairs],
            out_dir=out_dir,
            seed=config.seed,
            progress=progress,
        )
    return run_dpo(
        config.coldstart,
        config.model,
        stage="coldstart",
        model_dir=base_dir,
        pairs=pairs,
        out_dir=out_dir,
        cache_dir=out_dir.parent / "cache",
        seed=config.seed,
        progress=progress,
    )


def check_inputs(config: SpecsConfig, base_dir: Path, progress: Progress) -> list[Prompt]:
    """The training prompts, after everything that a stage or the evaluation reads later was looked at."""
    resolve_device(config.model.device)
    load_judge(config.pairs.judge)
    encoder = Encoder(load_processor(base_dir))
    prompts = load_training_prompts(config, encoder, progress)
    check_questions(config, encoder, progress)
    return prompts


def load_training_prompts(config: SpecsConfig, encoder: Encoder, progress: Progress) -> list[Prompt]:
    """The training prompts, every row checked: gold answers scorable, lengths within the limit."""
    prompts = load_prompts(config.data.train)
    for prompt in prompts:
        for name in sorted(RESERVED.intersection(prompt.columns)):
            raise ValueError(
                f"{prompt.source}: column {name!r} has a name that reward functions receive anyway; rename it"
            )
        check_answer(prompt)
    with progress.track("checking prompts", len(prompts)) as bar:
        kept, filtered = check_lengths(
            prompts,
            encoder,
            config.data.max_prompt_tokens,
            filter_overlong=config.data.filter_overlong,
            advance=lambda: bar.advance(1),
        )
    if filtered:
        progress.say(
            f"{filtered} of {len(prompts)} prompts are over max_prompt_tokens and left out (data.filter_overlong)"
        )
    return kept


def check_questions(config: SpecsConfig, encoder: Encoder, progress: Progress) -> None:
    """Read every evaluation question as the evaluation will, after the training: a fault in one must not wait until then."""
    splits = {name: load_prompts(path)[: config.eval.limit] for name, path in config.eval.splits.items()}
    with progress.track("checking evaluation questions", sum(map(len, splits.values()))) as bar:
        for prompts in splits.values():
            for prompt in prompts:
                check_answer(prompt)
                encoder.prompt(prompt)
                bar.advance(1)

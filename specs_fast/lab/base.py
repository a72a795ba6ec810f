"""``python -m specs_fast.lab.base``: pre-trains the base model and writes the folder that the package carries."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from specs_fast.lab.model import new_model
from specs_fast.lab.packed import BASE_MODEL, round_to_half, save_base
from specs_fast.lab.pretrain import Recipe, pretrain
from specs_fast.lab.processor import build_processor


def make_base(recipe: Recipe, folder: Path, *, command: str, questions: int) -> dict[str, Any]:
    """Pre-trains, measures and saves the base; returns its provenance."""
    from specs_fast.lab.measure import measure

    processor = build_processor()
    model = new_model(processor.tokenizer, recipe.seed)
    started = time.monotonic()
    seen = pretrain(model, processor.tokenizer, recipe, _Report())
    seconds = time.monotonic() - started
    round_to_half(model)
    provenance: dict[str, Any] = {
        "command": command,
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "pretraining_seconds": round(seconds),
        "digits_read_in_training": round(seen["train_read_rate"], 4),
        "measured": measure(model, processor, questions=questions, seed=recipe.seed) if questions else "not measured",
    }
    save_base(model, folder, provenance)
    return provenance


class _Report:
    """A line every 50 steps with rate and time left of the stage."""

    def __init__(self) -> None:
        self.stage, self.started = "", 0.0

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if stage != self.stage:
            self.stage, self.started, self.first = stage, time.monotonic(), step - 1
        if step % 50 == 0 or step == steps:
            rate = (step - self.first) / max(1e-9, time.monotonic() - self.started)
            print(
                f"{stage} {step}/{steps} loss {loss:.3f} {rate:.1f} steps/s {(steps - step) / rate:.0f} s left",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m specs_fast.lab.base``."""
    parser = argparse.ArgumentParser(
        prog="python -m specs_fast.lab.base", description="Pre-train the lab's base model."
    )
    default = Recipe()
    parser.add_argument(
        "--out", type=Path, default=BASE_MODEL, help="model folder to write (default: inside the package)"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps)
    parser.add_argument("--skill-steps", type=int, default=default.skill_steps)
    parser.add_argument("--style-steps", type=int, default=default.style_steps)
    parser.add_argument(
        "--questions", type=int, default=400, help="questions per split to measure with; 0 skips measuring"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(
        default,
        seed=options.seed,
        vision_steps=options.vision_steps,
        skill_steps=options.skill_steps,
        style_steps=options.style_steps,
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    kept = [word for i, word in enumerate(words) if word != "--out" and (i == 0 or words[i - 1] != "--out")]
    command = " ".join(["python -m specs_fast.lab.base", *kept])
    provenance = make_base(recipe, options.out, command=command, questions=options.questions)
    print(json.dumps(provenance["measured"], indent=2))


if __name__ == "__main__":
    main()

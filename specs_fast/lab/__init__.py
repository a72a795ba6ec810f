"""The embedded lab: real scanned digits, questions with checkable answers, and a tiny vision-language base model.

`build` writes ordinary files (JSONL, PNG, a model folder); nothing below the command line knows where they came from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from specs_fast.lab.dataset import EVAL_SPLITS, OUT_OF_DISTRIBUTION, TRAIN, split_size, write_split
from specs_fast.lab.packed import BASE_MODEL, unpack_base
from specs_fast.train.stage_dir import write_json

__all__ = ["BASE_MODEL", "EVAL_SPLITS", "OUT_OF_DISTRIBUTION", "LabPaths", "build"]

DONE = "DONE.json"


class LabSettings(Protocol):
    """What `build` reads; ``specs_fast.config.LabConfig`` has it."""

    @property
    def questions_train(self) -> int: ...
    @property
    def questions_eval(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class LabPaths:
    """base_dir: fp32 model folder. train: question file. eval_splits: split name -> question file, ``id`` first."""

    base_dir: Path
    train: Path
    eval_splits: dict[str, Path]


def build(config: LabSettings, out_dir: str | Path) -> LabPaths:
    """Writes the lab below ``out_dir/lab``: ``base/``, ``train.jsonl``, ``eval_<split>.jsonl``, ``images/``.

    Deterministic in ``config``. A finished lab with the same settings is left as it is; an unfinished one is written again.
    Raises ValueError for sizes below 1, and for a finished lab with other settings (a run may have been trained on it).
    """
    folder = Path(out_dir) / "lab"
    settings = {name: getattr(config, name) for name in ("questions_train", "questions_eval", "seed")}
    for name in ("questions_train", "questions_eval"):
        if settings[name] < 1:
            raise ValueError(f"lab.{name} is {settings[name]}; use at least 1")
    paths = LabPaths(
        folder / "base", folder / "train.jsonl", {name: folder / f"eval_{name}.jsonl" for name in EVAL_SPLITS}
    )
    done = folder / DONE
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"{folder} was built with {found}, not {settings}; use another output folder or delete it")
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    unpack_base(paths.base_dir)
    write_split(folder, "train", TRAIN, settings["questions_train"], settings["seed"])
    for name, variety in EVAL_SPLITS.items():
        write_split(folder, f"eval_{name}", variety, split_size(name, settings["questions_eval"]), settings["seed"])
    write_json(done, settings)
    return paths

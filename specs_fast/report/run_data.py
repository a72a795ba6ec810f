"""What a run folder holds, read tolerantly: a run may have stopped anywhere, and what is missing is simply empty.

Stage folders exist under their own name when finished and as ``<name>.partial`` while they are written; a killed process
may leave a torn last line in a JSONL file, which is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MODELS = ("base", "zero", "coldstart", "final")
STAGES = ("zero", "pairs", "coldstart", "final")
MODEL_TITLES = {"base": "base", "zero": "zero", "coldstart": "cold start", "final": "final"}


@dataclass(frozen=True)
class Stage:
    """One stage folder. state: "done", "running" (a ``.partial`` folder is there) or "absent"."""

    name: str
    state: str
    folder: Path
    done: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """One evaluated model: its summary (``eval/<model>.json``) and every response (``eval/<model>.completions.jsonl``)."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run folder in memory."""

    folder: Path
    config: dict[str, Any]
    info: dict[str, Any]
    stages: dict[str, Stage]
    pair_yield: dict[str, Any]
    pair_rows: list[dict[str, Any]]
    evaluations: dict[str, Evaluation]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)


def read_run(folder: Path) -> Run:
    """Read a run folder. FileNotFoundError where there is no folder, or no run in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    if not (folder / "config.yaml").is_file() and not (folder / "eval").is_dir():
        raise FileNotFoundError(f"{folder}: no config.yaml and no eval/ in it, so it is no run folder")
    stages = {name: _read_stage(folder, name) for name in STAGES}
    pairs = stages["pairs"].folder
    return Run(
        folder=folder,
        config=_read_yaml(folder / "config.yaml"),
        info=read_json(folder / "run.json"),
        stages=stages,
        pair_yield=read_json(pairs / "yield.json"),
        pair_rows=read_jsonl(pairs / "pairs.jsonl"),
        evaluations=read_evaluations(folder / "eval"),
    )


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluated models of an ``eval/`` folder, in the order of the method."""
    found = {}
    for name in MODELS:
        summary = read_json(folder / f"{name}.json")
        if summary:
            found[name] = Evaluation(summary, read_jsonl(folder / f"{name}.completions.jsonl"))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is absent or torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; empty where the file is absent, without lines that are torn."""
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _read_stage(run_dir: Path, name: str) -> Stage:
    folder = run_dir / name
    state = "done" if (folder / "DONE.json").is_file() else "absent"
    if state == "absent" and folder.with_name(f"{name}.partial").is_dir():
        folder, state = folder.with_name(f"{name}.partial"), "running"
    return Stage(
        name=name,
        state=state,
        folder=folder,
        done=read_json(folder / "DONE.json"),
        metrics=read_jsonl(folder / "metrics.jsonl"),
        completions=read_jsonl(folder / "completions.jsonl"),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}

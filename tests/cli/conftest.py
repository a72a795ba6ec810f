"""A run in which only the command line is real: the lab, the stages and the evaluation are small stand-ins that count calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from specs_fast.config import SpecsConfig

RECIPE: dict[str, Any] = {
    "lab": {"questions_train": 3, "questions_eval": 2},
    "zero": {"steps": 1, "optim": {"lr": 1e-4}},
    "coldstart": {"optim": {"lr": 1e-4}},
    "final": {"steps": 1, "optim": {"lr": 1e-4}},
    "eval": {"samples": 2, "pass_k": [1, 2]},
}


@dataclass
class Calls:
    """What was called, in order, and the configuration the stages got."""

    names: list[str] = field(default_factory=list)
    config: SpecsConfig | None = None
    fail_in: str | None = None

    def add(self, name: str) -> None:
        self.names.append(name)
        if self.fail_in == name:
            raise KeyboardInterrupt

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def _model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    seen = Calls()
    from specs_fast import lab

    def build(config: Any, out_dir: Path) -> lab.LabPaths:
        seen.add("lab")
        folder = Path(out_dir) / "lab"
        split = folder / "eval_id.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        split.write_text("{}\n", encoding="utf-8")
        return lab.LabPaths(_model(folder / "base", "base"), folder / "train.jsonl", {"id": split})

    def run(config: SpecsConfig, run_dir: Path, progress: Any) -> dict[str, Path]:
        seen.config = config
        models = {"base": Path(config.model.path)}
        for name in ("zero", "coldstart", "final"):
            if not (run_dir / name / "DONE.json").exists():
                seen.add(name)
                _model(run_dir / name, name)
                (run_dir / name / "DONE.json").write_text("{}", encoding="utf-8")
            models[name] = run_dir / name
        return models

    def evaluate(
        model_dir: Path, splits: Mapping[str, Path], config: Any, out_path: Path, **options: Any
    ) -> dict[str, Any]:
        seen.add(f"eval {Path(model_dir).name}")
        block = {"accuracy_any": 0.5, "accuracy_strict": 0.25, "format": 0.5, "pass@2": 0.75}
        splits_found = {name: {"n": 2, "sampled": block, "greedy": block} for name in splits}
        result = {"model": str(model_dir), "splits": splits_found, "settings": {"samples": config.samples}}
        out_path.parent.mkdir(parents=True, exist_ok=True)
        out_path.write_text(json.dumps(result), encoding="utf-8")
        return result

    monkeypatch.setattr(lab, "build", build)
    monkeypatch.setattr("specs_fast.methods.specs.run", run)
    monkeypatch.setattr("specs_fast.evals.run.evaluate", evaluate)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path / "run")}), encoding="utf-8")
    return str(path)

"""What a run is: one frozen dataclass per part, read from YAML plus dotted overrides, checked before any work starts.

``load_config("recipes/lab-specs.yaml", ["zero.optim.lr=1e-4"])`` gives a ``SpecsConfig`` or raises ``ConfigError``
naming the file or override, the dotted key, the value and what is allowed. Relative paths are kept as written and are
relative to the directory the command is started in (image paths inside a data file are relative to that file).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from specs_fast.config_sections import (
    BUILTIN_REWARDS,
    CORRUPTIONS,
    DataConfig,
    DPOConfig,
    EvalConfig,
    GRPOConfig,
    LabConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    RewardConfig,
    SamplingConfig,
)
from specs_fast.structured import ConfigError, apply_override, from_data, read_yaml_mapping, require, to_data

__all__ = [
    "CORRUPTIONS",
    "ConfigError",
    "DPOConfig",
    "DataConfig",
    "EvalConfig",
    "GRPOConfig",
    "LabConfig",
    "ModelConfig",
    "OptimConfig",
    "PairsConfig",
    "RewardConfig",
    "SamplingConfig",
    "SpecsConfig",
    "config_hash",
    "identity",
    "load_config",
    "to_yaml",
    "with_sources",
]


@dataclass(frozen=True)
class SpecsConfig:
    """One SPECS run: zero (GRPO from base), pairs, cold start (DPO + SFT, from base), final (GRPO from the cold start).

    output_dir: the run folder; made where it does not exist.
    zero: the short RL run whose model writes the chosen responses.
    coldstart: DPO on the model's own pairs, from the base model.
    final: RL from the cold start.
    name: title of the report; no effect on the run.
    method: only "specs" today.
    seed: of everything random outside evaluation.
    threads: CPU threads of PyTorch; None: PyTorch's own choice. Results are equal only for equal thread counts.
    lab: build the embedded lab's data and base model first, and use them for ``model.path``, ``data.train`` and
        ``eval.splits``.
    model: see ModelConfig.
    data: see DataConfig.
    rewards: functions whose weighted sum is the reward; format + accuracy as in the paper.
    pairs: see PairsConfig.
    eval: see EvalConfig.
    """

    output_dir: str
    zero: GRPOConfig
    coldstart: DPOConfig
    final: GRPOConfig
    name: str = "specs"
    method: Literal["specs"] = "specs"
    seed: int = 0
    threads: int | None = None
    lab: LabConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig(name) for name in BUILTIN_REWARDS])
    pairs: PairsConfig = field(default_factory=PairsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(self.output_dir != "", "output_dir", self.output_dir, "a folder")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(
            self.threads is None or self.threads >= 1,
            "threads",
            self.threads,
            "at least 1, or null for PyTorch's choice",
        )
        names = [reward.name for reward in self.rewards]
        require(len(names) > 0, "rewards", names, "a list of at least one reward")
        require(len(set(names)) == len(names), "rewards", names, "a list that names each reward once")
        require(
            any(reward.weight != 0 for reward in self.rewards), "rewards", names, "a list in which some weight is not 0"
        )


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SpecsConfig:
    """The configuration in a YAML file, changed by dotted overrides such as ``zero.optim.lr=1e-4`` (values are YAML).

    Raises FileNotFoundError, or ConfigError naming file or override, dotted key, value and what is allowed.
    """
    path = Path(path)
    data = read_yaml_mapping(path)
    overridden = {apply_override(data, override): override for override in overrides}

    def source(key: str) -> str:
        for changed, override in overridden.items():
            if key == changed or key.startswith(f"{changed}.") or (key and changed.startswith(f"{key}.")):
                return f"{path} with override {override!r}"
        return str(path)

    config = from_data(SpecsConfig, data, source=source)
    given = {"model.path": config.model.path, "data.train": config.data.train, "eval.splits": config.eval.splits}
    for key, value in given.items():
        if config.lab is not None and value:
            raise ConfigError(
                f"{source(key)}: {key}: {value!r} is given and so is lab, which makes its own; drop one of the two"
            )
        if config.lab is None and not value and key != "eval.splits":
            raise ConfigError(
                f"{source(key)}: {key}: missing; give it, or a lab section (lab: {{}}) to use the embedded lab's"
            )
    return config


def with_sources(config: SpecsConfig, *, model_path: str, train: str, splits: dict[str, str]) -> SpecsConfig:
    """The same run with the model and the data files that the lab made for it."""
    return replace(
        config,
        model=replace(config.model, path=model_path),
        data=replace(config.data, train=train),
        eval=replace(config.eval, splits=dict(splits)),
    )


def to_yaml(config: SpecsConfig) -> str:
    """YAML that ``load_config`` reads back to an equal configuration, every default written out."""
    return yaml.safe_dump(to_data(config), sort_keys=False, allow_unicode=True, width=140)


def identity(config: SpecsConfig) -> dict[str, object]:
    """The plain data that decides what a run trains: all of it but its name, place, thread count and evaluation.

    Paths that the lab fills in are left out, so that a run folder may be moved.
    """
    data: dict[str, object] = to_data(config)
    for key in ("name", "output_dir", "threads", "eval"):
        del data[key]
    if config.lab is not None:
        data["model"] = to_data(replace(config.model, path=""))
        data["data"] = to_data(replace(config.data, train=""))
    return data


def config_hash(config: SpecsConfig) -> str:
    """16 hex digits of the SHA-256 of ``identity(config)``: equal hashes train equal models."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]

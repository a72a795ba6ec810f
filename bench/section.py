"""What is compared: arms that do the same task on the same inputs, the bare work inside it, and the exact answer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Arm:
    """One way of doing a section's task.

    run: does it once and returns outputs by name, gradients as "d <input>"; None where it cannot run here. why_not: the reason.
    bare: names of the section's bare parts that its arithmetic consists of, one per time it is done (a score GEMM that is
    done again stands twice). note: what a reader of the table should know, or what says it after the first call.
    check: turns what ``run`` returns into what the exact answer is compared with, untimed.
    """

    name: str
    library: str
    run: Run | None = None
    why_not: str = ""
    bare: tuple[str, ...] = ()
    note: str | Callable[[], str] = ""
    check: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    @staticmethod
    def absent(name: str, library: str, why_not: str) -> Arm:
        return Arm(name, library, None, why_not)


@dataclass
class Section:
    """Arms measured together.

    flop, moved: what the task cannot do without, in floating-point operations, and in bytes of its inputs and outputs.
    bare: parts timed beside the arms (for example bare GEMMs). exact: outputs in fp64 from the same rounded inputs.
    """

    arms: list[Arm]
    bare: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    exact: Run | None = None
    flop: float = 0.0
    moved: float = 0.0


@dataclass(frozen=True)
class Case:
    """A section that is not built yet. shape: what the plot and the table show, ``task`` among it; ``build`` takes the device.

    rounds: timed rounds unless the command says otherwise.
    """

    name: str
    shape: dict[str, Any]
    build: Callable[[torch.device], Section]
    rounds: int = 7


@dataclass(frozen=True)
class Goal:
    """A promise about a section: ``figure(arm) <= bound`` (or ``>=``), with the figure named as in a result's row.

    figure: "times_bare", "memory_of:<arm>" (fraction of that arm's), "times_faster_than:<arm>" or "of_copy_bandwidth".
    """

    section: str
    arm: str
    figure: str
    bound: float
    at_most: bool = True


def version(distribution: str) -> str | None:
    """Version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def library(distribution: str) -> str:
    """Name and version, for a result's row; the name alone where no version is known."""
    return f"{distribution} {version(distribution) or ''}".strip()


def missing(distribution: str) -> str:
    """Why an arm of a library that is not here was not run, and what changes that."""
    return f"not installed; pip install {distribution}"


def importable(module: str) -> bool:
    """Whether the top-level module is installed, without importing it."""
    return importlib.util.find_spec(module) is not None

"""Where a number was measured: hardware, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
_MODIFIED = ("status", "--porcelain", "-uno", "--", ".", ":(exclude)bench/results", ":(exclude)docs")
"""What a run writes is no change of what it measures."""
COMMIT_VARIABLE = "SPECS_FAST_COMMIT"
"""The commit of a source tree that was copied without its history (``python -m bench.gpu --commit``)."""


def provenance() -> dict[str, Any]:
    """Everything that a published number carries, as JSON values."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("torch", "transformers", "numpy", "triton")
    return {
        "command": " ".join([_program(), *sys.argv[1:]]),
        "commit": commit(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu or "none",
            **({"driver": gpu_driver(), "cuda": torch.version.cuda or torch.version.hip} if gpu else {}),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
    }


def commit() -> str:
    """What is checked out here, or what the environment says where git does not tell."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    return head + (" (modified)" if _git(*_MODIFIED) else "")


@cache
def gpu_driver() -> str:
    """Version of the GPU's driver, from nvidia-smi where there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(query) or "unknown").splitlines()[0]


class OtherLoad:
    """How many cores other processes kept busy since this was made; a number measured beside much of it is worth little."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system = (int(field) for field in stat.read_text(encoding="utf-8").split()[1:4])
        return time.perf_counter(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time()

    def cores(self) -> float | None:
        """Cores, on average; None where the system does not say."""
        now = self._read()
        if now is None or self._start is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return round(max(0.0, busy - own) / wall, 2)


def cpu_name() -> str:
    """The processor's name, from /proc where there is one."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _program() -> str:
    """What was started: a module, or a console script by its name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    return _output(["git", *arguments])


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

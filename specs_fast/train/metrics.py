"""Metrics of a run: a JSONL writer and a sum that respects denominators."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor


class MetricSum:
    """Adds metrics over micro-batches.

    The losses divide their metrics by the global denominators, so the sum over micro-batches is the step's value.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        for key, value in metrics.items():
            self.values[key] = self.values.get(key, 0.0) + float(value)


class JsonlWriter:
    """Appends JSON objects to a file, one a line, flushed each time. Non-finite numbers are written as null."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """The value with every number that JSON has no word for, at any depth, as None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

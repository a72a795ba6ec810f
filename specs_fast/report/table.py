"""The before/after numbers: one source for the command line's table and the report's.

Values and their standard errors are the evaluation's own (over prompts, since samples of one prompt are not independent;
where a file has none, the binomial bound sqrt(p (1 - p) / prompts)). The error of a difference uses that all models answer
the same prompts: it is the spread of the per-prompt differences, where the responses are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from specs_fast.report.run_data import MODEL_TITLES, Evaluation

MODES = ("sampled", "greedy")
METRIC_TITLES = {
    "accuracy_any": "right, any style",
    "accuracy_strict": "right, strict",
    "format": "format",
}
# Per-prompt marks in eval/<model>.completions.jsonl that a metric is the mean of: (sampled: a list, greedy: one value).
_MARKS = {
    "accuracy_strict": ("correct_strict", "greedy_correct_strict"),
    "accuracy_any": ("correct_any", "greedy_correct_any"),
    "format": ("format", "greedy_format"),
}


@dataclass(frozen=True)
class Cell:
    """A share in [0, 1] with its standard error, and its difference from base with that difference's error."""

    value: float
    error: float
    delta: float | None = None
    delta_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One metric of one split under one way of decoding, for every evaluated model; None where a model has no such value."""

    split: str
    mode: str
    metric: str
    prompts: int
    cells: Mapping[str, Cell | None]

    @property
    def title(self) -> str:
        return METRIC_TITLES.get(self.metric, self.metric)


def before_after(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """Rows split by split, sampled before greedy: any style, strict, format, pass@k (pass@1 where it is not one of these).

    ``evaluations``: model name to evaluation; a model named ``base`` is what the others are compared to.
    """
    rows = []
    for split in _splits_in_order(evaluations):
        for mode in MODES:
            blocks = {name: _block(evaluation, split, mode) for name, evaluation in evaluations.items()}
            metrics = [name for name in METRIC_TITLES if any(name in block for block in blocks.values())]
            metrics += sorted({key for block in blocks.values() for key in block if key.startswith("pass@")}, key=_k_of)
            made = [_row(evaluations, split, mode, metric) for metric in metrics]
            rows += [row for row in made if row.metric != "pass@1" or not any(_same(row, other) for other in made)]
    return rows


def _same(row: Row, other: Row) -> bool:
    """Whether another row shows the same values."""
    pairs = [(row.cells[name], other.cells[name]) for name in row.cells]
    return row is not other and all(
        (a is None) == (b is None) and (a is None or b is None or abs(a.value - b.value) < 1e-9) for a, b in pairs
    )


def find(rows: Sequence[Row], split: str, mode: str, metric: str) -> Row | None:
    """The row of a split, way of decoding and metric."""
    for row in rows:
        if (row.split, row.mode, row.metric) == (split, mode, metric):
            return row
    return None


def splits_of(rows: Sequence[Row]) -> list[str]:
    """Split names in order of appearance."""
    return list(dict.fromkeys(row.split for row in rows))


def percent(cell: Cell | None) -> str:
    """``52.3 ±1.4``, or a dash where there is no value."""
    return "–" if cell is None else f"{100 * cell.value:.1f} ±{100 * cell.error:.1f}"


def points(cell: Cell | None) -> str:
    """The difference from base in percentage points: ``+27.4 ±1.9``."""
    if cell is None or cell.delta is None:
        return "–"
    error = "" if cell.delta_error is None else f" ±{100 * cell.delta_error:.1f}"
    return f"{100 * cell.delta:+.1f}{error}"


def console_tables(rows: Sequence[Row], splits: Sequence[str] | None = None) -> Group:
    """The tables that ``specs-fast run`` prints: one a split (all, or these), narrow enough for 80 columns."""
    tables: list[Table | Text] = []
    for split in splits_of(rows) if splits is None else splits:
        part = [row for row in rows if row.split == split]
        shown = list(part[0].cells)
        last = shown[-1] if len(shown) > 1 and shown[0] == "base" else None
        count = max(row.prompts for row in part)
        tables.append(Text(f"{split}: {count:,} held-out questions, percent ± standard error", style="bold"))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in shown:
            table.add_column(MODEL_TITLES.get(name, name), justify="right", no_wrap=True)
        if last:
            table.add_column("change", justify="right", no_wrap=True)
        mode = ""
        for row in part:
            if row.mode != mode:
                mode = row.mode
                table.add_row(mode, style="dim")
            change = [points(row.cells.get(last))] if last else []
            table.add_row(row.title, *(percent(row.cells.get(name)) for name in shown), *change)
        tables.append(table)
    return Group(*tables)


def _row(evaluations: Mapping[str, Evaluation], split: str, mode: str, metric: str) -> Row:
    cells: dict[str, Cell | None] = {}
    base_marks: dict[str, float] = {}
    prompts = 0
    for name, evaluation in evaluations.items():
        block = _block(evaluation, split, mode)
        value = block.get(metric)
        if not isinstance(value, int | float):
            cells[name] = None
            continue
        count = int(evaluation.summary["splits"][split].get("n", 0))
        prompts = max(prompts, count)
        parts = (evaluation.summary.get("pooled") or {}).get(split, [split])
        marks = {
            f"{part}/{prompt}": mean
            for part in parts
            for prompt, mean in prompt_means(evaluation.rows, part, mode, metric).items()
        }
        error = (block.get("standard_errors") or {}).get(metric)
        if error is None:
            error = math.sqrt(max(0.0, value * (1 - value)) / max(1, count))
        delta = delta_error = None
        if name == "base":
            base_marks = marks
        elif (base := cells.get("base")) is not None:
            delta = value - base.value
            shared = [marks[key] - base_marks[key] for key in marks if key in base_marks]
            delta_error = _spread(shared) if shared else math.hypot(error, base.error)
        cells[name] = Cell(float(value), error, delta, delta_error)
    return Row(split, mode, metric, prompts, cells)


def prompt_means(rows: Sequence[Mapping[str, Any]], split: str, mode: str, metric: str) -> dict[str, float]:
    """Prompt id to the mean of the metric over its responses; empty where the marks are not logged."""
    means = {}
    for row in rows:
        if row.get("split") != split:
            continue
        if metric.startswith("pass@"):
            marks = (row.get("correct_any") if mode == "sampled" else None) or []
            k = _k_of(metric)
            value = pass_at_k(len(marks), sum(map(bool, marks)), k) if len(marks) >= k else None
        else:
            sampled, greedy = _MARKS[metric]
            marks = row.get(sampled) if mode == "sampled" else [row[greedy]] if greedy in row else None
            value = None if not marks else sum(map(bool, marks)) / len(marks)
        if value is not None:
            means[str(row.get("prompt_id"))] = value
    return means


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold a correct one."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _spread(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _block(evaluation: Evaluation, split: str, mode: str) -> Mapping[str, Any]:
    block = evaluation.summary.get("splits", {}).get(split, {}).get(mode)
    return block if isinstance(block, Mapping) else {}


def _splits_in_order(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """The first split, the pools of others, then the others one by one."""
    first, *others = _in_order(evaluations, "splits") or [""]
    pools = _in_order(evaluations, "pooled")
    return [split for split in (first, *pools, *(name for name in others if name not in pools)) if split]


def _in_order(evaluations: Mapping[str, Evaluation], key: str) -> list[str]:
    return list(dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation.summary.get(key, {})))


def _k_of(metric: str) -> int:
    return int(metric.removeprefix("pass@"))

"""The before/after numbers: values as evaluated, errors over prompts, differences paired."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specs_fast.report.run_data import Evaluation, read_run
from specs_fast.report.table import before_after, console_tables, find, pass_at_k, percent, points, splits_of


def evaluation(marks: list[list[bool]] | None, value: float, n: int = 4) -> Evaluation:
    rows = [{"split": "id", "prompt_id": str(i), "correct_any": row} for i, row in enumerate(marks or [])]
    return Evaluation({"splits": {"id": {"n": n, "sampled": {"accuracy_any": value}}}}, rows)


def test_values_and_errors_are_the_evaluations_own() -> None:
    block = {"accuracy_any": 0.5, "standard_errors": {"accuracy_any": 0.29}}
    cell = before_after({"base": Evaluation({"splits": {"id": {"n": 4, "sampled": block}}}, [])})[0].cells["base"]
    assert cell is not None and (cell.value, cell.error) == (0.5, 0.29)


def test_the_error_of_a_difference_is_paired() -> None:
    # Every prompt improves by exactly one of two samples: the difference is certain although both means vary.
    base = evaluation([[True, False], [True, False], [False, False], [False, False]], 0.25)
    final = evaluation([[True, True], [True, True], [True, False], [False, True]], 0.75)
    cell = before_after({"base": base, "final": final})[0].cells["final"]
    assert cell is not None and cell.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert cell.delta == pytest.approx(0.5) and cell.delta_error == pytest.approx(0.0)


def test_prompts_with_fewer_logged_samples_than_k_do_not_enter_the_error_of_pass_at_k() -> None:
    def of(marks: list[list[bool]]) -> Evaluation:
        rows = [{"split": "id", "prompt_id": str(i), "correct_any": row} for i, row in enumerate(marks)]
        return Evaluation({"splits": {"id": {"n": 3, "sampled": {"pass@2": 0.5}}}}, rows)

    base, final = of([[True, False], [False, False], [True]]), of([[True, True], [True, True], [False]])
    row = find(before_after({"base": base, "final": final}), "id", "sampled", "pass@2")
    assert row is not None and row.cells["final"] is not None
    assert row.cells["final"].delta_error == pytest.approx(0.5)  # of the differences 0 and 1


def test_without_errors_and_responses_the_error_is_the_binomial_bound() -> None:
    rows = before_after({"base": evaluation(None, 0.2, n=100), "zero": evaluation(None, 0.5, n=100)})
    base, zero = rows[0].cells["base"], rows[0].cells["zero"]
    assert base is not None and zero is not None
    assert base.error == pytest.approx(0.04) and zero.error == pytest.approx(0.05)
    assert zero.delta_error == pytest.approx(math.hypot(0.04, 0.05))


def test_values_are_those_of_the_evaluation_files(fake_run: Callable[..., Path]) -> None:
    run = read_run(fake_run())
    rows = before_after(run.evaluations)
    assert splits_of(rows) == ["id", "ood_tags", "ood_long"]
    for row in rows:
        for model, cell in row.cells.items():
            assert cell is not None
            assert cell.value == run.evaluations[model].summary["splits"][row.split][row.mode][row.metric]


def test_metrics_come_in_reading_order_and_pass_at_1_only_where_it_says_something_new(
    fake_run: Callable[..., Path],
) -> None:
    rows = before_after(read_run(fake_run()).evaluations)
    first = [(row.mode, row.metric) for row in rows if row.split == "id"]
    assert first == [
        ("sampled", "accuracy_any"),
        ("sampled", "accuracy_strict"),
        ("sampled", "format"),
        ("sampled", "pass@4"),
        ("greedy", "accuracy_any"),
        ("greedy", "accuracy_strict"),
        ("greedy", "format"),
    ]


def test_models_not_evaluated_yet_have_no_column_and_no_difference(fake_run: Callable[..., Path]) -> None:
    rows = before_after(read_run(fake_run(models=("base",))).evaluations)
    assert set(rows[0].cells) == {"base"}
    cell = rows[0].cells["base"]
    assert cell is not None and cell.delta is None and points(cell) == "–"
    assert percent(None) == "–"


def test_the_console_table_fits_80_columns_and_holds_every_number(fake_run: Callable[..., Path]) -> None:
    rows = before_after(read_run(fake_run()).evaluations)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_tables(rows))
    text = console.export_text()
    assert "…" not in text
    for row in rows:
        for cell in row.cells.values():
            assert percent(cell) in text
        assert points(row.cells["final"]) in text


def test_find_and_a_split_that_only_one_model_has() -> None:
    other = Evaluation({"splits": {"new": {"n": 2, "greedy": {"format": 1.0}}}}, [])
    rows = before_after({"base": evaluation(None, 0.5), "final": other})
    row = find(rows, "new", "greedy", "format")
    assert row is not None and row.cells["base"] is None and row.cells["final"] is not None
    assert find(rows, "new", "sampled", "format") is None


@pytest.mark.parametrize(
    ("samples", "correct", "k", "value"), [(4, 0, 4, 0.0), (4, 1, 4, 1.0), (4, 2, 1, 0.5), (4, 1, 2, 0.5)]
)
def test_pass_at_k_is_unbiased(samples: int, correct: int, k: int, value: float) -> None:
    assert pass_at_k(samples, correct, k) == pytest.approx(value)


@pytest.mark.parametrize("summary", [{}, {"splits": {}}, {"splits": {"id": {}}}, {"splits": {"id": {"sampled": None}}}])
def test_an_empty_summary_gives_no_rows(summary: dict[str, Any]) -> None:
    assert before_after({"base": Evaluation(summary, [])}) == []


def test_a_pool_stands_after_the_first_split_and_its_differences_are_paired_over_its_parts() -> None:
    def pooled(first: bool, second: bool) -> Evaluation:
        blocks = {name: {"n": 1, "sampled": {"accuracy_any": 0.5}} for name in ("id", "len", "noise")}
        blocks["ood"] = {"n": 2, "sampled": {"accuracy_any": (first + second) / 2}}
        rows = [
            {"split": "len", "prompt_id": "x", "correct_any": [first]},
            {"split": "noise", "prompt_id": "x", "correct_any": [second]},
        ]
        return Evaluation({"splits": blocks, "pooled": {"ood": ["len", "noise"]}}, rows)

    rows = before_after({"base": pooled(False, False), "final": pooled(True, True)})
    assert splits_of(rows) == ["id", "ood", "len", "noise"]
    cell = find(rows, "ood", "sampled", "accuracy_any").cells["final"]  # type: ignore[union-attr]
    assert cell is not None and (cell.delta, cell.delta_error) == (1.0, 0.0)

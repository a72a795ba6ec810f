"""The plot of a sweep: which sections it joins, and what stands on its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.plot import family, memory, plot, times


def section(num_tokens: int, vocab: int, milliseconds: float, extra: float) -> dict[str, Any]:
    rows = [
        {"arm": "ours", "milliseconds": {"median": milliseconds}, "extra_mib": extra},
        {"arm": "absent", "not_run": "not installed"},
    ]
    measured = {"hardware": {"gpu": "none", "cpu": "a CPU", "threads": 1}, "versions": {"torch": "2"}}
    shape = {"N": num_tokens, "D": 8, "V": vocab, "dtype": "fp32", "task": "train", "sweep": True}
    bare = {"scores": 1.0, "d hidden": 1.0}
    return {"name": "s", "shape": shape, "rows": rows, "measured": measured, "bare_milliseconds": bare}


SECTIONS = [
    section(64, 512, 4.0, 1.0),
    section(16, 512, 3.0, 0.0),
    section(16, 1024, 5.0, 2.0),
    section(16, 64, 8.0, 1.0),
]


def test_a_curve_joins_sections_that_differ_in_one_letter() -> None:
    assert [s["shape"]["N"] for s in family(SECTIONS, "N")] == [16, 64]
    assert [s["shape"]["V"] for s in family(SECTIONS, "V")] == [64, 512, 1024]


def test_time_is_held_against_the_bare_parts_and_memory_of_zero_is_left_out() -> None:
    members = family(SECTIONS, "N")
    assert times(members, "N", "ours") == [(16, 1.5), (64, 2.0)]
    assert memory(members, "N", "ours") == [(64, 1.0)]
    assert times(members, "N", "absent") == []


def test_sections_without_bare_parts_are_drawn_in_milliseconds() -> None:
    members = [{**entry, "bare_milliseconds": {}} for entry in family(SECTIONS, "N")]
    assert times(members, "N", "ours") == [(16, 3.0), (64, 4.0)]


@pytest.mark.parametrize("left_out", ["", "D"])
def test_the_picture_is_written(tmp_path: Path, left_out: str) -> None:
    pytest.importorskip("matplotlib")
    sections = [{**s, "shape": {k: v for k, v in s["shape"].items() if k != left_out}} for s in SECTIONS]
    plot({"op": "made_up", "sections": sections}, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")

"""The tables of the pages in docs/ are those of the committed JSON, and the plots are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import tables


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_the_page_shows_the_committed_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert tables.page(text) == text, "run python -m bench.tables"


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_pictures_of_the_page_exist(path: Path) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    assert pictures and all((path.parent / picture).is_file() for picture in pictures)


def test_committed_results_carry_their_provenance() -> None:
    paths = [
        path
        for op in ("linear_logprob", "selective_logprob", "packed_attention", "update")
        for path in tables.RESULTS.glob(f"*/{op}.json")
    ]
    for path in paths:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert "tiny" not in result, path
        for section in result["sections"]:
            measured = section["measured"]
            assert "modified" not in measured["commit"] and measured["command"].startswith(
                ("specs-fast bench", "python -m bench")
            )


def test_a_block_without_results_says_not_measured() -> None:
    text = "a\n<!-- bench: linear_logprob no-such-gpu -->\nold numbers\n<!-- end -->\nb"
    assert tables.page(text) == "a\n<!-- bench: linear_logprob no-such-gpu -->\nNot measured.\n<!-- end -->\nb"


def test_a_block_shows_goals_tables_and_how_they_were_measured() -> None:
    measured = {
        "command": "specs-fast bench x",
        "commit": "abc",
        "hardware": {"gpu": "none", "cpu": "a CPU", "threads": 2},
    }
    section = {
        "name": "2x8 forward",
        "shape": {},
        "measured": measured | {"versions": {"torch": "2"}},
        "cores_busy_with_other_processes": 0.0,
        "bare_milliseconds": {"scores": 1.0},
        "copy_gb_per_s": 10.0,
        "useful_flop": 1.0,
        "useful_bytes": 1.0,
        "rows": [
            {
                "arm": "ours",
                "milliseconds": {"median": 1.2, "p20": 1.1, "p80": 1.3},
                "useful_tflops": 0.1,
                "bare": ["scores"],
                "times_bare": 1.2,
                "of_copy_bandwidth": 0.5,
                "extra_mib": 3.0,
                "peak_mib": None,
                "error": {"logp": 1e-7},
            },
            {"arm": "QuACK", "not_run": "not installed"},
        ],
    }
    swept = {**section, "name": "left out", "shape": {"sweep": True}}
    goal = {"section": "2x8 forward", "arm": "ours", "figure": "times_bare", "bound": 1.1, "at_most": True}
    text = tables.document({"goals": [{**goal, "measured": 1.2, "met": False}], "sections": [section, swept]})
    assert "| 2x8 forward | ours | times bare | ≤ 1.1 | 1.2      | **no** |" in text
    assert (
        "| ours | 1.2 | 1.1–1.3 | 0.1     | 1.20x of 1        | 50 %    | 3         |          | 1.0e-07    |" in text
    )
    assert "- QuACK: not run, not installed." in text and "left out" not in text
    assert "Measured by `specs-fast bench x` at commit abc." in text

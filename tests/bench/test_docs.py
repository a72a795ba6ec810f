"""The tables of docs/kernels.md are those of the committed JSON, and the plots are there."""

from __future__ import annotations

import json
import re
from typing import Any

from bench import tables


def test_the_page_shows_the_committed_results() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "run python -m bench.tables"


def test_pictures_of_the_page_exist() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", tables.PAGE.read_text(encoding="utf-8"))
    assert pictures and all((tables.PAGE.parent / picture).is_file() for picture in pictures)


def test_committed_results_carry_their_provenance() -> None:
    paths = [
        path
        for op in ("linear_logprob", "selective_logprob", "packed_attention")
        for path in tables.RESULTS.glob(f"*/{op}.json")
    ]
    assert paths
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

"""The README's tables of models are those that the tests run over."""

from __future__ import annotations

import support_table


def test_the_readme_shows_the_models_that_are_tested() -> None:
    text = support_table.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- models:begin -->") == text.count("<!-- models:end -->") == 1
    assert support_table.page(text) == text, "run PYTHONPATH=tests/models python -m support_table"


def test_a_model_that_is_not_tested_leaves_the_table(monkeypatch) -> None:  # noqa: ANN001
    assert "| `mistral` | GQA, window |" in support_table.tables()
    monkeypatch.setattr(support_table, "MODELS", ("qwen3",))
    assert "`mistral`" not in support_table.tables() and "| `qwen3` |" in support_table.tables()

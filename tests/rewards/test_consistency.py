"""The rule judge: the reasoning must conclude with the answer, and its sums must hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.rewards.consistency import false_equations, load_judge, rule_judge


@pytest.mark.parametrize(
    ("reasoning", "answer", "expected"),
    [
        ("i see 3 7 . 3 + 7 = 10 . so 10 .", "10", True),
        ("i see 3 7 . 3 + 7 = 10 . so 10 .", "The answer is $\\boxed{10}$", True),
        ("i see 3 7 . 3 + 7 = 10 . so 10 .", "11", False),
        ("the reasoning says 4 .", "3", False),
        ("i see 3 7 . 3 + 7 = 11 . so 11 .", "11", False),
        ("i see 3 7 1 4 .", "15", False),
        ("first 3 last 4 . so last .", "last", True),
        ("first 3 last 4 . so last .", "first", False),
        ("larger than 5 : 7 9 . so 2 .", "2", True),
        ("Adding 3 and 7 gives 10. Thus, the answer is 10.", "10", True),
        ("what would one say to this question", "10", False),
        ("so 10 .", "", False),
        ("", "10", False),
    ],
)
def test_the_rule(reasoning: str, answer: str, expected: bool) -> None:
    assert rule_judge(reasoning, answer) is expected


@pytest.mark.parametrize(
    "text",
    [
        "2 + 3 * 4 = 14",
        "4 - 9 = -5",
        "2x + 3 + 4 = 9",
        "1 + 2 = 3 + 4 = 7",
        "(2 + 3) * 4 = 20",
        "10 / 2 + 1 = 6",
        "x - 1 + 1 = 3",
        "1.5 + 2 = 3.5",
        "22 / 7 = 3",
        "2 + 2 = 4.0",
        "5! + 1 + 1 = 122",
        "0 - 0 = 0",
        "2^3 + 1 = 9",
    ],
)
def test_equations_that_hold_or_are_more_than_whole_numbers_pass(text: str) -> None:
    assert false_equations(f"so {text} .") == []


@given(terms=st.lists(st.integers(0, 99), min_size=2, max_size=5), data=st.data(), off=st.integers(-3, 3))
def test_sums_are_recalculated(terms: list[int], data: st.DataObject, off: int) -> None:
    signs = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    expression = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    value = eval(expression)  # noqa: S307 - our own digits and signs
    assert bool(false_equations(f"i see it . {expression} = {value + off} . so")) is (off != 0)


def test_a_judge_by_import_path_is_used_and_held_to_true_or_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_judges.py").write_text(
        "def long(reasoning, answer): return len(reasoning) > 3\ndef vague(reasoning, answer): return 'yes'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = load_judge("my_judges:long")
    assert judge("because", "1") is True and judge("so", "1") is False
    with pytest.raises(TypeError, match="'my_judges:vague' returned 'yes'"):
        load_judge("my_judges:vague")("because", "1")
    sys.modules.pop("my_judges")


def test_the_default_judge_is_the_rule() -> None:
    assert load_judge("rule") is rule_judge


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "package.module:function"),
        ("no_such_package.x:judge", "'no_such_package' was not found"),
        ("specs_fast.rewards.consistency:jugde", "has no function 'jugde'; it has .*rule_judge"),
    ],
)
def test_a_judge_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_judge(name)
    assert repr(name) in str(caught.value)

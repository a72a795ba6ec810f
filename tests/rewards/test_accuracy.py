"""Right answers are right however they are written, and a guess of several is wrong."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.rewards.accuracy import (
    MAX_ANSWER_CHARS,
    accuracy_reward,
    answers_equal,
    by_rules,
    check_gold,
    compare_answers,
)
from specs_fast.rewards.normalise import clean
from specs_fast.rewards.verify import Verdict

BY_RULES = [
    # as tokenised in the lab, and as language models write
    ("10", "10", True),
    ("10 .", "10", True),
    ("the answer is 10 .", "10", True),
    ("Answer : 10", "10", True),
    ("The answer is 12 .", "12", True),
    (r"The answer is $\boxed{12}$", "12", True),
    (r"\boxed{12}", "12", True),
    (r"\(\boxed{\text{12}}\)", "12", True),
    ("**Answer:** 12", "12", True),
    ("3 + 7 = 10", "10", True),
    ("x = 10", "10", True),
    ("10 apples", "10", True),
    ("about 10 apples", "10", True),
    ("11", "10", False),
    ("", "10", False),
    ("ten", "10", False),
    ("8 or 9 or 10", "10", False),
    ("10 11", "10", False),
    ("10 , 11", "10", False),
    ("3 + 7 = 11", "10", False),
    # numbers
    ("10.0", "10", True),
    ("010", "10", True),
    ("+10", "10", True),
    ("1,234.50", "1234.5", True),
    (r"\$5", "5", True),
    ("-3", "- 3", True),
    ("−3", "-3", True),
    ("3", "-3", False),
    ("1/2", "0.5", True),
    (r"$\frac{1}{2}$", "0.5", True),
    (r"-\dfrac{1}{2}", "-1/2", True),
    ("2/4", "1/2", True),
    ("1 1/2", "1.5", True),
    ("0.333333", "1/3", True),
    ("0.333", "1/3", False),
    ("0.5000001", "0.5", False),
    ("99999999999999999999", "99999999999999999998", False),
    # lists
    ("1 3 4 7", "1 3 4 7", True),
    ("1, 3, 4, 7", "1 3 4 7", True),
    ("[1, 3, 4, 7]", "1 3 4 7", True),
    ("sorted they are 1 3 4 7", "1 3 4 7", True),
    ("1 3 7 4", "1 3 4 7", False),
    ("1 3 4", "1 3 4 7", False),
    ("7", "1 3 4 7", False),
    (r"\{2, 1\}", r"\{1, 2\}", True),
    ("2, 1", r"\{1, 2\}", True),
    ("(2, 1)", "(1, 2)", False),
    # choices
    ("B", "B", True),
    ("b", "B", True),
    ("(B)", "B", True),
    ("( b )", "b", True),
    ("B.", "(B)", True),
    ("B) Vitamin C", "B", True),
    ("B: the cat", "B", True),
    ("Option B", "B", True),
    ("The answer is (B).", "B", True),
    ("It is B because of the tail", "B", True),
    ("A", "B", False),
    ("A dog", "B", False),
    ("A or B", "B", False),
    ("A, B, C, D", "A", False),
    ("a , b , c", "a", False),
    ("B or C", "B", False),
    # yes and no
    ("yes", "Yes", True),
    ("Yes, it is.", "yes", True),
    ("no", "yes", False),
    ("yes or no", "yes", False),
    ("true", "yes", False),
    ("True", "true", True),
    # words and quantities
    ("first", "first", True),
    ("The last.", "last", True),
    ("last", "first", False),
    ("first or last", "first", False),
    ("paris", "Paris", True),
    ("Apollo 12", "Apollo 11", False),
    ("11", "Apollo 11", False),
    ("12", "12 cm", True),
    ("$12$ cm", "12 cm", True),
    ("12 m", "12 cm", False),
    ("13 cm", "12 cm", False),
]


@pytest.mark.parametrize(("pred", "gold", "expected"), BY_RULES)
def test_the_rules_decide(pred: str, gold: str, expected: bool) -> None:
    assert by_rules(clean(pred), clean(gold)) is expected
    assert answers_equal(pred, gold) is expected


BY_MATHS = [
    (r"\sqrt{4}", "2", True),
    (r"\sqrt{5}", "2", False),
    ("2^3", "8", True),
    (r"50\%", "0.5", True),
    (r"10^{\circ}", "10", True),
    ("5!", "120", True),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("x^2 + 2x", "(x+1)^2", False),
    (r"x=\frac{1}{2}", r"\frac12", True),
    (r"2\pi", r"\pi + \pi", True),
    ("[1, 2)", "[1,2)", True),
    ("(1,2)", "[1,2]", False),
    (r"\frac{1}{", r"\pi", False),
]


@pytest.mark.parametrize(("pred", "gold", "expected"), BY_MATHS)
def test_math_verify_decides_what_the_rules_cannot_read(pred: str, gold: str, expected: bool) -> None:
    assert by_rules(clean(pred), clean(gold)) is None
    assert answers_equal(pred, gold) is expected


NUMBERS = st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**12)


def written(value: Fraction, style: int) -> str:
    n, d = value.numerator, value.denominator
    return [f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", f"$ {n} / {d} $ .", f"\\boxed{{{n}/{d}}}"][style]


@given(a=NUMBERS, b=NUMBERS, styles=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_fractions_compare_exactly_in_every_notation(a: Fraction, b: Fraction, styles: tuple[int, int]) -> None:
    assert by_rules(clean(written(a, styles[0])), clean(written(a, styles[1]))) is True
    assert by_rules(clean(written(a, styles[0])), clean(written(b, styles[1]))) is (a == b)


@given(digits=st.lists(st.integers(0, 99), min_size=2, max_size=6), data=st.data())
def test_a_list_is_its_numbers_in_order(digits: list[int], data: st.DataObject) -> None:
    gold = " ".join(map(str, digits))
    shuffled = data.draw(st.permutations(digits))
    assert by_rules(clean(", ".join(map(str, shuffled))), gold) is (shuffled == digits)


@given(pred=st.text(max_size=40), gold=st.sampled_from(["10", "1 2 3", "B", "yes", "first", "12 cm", "x^2"]))
def test_no_text_breaks_the_rules(pred: str, gold: str) -> None:
    assert by_rules(clean(pred), gold) in (True, False, None)


@pytest.mark.parametrize(
    "text",
    [
        "1," * 40_000,
        "1,234" * 20_000 + "x",
        "\\boxed{" * 15_000,
        "answer " * 15_000,
        "$" * 50_000,
        "9" * 100_000,
        "( " * 40_000,
    ],
    ids=["commas", "thousands", "boxes", "answers", "dollars", "digits", "brackets"],
)
def test_the_rules_stay_linear_on_text_made_to_slow_them(text: str) -> None:
    started = time.process_time()
    cleaned = clean(text)
    for gold in ("10", "1 2 3", "B", "first", "12 cm"):
        by_rules(cleaned, gold)
    assert time.process_time() - started < 5  # quadratic matching would take minutes


def test_only_the_answer_tag_is_scored() -> None:
    texts = [
        "<think> so 10 . </think> <answer> 10 </answer>",
        "<think> so 10 . </think> <answer> 11 </answer>",
        "<think> so 10 . </think> 10",
        "so 10 . <answer> 10 </answer>",
        "<answer> 10 </answer> <answer> 10 </answer>",
        "<result> 10 </result>",
        "",
    ]
    gold = ["10"] * 7
    assert accuracy_reward([None] * 7, texts, gold) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert accuracy_reward([None], texts[5:6], ["10"], tags=[["work", "result"]]) == [1.0]
    assert accuracy_reward([None], [[{"role": "assistant", "content": texts[0]}]], ["10"]) == [1.0]


def test_no_gold_or_one_that_is_no_mathematics_is_not_applicable() -> None:
    text = "<answer> 10 </answer>"
    assert accuracy_reward([None] * 3, [text] * 3, [None, r"\frac{1}{", "10"]) == [None, None, 1.0]
    with pytest.raises(ValueError, match="cannot be parsed"):
        answers_equal("10", r"\frac{1}{")


def test_numbers_as_gold_are_read_as_written() -> None:
    assert accuracy_reward([None], ["<answer> 10 </answer>"], [10]) == [1.0]


@pytest.mark.parametrize(
    "gold",
    ["12", "- 3", "1/2", "1 3 4 7", "B", "yes", "first", "New York, NY", "3 cm", r"\frac{1}{2}", "2x+3", "[1,2)"],
)
def test_golds_that_can_be_scored_pass(gold: str) -> None:
    check_gold(gold)
    assert answers_equal(gold, gold)


@pytest.mark.parametrize(
    ("gold", "fault"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (r"\frac{1}{", "cannot be parsed"),
        ("$", "cannot be parsed"),
        ("((", "cannot be parsed"),
        ("!!", "cannot be parsed"),
        ("x" * (MAX_ANSWER_CHARS + 1), "longer than"),
    ],
)
def test_golds_that_cannot_be_scored_are_refused_with_the_value_and_a_way_out(gold: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        check_gold(gold)
    assert repr(gold[:200]) in str(caught.value) and "drop the row" in str(caught.value)


def test_a_gold_that_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a string, got 12"):
        check_gold(12)  # type: ignore[arg-type]


def test_an_answer_too_long_to_be_one_is_wrong() -> None:
    assert compare_answers("1 + " * 1000 + "1", "1001") is Verdict.DIFFERENT

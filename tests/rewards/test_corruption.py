"""Corruptions break the format, keep the answer, and say when they do not apply."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.config import CORRUPTIONS as CONFIGURED
from specs_fast.rewards.accuracy import answers_equal
from specs_fast.rewards.corruption import (
    CORRUPTIONS,
    NATURAL,
    applicable,
    apply,
    corrupt,
    corrupt_by_mix,
    response_parts,
)
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.format import parse_response

TAGS = ("think", "answer")
REASONING = "i see 3 7 1 4 . totals 3 10 11 15 . so 15 ."
FULL = f"<think> {REASONING} </think> <answer> 15 </answer>"
STYLES = {
    "full": FULL,
    "other_tags": f"<reason> {REASONING} </reason> <result> 15 </result>",
    "think_only": f"<think> {REASONING} </think> the answer is 15 .",
    "think_plain": f"<think> {REASONING} </think> Answer : 15",
    "answer_only": "<answer> 15 </answer>",
    "reason_answer": f"{REASONING} <answer> 15 </answer>",
    "reason_plain": f"{REASONING} the answer is 15 .",
    "reasoning": REASONING,
    "sentence": "the answer is 15 .",
    "direct": "15",
    "llm": "<think>\nWe add 3, 7, 1 and 4.\n3 + 7 + 1 + 4 = 15\n</think>\n<answer> The answer is $\\boxed{15}$</answer>",
    "llm_plain": "We add 3, 7, 1 and 4: 3 + 7 + 1 + 4 = 15. Thus, the answer is 15.",
}
WITH_REASONING = [name for name in STYLES if name not in ("answer_only", "sentence", "direct")]


def test_the_five_are_those_of_the_configuration() -> None:
    assert tuple(CORRUPTIONS) == CONFIGURED


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("drop_all", f"{REASONING} 15"),
        ("drop_answer", f"<think> {REASONING} </think> 15"),
        ("drop_reasoning", f"{REASONING} <answer> 15 </answer>"),
        ("plain_answer", f"<think> {REASONING} </think> Answer : 15"),
    ],
)
def test_what_each_writes(kind: str, expected: str) -> None:
    assert corrupt(FULL, TAGS, kind, random.Random(0)) == expected


def test_plain_answers_follow_the_punctuation_of_the_text() -> None:
    broken = corrupt("<think>We add. So 15.</think> <answer>15</answer>", TAGS, "plain_answer", random.Random(0))
    assert broken == "<think> We add. So 15. </think> Answer: 15"


def test_a_last_number_and_the_answer_do_not_run_into_each_other() -> None:
    broken = corrupt("<think>3 + 12 = 15</think> <answer>15</answer>", TAGS, "drop_all", random.Random(0))
    assert broken == "3 + 12 = 15. 15" and extract_any(broken) == "15"


def test_shift_displaces_a_boundary_in_four_ways_and_loses_no_tag() -> None:
    seen = {str(corrupt(FULL, TAGS, "shift", random.Random(seed))) for seed in range(200)}
    assert f"<think> {REASONING} <answer> 15 </answer> </think>" in seen
    assert f"<think> {REASONING} <answer> </think> 15 </answer>" in seen
    assert f"<think> {REASONING} </think> <answer> </answer> 15" in seen
    assert any(text.startswith("<think> i see 3 </think> 7 1 4 .") for text in seen)
    for text in seen:
        assert sorted(text.split()) == sorted(FULL.split())


@pytest.mark.parametrize("style", WITH_REASONING)
@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("tags", [TAGS, ("plan", "reply")])
def test_every_corruption_of_a_response_with_reasoning_breaks_the_format_and_keeps_the_answer(
    style: str, kind: str, tags: tuple[str, str]
) -> None:
    for seed in range(8):
        broken = corrupt(STYLES[style], tags, kind, random.Random(seed))
        assert broken is not None
        assert not parse_response(broken, tags).ok
        found = extract_any(broken)
        assert found is not None and answers_equal(found, "15"), broken


@pytest.mark.parametrize(
    ("style", "kinds"),
    [
        ("full", [*CORRUPTIONS]),
        ("reason_plain", [*CORRUPTIONS, NATURAL]),
        ("direct", ["drop_all", NATURAL]),
        ("sentence", ["drop_all", NATURAL]),
        ("answer_only", ["drop_all", NATURAL]),
    ],
)
def test_which_kinds_apply(style: str, kinds: list[str]) -> None:
    assert applicable(STYLES[style], TAGS) == kinds


def test_natural_keeps_a_response_that_breaks_the_format_and_refuses_one_that_does_not() -> None:
    for style, text in STYLES.items():
        expected = None if parse_response(text, TAGS).ok else text
        assert corrupt(text, TAGS, NATURAL, random.Random(0)) == expected, style
    assert corrupt(" ", TAGS, NATURAL, random.Random(0)) is None


def test_a_text_without_tags_or_answer_has_nothing_to_corrupt() -> None:
    for kind in (*CORRUPTIONS, NATURAL):
        assert corrupt("", TAGS, kind, random.Random(0)) is None
    assert corrupt("<think> </think>", TAGS, "shift", random.Random(0)) is None


def test_reasoning_is_what_stands_before_the_answer() -> None:
    assert response_parts(FULL, TAGS) == (REASONING, "15")
    assert response_parts(STYLES["reason_plain"], TAGS) == (REASONING, "15")
    assert response_parts(STYLES["reasoning"], TAGS) == (REASONING, "15")
    assert response_parts(STYLES["other_tags"], TAGS) == (REASONING, "15")
    assert response_parts("15", TAGS) is None


def test_a_mix_is_followed_among_the_kinds_that_apply() -> None:
    mix = {"drop_all": 1.0, "shift": 3.0, "plain_answer": 0.0}
    drawn = [corrupt_by_mix(FULL, TAGS, mix, random.Random(seed)) for seed in range(400)]
    counts = Counter(pair[0] for pair in drawn if pair is not None)
    assert counts.keys() == {"drop_all", "shift"} and 250 < counts["shift"] < 350
    assert corrupt_by_mix("15", TAGS, mix, random.Random(0)) == ("drop_all", "15")
    assert corrupt_by_mix("15", TAGS, {"shift": 1.0}, random.Random(0)) is None


def test_the_same_seed_gives_the_same_text() -> None:
    first = [corrupt(FULL, TAGS, "shift", random.Random(seed)) for seed in range(20)]
    assert first == [corrupt(FULL, TAGS, "shift", random.Random(seed)) for seed in range(20)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: corrupt(FULL, TAGS, "shfit", random.Random(0)),
        lambda: corrupt_by_mix(FULL, TAGS, {"shfit": 1}, random.Random(0)),
    ],
)
def test_an_unknown_kind_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match="unknown corruption 'shfit'; known: drop_all"):
        call()  # type: ignore[operator]


def test_a_corruption_that_does_not_corrupt_is_an_error() -> None:
    with pytest.raises(ValueError, match="left the format intact"):
        apply(lambda reasoning, answer, tags, rng: FULL, REASONING, "15", TAGS, random.Random(0))


WORDS = st.lists(st.sampled_from("i see 3 7 . so = + first <b> x".split()), min_size=1, max_size=12).map(" ".join)


@given(reasoning=WORDS, answer=st.sampled_from(["15", "first", "1 3 4 7", "B"]), seed=st.integers(0, 999))
def test_every_corruption_of_any_complete_response_breaks_it(reasoning: str, answer: str, seed: int) -> None:
    text = f"<think> {reasoning} </think> <answer> {answer} </answer>"
    for kind in CORRUPTIONS:
        broken = corrupt(text, TAGS, kind, random.Random(seed))
        assert broken is not None and not parse_response(broken, TAGS).ok
        if kind != "drop_all" or reasoning[-1] == ".":
            found = extract_any(broken)
            assert found is not None and answers_equal(found, answer), (kind, broken, found)

"""The format: one strict structure, any two tag names, both forms of completions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.rewards.format import check_tags, completion_text, format_reward, parse_response

LAB = "<think> i see 3 7 . 3 + 7 = 10 . so 10 . </think> <answer> 10 </answer>"
LLM = "<think>\nWe add 3 and 7.\n</think>\n\n<answer> The answer is $\\boxed{10}$</answer>\n"


def test_a_complete_response_comes_apart() -> None:
    parsed = parse_response(LAB)
    assert parsed.ok
    assert parsed.reasoning == "i see 3 7 . 3 + 7 = 10 . so 10 ." and parsed.answer == "10"
    assert parse_response(LLM).ok and parse_response(LLM).reasoning == "We add 3 and 7."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "the answer is 10 .",
        "<answer> 10 </answer>",
        "<think> so 10 . </think>",
        "<think> so 10 . </think> the answer is 10 .",
        "so 10 . <answer> 10 </answer>",
        "<answer> 10 </answer> <think> so 10 . </think>",
        "<think> so 10 . <answer> 10 </answer> </think>",
        "<think> so 10 . <answer> </think> 10 </answer>",
        "<think> so </think> 10 . <answer> 10 </answer>",
        "<think> </think> <answer> 10 </answer>",
        "<think> so 10 . </think> <answer> </answer> 10",
        "<think> so 10 . </think> <answer>  </answer>",
        "<think> so 10 . </think> <answer> 10 </answer> .",
        "well <think> so 10 . </think> <answer> 10 </answer>",
        "<think> a </think> <think> b </think> <answer> 10 </answer>",
        "<think> a </think> <answer> 9 </answer> <answer> 10 </answer>",
        "<think> so 10 . </think> <answer> 10",
        "<Think> so 10 . </Think> <answer> 10 </answer>",
        "<reason> so 10 . </reason> <result> 10 </result>",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    assert not parse_response(text).ok
    assert format_reward([None], [text]) == [0.0]


def test_parts_are_found_in_a_response_of_the_wrong_format() -> None:
    assert parse_response("so 10 . <answer> 10 </answer>").answer == "10"
    assert parse_response("so 10 . <answer> 10 </answer>").reasoning is None
    assert parse_response("<answer> 9 </answer> <answer> 10 </answer>").answer is None
    assert parse_response("</answer> 10 <answer>").answer is None


def test_the_tags_column_decides_what_is_asked() -> None:
    text = "<work> so 10 . </work> <final> 10 </final>"
    rewards = format_reward([None] * 4, [text, text, LAB, LAB], tags=[["work", "final"], None, ["work", "final"], None])
    assert rewards == [0.5, 0.0, 0.0, 0.5]


def test_strings_and_conversations_are_both_completions() -> None:
    forms = [
        LAB,
        [{"role": "assistant", "content": LAB}],
        [{"role": "assistant", "content": [{"type": "text", "text": LAB}]}],
    ]
    assert format_reward([None] * 3, forms) == [0.5, 0.5, 0.5]
    assert [completion_text(form) for form in forms] == [LAB] * 3


@pytest.mark.parametrize("completion", [3, None, [{"role": "assistant"}], ["text"], [{"content": 3}]])
def test_a_completion_of_another_type_is_an_error(completion: object) -> None:
    with pytest.raises(TypeError, match="completion"):
        completion_text(completion)


@pytest.mark.parametrize("tags", [("a",), ("a", "a"), ("a", ""), "ab", ("a", "b c"), ("a", 3), ("<a>", "b")])
def test_tags_that_are_not_two_names_are_refused(tags: object) -> None:
    with pytest.raises(ValueError, match="two different tag names"):
        check_tags(tags)  # type: ignore[arg-type]


WORDS = st.text(alphabet="ab 1\n.<>/", min_size=1, max_size=30)
NAMES = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)


@given(reasoning=WORDS, answer=WORDS, names=st.tuples(NAMES, NAMES).filter(lambda pair: pair[0] != pair[1]))
def test_what_is_written_in_the_format_is_read_back(reasoning: str, answer: str, names: tuple[str, str]) -> None:
    text = f"<{names[0]}>{reasoning}</{names[0]}> \n<{names[1]}>{answer}</{names[1]}>"
    parsed = parse_response(text, names)
    inside = reasoning + answer
    if any(f"<{slash}{name}>" in inside for slash in ("", "/") for name in names):
        return
    assert parsed.ok == bool(reasoning.strip() and answer.strip())
    if parsed.ok:
        assert (parsed.reasoning, parsed.answer) == (reasoning.strip(), answer.strip())


@given(st.text(alphabet="<>/thinkaswer 1", max_size=80))
def test_any_text_is_read_without_an_error(text: str) -> None:
    parsed = parse_response(text)
    assert not parsed.ok or (parsed.reasoning and parsed.answer)

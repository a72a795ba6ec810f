"""The last answer in any style, and where it is stated."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.rewards.accuracy import answers_equal
from specs_fast.rewards.extract import extract_any, find_answer

REASONING = "i see 3 7 1 4 . totals 3 10 11 15 . so 15 ."


@pytest.mark.parametrize(
    "text",
    [
        f"<think> {REASONING} </think> <answer> 15 </answer>",
        "<think> i see 3 7 1 4 . </think> <answer> 15 </answer>",
        f"<reason> {REASONING} </reason> <result> 15 </result>",
        f"<work> {REASONING} </work> <reply> 15 </reply>",
        f"<alpha> {REASONING} </alpha> <beta> 15 </beta>",
        f"<think> {REASONING} </think> the answer is 15 .",
        f"<think> {REASONING} </think> Answer : 15",
        f"<think> {REASONING} </think> 15",
        f"<think> {REASONING} </think>",
        "<answer> 15 </answer>",
        "<answer> 15",
        f"{REASONING} <answer> 15 </answer>",
        f"{REASONING} the answer is 15 .",
        REASONING,
        "the answer is 15 .",
        "so 15 .",
        "15",
        "15 .",
        # displaced tags
        f"<think> {REASONING} <answer> 15 </answer> </think>",
        f"<think> {REASONING} <answer> </think> 15 </answer>",
        f"<think> {REASONING} </think> <answer> </answer> 15",
        "<think> i see 3 7 </think> 1 4 . so 15 . <answer> 15 </answer>",
        # an answer that changes: the last one counts
        "<answer> 3 </answer> no , <answer> 15 </answer>",
        "the answer is 3 . wait , the answer is 15 .",
        "<answer> 3 </answer> no , the answer is 15 .",
        # tags with their names swapped
        f"<result> {REASONING} </result> <reason> 15 </reason>".replace("reason", "work"),
        "<reply> i see 3 7 1 4 . </reply> <plan> 15 </plan>",
        "<answer> 15 </answer> <think> since 3 + 12 is what i see twice </think>",
        "<answer> 15 </answer> I hope that this answer is of some use to you and your 3 friends.",
        # language models
        "Thus, the answer is 15.",
        "We add them up. The total is $15$.",
        "Thus 3 + 12 = 15.",
        "Thus the total is $\\boxed{15}$ apples.",
        "So there are 15 apples in the picture.",
        "**Final Answer:** 15\n\nI hope this answer is correct!",
        "Step 1: add 3.\nStep 2: add 12.\n\nFinal Answer: The answer is $15$. I hope it is right.",
        "<think>\n3 + 12\n</think>\n\n<answer> The answer is $\\boxed{15}$</answer>",
        "<answer>3 + 12 = 15</answer>",
        "<answer> we add them . so 15 . </answer> thanks for the 2 questions",
        "The result is 15, which is what was asked for.",
    ],
)
def test_fifteen_is_found(text: str) -> None:
    found = extract_any(text)
    assert found is not None and answers_equal(found, "15"), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 1 3 4 7 .", "1 3 4 7"),
        ("The sorted list is 1, 3, 4, 7.", "1, 3, 4, 7"),
        ("first 3 last 4 . so last .", "last"),
        ("first 3 last 4 . so last . the answer is last .", "last"),
        ("the largest is 9 at position 2 . so 2 .", "2"),
        ("larger than 5 : none . so 0 .", "0"),
        ("5 - 9 = -4 .", "-4"),
        ("Therefore, the capital is Paris.", "Paris"),
        ("The correct option is (B).", "(B)"),
        ("It is 1,234.5 km away.", "1,234.5"),
        ("We get x = 3.5. So 3.5 meters.", "3.5"),
        ("Yes.", "Yes"),
        ("Thus $\\frac{1}{2}$ of it.", "\\frac{1}{2}"),
        ("no number in this last sentence of many words , but 7 before . it ends here and now for good", "7"),
    ],
)
def test_other_kinds_of_answers(text: str, expected: str) -> None:
    assert extract_any(text) == expected


@pytest.mark.parametrize(
    "text", ["", " . ", "<think> </think>", "<answer> </answer>", "what is it that you would like to know"]
)
def test_no_answer_is_none(text: str) -> None:
    assert extract_any(text) is None and find_answer(text) is None


@given(st.text(alphabet="<>/answer think is so 0123456789.,=$\\boxed{}\n", max_size=120))
def test_any_text_is_read_and_the_place_is_inside_it(text: str) -> None:
    found = find_answer(text)
    assert found is None or (found.value and 0 <= found.start < found.end <= len(text))


@pytest.mark.parametrize(
    "text",
    ["1,234" * 20_000 + "x", "1 " * 50_000 + "x", "<answer>" * 12_000, "<a></a>" * 15_000, "\\boxed{" * 15_000,
     "the answer is " * 7_000, "$" * 100_000, "so " * 30_000, ". " * 50_000],
    ids=["thousands", "numbers", "openings", "pairs", "boxes", "answers", "dollars", "conclusions", "stops"],
)  # fmt: skip
def test_extraction_stays_linear_on_text_made_to_slow_it(text: str) -> None:
    started = time.process_time()
    extract_any(text)
    assert time.process_time() - started < 5

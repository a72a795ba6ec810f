"""How the base talks: one worked solution in many styles, with the mistakes a sampled model makes.

The base is pre-trained on these, so its samples answer in mixed styles, in the asked format in well under half of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specs_fast.lab.questions import ASKED_TAGS, OTHER_TAGS, Question, write_reasoning

STYLES: dict[str, float] = {
    "full": 0.22,  # <think> i see .. so 15 . </think> <answer> 15 </answer>
    "brief": 0.04,  # <think> i see .. . </think> <answer> 15 </answer>
    "other_tags": 0.04,  # full, in tags that were not asked for
    "think_only": 0.03,  # <think> .. </think> the answer is 15 .
    "think_plain": 0.03,  # <think> .. </think> Answer : 15
    "answer_only": 0.06,  # <answer> 15 </answer>
    "reason_answer": 0.04,  # i see .. so 15 . <answer> 15 </answer>
    "reason_plain": 0.12,  # i see .. so 15 . the answer is 15 .
    "sentence": 0.38,  # the answer is 15 .
    "direct": 0.04,  # 15
}
"""Style -> share of the base's pre-training responses. ``full`` and ``brief`` follow the asked format."""
FOLLOWING = ("full", "brief")
READING = ("full", "brief", "other_tags", "think_only", "think_plain", "reason_answer", "reason_plain")


@dataclass(frozen=True)
class Mistakes:
    """Shares of reasoning responses with a mistake: a digit misread, a slip in the last step, an answer that differs from
    the conclusion."""

    misread: float = 0.04
    slip: float = 0.05
    contradict: float = 0.06


NO_MISTAKES = Mistakes(0.0, 0.0, 0.0)


def wrong(answer: str, rng: np.random.Generator) -> str:
    """A near miss of this answer."""
    if answer in ("first", "last"):
        return "last" if answer == "first" else "first"
    return str(max(0, int(answer) + int(rng.choice([-2, -1, 1, 2])))) if int(answer) else "1"


def write_response(question: Question, style: str, rng: np.random.Generator, mistakes: Mistakes = NO_MISTAKES) -> str:
    """The response text of a style, words separated by single spaces.

    Raises ValueError for an unknown style.
    """
    digits = list(question.digits)
    if style in READING and rng.random() < mistakes.misread:
        digits[int(rng.integers(len(digits)))] = int(rng.integers(10))
    steps, result = question.seen_as(digits).solve()
    if style in READING and rng.random() < mistakes.slip:
        result = wrong(result, rng)
    answer = wrong(result, rng) if style in READING and rng.random() < mistakes.contradict else result
    reasoning = write_reasoning(digits, steps, result)
    first, second = question.tags
    if style == "other_tags":
        others = [pair for pair in (ASKED_TAGS, *OTHER_TAGS) if pair != question.tags]
        first, second = others[int(rng.integers(len(others)))]
    thought, tagged = f"<{first}> {reasoning} </{first}>", f"<{second}> {answer} </{second}>"
    if style in ("full", "other_tags"):
        return f"{thought} {tagged}"
    if style == "brief":
        reading = " ".join(str(digit) for digit in digits)
        return f"<{first}> i see {reading} . </{first}> {tagged}"
    if style == "think_only":
        return f"{thought} the answer is {answer} ."
    if style == "think_plain":
        return f"{thought} Answer : {answer}"
    if style == "answer_only":
        return tagged
    if style == "reason_answer":
        return f"{reasoning} {tagged}"
    if style == "reason_plain":
        return f"{reasoning} the answer is {answer} ."
    if style == "sentence":
        return f"the answer is {answer} ."
    if style == "direct":
        return answer
    raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def draw_style(rng: np.random.Generator, styles: dict[str, float]) -> str:
    """A style drawn with these shares (normalised)."""
    shares = np.array(list(styles.values()))
    return list(styles)[int(rng.choice(len(shares), p=shares / shares.sum()))]

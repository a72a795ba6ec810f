"""Does the reasoning support the answer? Metis-SPECS asks a large model; here a rule does, or any callable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from specs_fast.rewards.accuracy import Verdict, compare_answers
from specs_fast.rewards.extract import extract_any
from specs_fast.rewards.imports import import_function

Judge = Callable[[str, str], bool]
"""``judge(reasoning, answer) -> bool``: the contents of the two tags, and whether the first supports the second."""

_EQUATION = re.compile(r"(?<!\d)\d++(?:\s*+[-+*]\s*+\d++)++\s*+=\s*+-?\s*+\d++(?![.,/]?\d)", re.ASCII)
MAX_DIGITS = 18


def rule_judge(reasoning: str, answer: str) -> bool:
    """True when the reasoning concludes with the answer and every sum it writes out in whole numbers holds.

    The conclusion is the last answer in the reasoning by `extract_any`; reasoning without one supports nothing. Only
    equations of whole numbers with +, - and * that stand by themselves are recalculated. A misread premise, or two
    mistakes that cancel out, are beyond a rule.
    """
    conclusion = extract_any(reasoning)
    if conclusion is None or not answer.strip():
        return False
    return not false_equations(reasoning) and compare_answers(conclusion, answer) is Verdict.EQUAL


def false_equations(reasoning: str) -> list[str]:
    """Every equation of whole numbers with +, - and * that does not hold, as written."""
    wrong = []
    for match in _EQUATION.finditer(reasoning):
        if not _stands_alone(reasoning, match.start(), match.end()):
            continue
        left, _, right = match[0].replace(" ", "").partition("=")
        if max(map(len, re.findall(r"\d+", match[0]))) <= MAX_DIGITS and _value(left) != int("".join(right.split())):
            wrong.append(match[0])
    return wrong


def load_judge(name: str) -> Judge:
    """The judge called ``rule``, or a function by import path ``package.module:function``.

    What a user's judge returns is checked at every call: TypeError naming the judge unless it is True or False.
    ValueError for a name that cannot be imported.
    """
    if name == "rule":
        return rule_judge
    function = import_function(name, "judge")

    def judge(reasoning: str, answer: str) -> bool:
        verdict: Any = function(reasoning, answer)
        if not isinstance(verdict, bool):
            raise TypeError(f"judge {name!r} returned {verdict!r} for answer {answer!r}; it must return True or False")
        return verdict

    return judge


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the equation is no part of a longer expression: nothing is computed with its left or right end."""
    before, after = text[:start].rstrip(" "), text[end:].lstrip(" ")
    touching = text[start - 1 : start]
    if touching.isalpha() or touching in ("_", "."):
        return False
    return not (before[-1:].isdigit() or before[-1:] in tuple("+-*/^=()\\")) and after[:1] not in tuple("+-*/^=(\\!%")


def _value(expression: str) -> int:
    """Value of whole numbers joined by +, - and *."""
    total = 0
    for sign, product in re.findall(r"([-+]?)((?:\d+\*)*\d+)", "".join(expression.split())):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total

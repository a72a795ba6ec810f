"""Is the answer right: exact rules first, math-verify in a bounded worker for what they cannot read.

The rules, in order, by the form of the *gold* answer: equal text; number; list of numbers; choice letter; yes/no and
true/false; words; quantity with unit. Each decides for good where it applies, and none of them guesses: an answer that
names several candidates is wrong. Words are compared as words; whether two phrases mean the same is a judge's work and
needs a reward function of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from specs_fast.data.types import Prompt
from specs_fast.rewards.format import _tags_of, completion_text, parse_response
from specs_fast.rewards.normalise import NUMBER_RUN, clean, number, number_list, same_number
from specs_fast.rewards.verify import Verdict, Verifier, shared_verifier

ACCURACY_REWARD = 1.0
"""What a right answer earns (Metis-SPECS, arXiv 2510.25801)."""
MAX_ANSWER_CHARS = 2000
"""A longer answer is wrong: it is no answer, and no parser should have to read it."""

_YES_NO = ({"yes", "no"}, {"true", "false"})
_GOLD_LETTER = re.compile(r"\(?\s*([A-Ja-j])\s*\)?")
_LEADING_LETTER = re.compile(r"\(?\s*([A-Ja-j])(?:\s*[.):,](.*))?", re.DOTALL)
_LISTED_LETTER = re.compile(r"(?<![\w'\\])([A-Ja-j])\s*[.):,]|\b(?:or|and)\s+\(?([A-Ja-j])(?![\w'])")
_NAMED_LETTER = re.compile(r"\b(?:option|choice)\s*\(?([A-Ja-j])\b", re.IGNORECASE)
_LONE_CAPITAL = re.compile(r"(?<![\w'\\])([A-J])(?![\w'])")
_ARTICLES = {"a", "an", "the"}
_MATHS = re.compile(r"[\\^_=<>{}$*+|~/]|\d\s*[-(]|[-(]\s*\d|\b\d+[A-Za-z]\b|\d\s*!")
_LONG_WORD = re.compile(r"[^\W\d_]{2,}")
_PLAIN_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:[.,/]\d+)*(?![\w/])", re.ASCII)
_QUANTITY = re.compile(r"([+-]?\d+(?:[.,]\d+)*)\s+([^\W\d_][^\d]*)", re.ASCII)


def accuracy_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    tags: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the content of the answer tag equals the gold ``answer``, else 0; None where there is no gold to score by.

    Only the answer tag counts, wherever it stands: a right answer outside it, or in two of them, earns nothing. An item
    that hangs or breaks the parser earns 0, alone; ``log_metric`` (TRL's) receives the number of these as
    ``verify/timeouts`` and ``verify/failures``. None: the gold is None, or no mathematics (`check_gold` refuses it at
    load time).
    """
    rewards: list[float | None] = []
    given_up = {Verdict.TIMEOUT: 0, Verdict.FAILED: 0}
    for index, completion in enumerate(completions):
        if answer[index] is None:
            rewards.append(None)
            continue
        found = parse_response(completion_text(completion), _tags_of(tags, index)).answer
        verdict = Verdict.DIFFERENT if found is None else compare_answers(found, str(answer[index]))
        if verdict in given_up:
            given_up[verdict] += 1
        scorable = verdict is not Verdict.GOLD_UNPARSABLE
        rewards.append((ACCURACY_REWARD if verdict is Verdict.EQUAL else 0.0) if scorable else None)
    if log_metric is not None:
        log_metric("verify/timeouts", float(given_up[Verdict.TIMEOUT]))
        log_metric("verify/failures", float(given_up[Verdict.FAILED]))
    return rewards


def answers_equal(pred: str, gold: str) -> bool:
    """Whether ``pred`` states the answer ``gold``; see the module for the rules. A timed-out comparison is False.

    ValueError for a gold answer that cannot be parsed.
    """
    verdict = compare_answers(pred, gold)
    if verdict is Verdict.GOLD_UNPARSABLE:
        raise ValueError(_gold_message(gold, "cannot be parsed"))
    return verdict is Verdict.EQUAL


def compare_answers(pred: str, gold: str, verifier: Verifier | None = None) -> Verdict:
    """`answers_equal` with what became of the comparison. verifier: None for the program's shared one."""
    if len(pred) > MAX_ANSWER_CHARS:
        return Verdict.DIFFERENT
    pred, gold = clean(pred), clean(gold)
    decided = by_rules(pred, gold)
    if decided is not None:
        return Verdict.EQUAL if decided else Verdict.DIFFERENT
    if verifier is not None:
        return verifier.compare(pred, gold)
    return _compare_once(pred, gold)


def check_gold(answer: str) -> None:
    """ValueError, with what to do, for a gold answer that no rule and not math-verify can read. Call it at load time."""
    if not isinstance(answer, str):
        raise ValueError(f"the gold answer must be a string, got {answer!r}; write it in quotes")
    gold = clean(answer)
    if not gold:
        raise ValueError(_gold_message(answer, "is empty"))
    if len(answer) > MAX_ANSWER_CHARS:
        raise ValueError(_gold_message(answer, f"is longer than {MAX_ANSWER_CHARS} characters"))
    if _form(gold) != "maths":
        return
    verdict = shared_verifier().can_parse(gold)
    if verdict is Verdict.TIMEOUT:
        raise ValueError(_gold_message(answer, "takes too long to parse"))
    if verdict is not Verdict.EQUAL:
        raise ValueError(_gold_message(answer, "cannot be parsed"))


def check_answer(prompt: Prompt) -> None:
    """ValueError naming the row unless the prompt has a gold answer, a text or a number, that can be scored."""
    gold = prompt.columns.get("answer")
    if gold is None:
        raise ValueError(
            f"{prompt.source}: column 'answer' is missing; rewards, pairs and evaluation need the gold answer"
        )
    if not isinstance(gold, str | int | float):
        raise ValueError(
            f"{prompt.source}: the gold answer must be a text or a number, got {gold!r}; write it in quotes"
        )
    try:
        check_gold(str(gold))
    except ValueError as error:
        raise ValueError(f"{prompt.source}: {error}") from None


def by_rules(pred: str, gold: str) -> bool | None:
    """The decision of the rules on two cleaned answers, None where only math-verify can tell."""
    if not pred:
        return False
    if pred.casefold() == gold.casefold():
        return True
    form = _form(gold)
    if form == "number":
        return _equals_number(pred, gold)
    if form == "list":
        return _equals_list(pred, gold)
    if form == "letter":
        return _stated_letter(pred) == gold.strip("() ").upper()
    if form == "yes_no":
        return _stated_yes_no(pred, gold.casefold())
    if form == "quantity":
        return _equals_quantity(pred, gold)
    if form == "words":
        return _words(pred) == _words(gold)
    return None


def _form(gold: str) -> str:
    if number(gold) is not None:
        return "number"
    if number_list(gold) is not None:
        return "list"
    if _GOLD_LETTER.fullmatch(gold):
        return "letter"
    if any(gold.casefold() in family for family in _YES_NO):
        return "yes_no"
    if _MATHS.search(gold):
        return "maths"
    if _QUANTITY.fullmatch(gold):
        return "quantity"
    return "words" if _LONG_WORD.search(gold) else "maths"


def _equals_number(pred: str, gold: str) -> bool | None:
    wanted = number(gold)
    assert wanted is not None
    if "=" in pred:
        pred = clean(pred.rpartition("=")[2])
    found = number(pred)
    if found is not None:
        return same_number(found, wanted)
    if number_list(pred) is not None:
        return False
    if not _MATHS.search(pred) and "%" not in pred:
        # Words around numbers: one number is the answer, several are a guess.
        named = [number(text) for text in _PLAIN_NUMBER.findall(pred)]
        return len(named) == 1 and named[0] is not None and same_number(named[0], wanted)
    return None


def _equals_list(pred: str, gold: str) -> bool | None:
    wanted, found = number_list(gold), number_list(clean(pred.rpartition("=")[2]) if "=" in pred else pred)
    assert wanted is not None
    if found is None:
        if _MATHS.search(pred):
            return None
        runs = NUMBER_RUN.findall(pred)  # words around one list
        found = number_list(runs[0]) if len(runs) == 1 else None
    if found is None:
        return False
    if len(found.items) != len(wanted.items):
        return False
    brackets = {found.bracket, wanted.bracket} - {""}
    if len(brackets) > 1:
        return None  # (1, 2) and [1, 2] may be intervals
    if brackets == {"{"}:
        return {item.value for item in found.items} == {item.value for item in wanted.items}
    return all(same_number(a, b) for a, b in zip(found.items, wanted.items, strict=True))


def _stated_letter(pred: str) -> str | None:
    """The one choice letter that the answer commits to."""
    if match := _LEADING_LETTER.fullmatch(pred):
        others = {a or b for a, b in _LISTED_LETTER.findall(match[2] or "")}
        return match[1].upper() if {letter.upper() for letter in others} <= {match[1].upper()} else None
    letters = {letter.upper() for letter in _NAMED_LETTER.findall(pred)}
    if not letters:
        text = re.sub(r"\bA\s(?!or\b|and\b)(?=[a-z])", "", pred)  # the article
        letters = set(_LONE_CAPITAL.findall(text))
    return letters.pop() if len(letters) == 1 else None


def _stated_yes_no(pred: str, gold: str) -> bool:
    family = next(family for family in _YES_NO if gold in family)
    return set(re.findall(r"[a-z]+", pred.casefold())) & family == {gold}


def _equals_quantity(pred: str, gold: str) -> bool | None:
    wanted = _QUANTITY.fullmatch(gold)
    assert wanted is not None
    value = number(wanted[1])
    pred = pred.replace("$", "")
    found = number(pred)
    if found is None and (match := _QUANTITY.fullmatch(pred)):
        found = number(match[1]) if _words(match[2]) == _words(wanted[2]) else None
    return found is not None and value is not None and same_number(found, value)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _ARTICLES]


@lru_cache(maxsize=65_536)
def _compare_once(pred: str, gold: str) -> Verdict:
    return shared_verifier().compare(pred, gold)


def _gold_message(gold: str, fault: str) -> str:
    return (
        f"the gold answer {gold[:200]!r} {fault}; write a number, a list such as '1 3 4 7', a choice letter, yes or no, "
        "plain words, or LaTeX that math-verify reads, or drop the row"
    )

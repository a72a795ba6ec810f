"""Format corruptions: a correct response made to break the format it should have, its answer kept.

The rejected side of a SPECS pair (arXiv 2510.25801) is a correct response of the base model whose form is polluted in
one of five ways. Secondary sources name them: remove all tags, those of the answer, those of the reasoning, replace the
answer tags by plain text, displace tags; the exact rule of the last and the mix are not published, ours are below.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from specs_fast.rewards.extract import TAG, find_answer
from specs_fast.rewards.format import check_tags, parse_response
from specs_fast.rewards.normalise import clean

Corruption = Callable[[str, str, tuple[str, str], random.Random], str]
"""``fn(reasoning, answer, tags, rng) -> text``."""

NATURAL = "natural"
"""Not a corruption: the response broke the format by itself and is kept as it is."""

_SPACED_PUNCTUATION = re.compile(r"\s[.,:;](?:\s|$)")


def drop_all(reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """Reasoning and answer, no tags."""
    return f"{_sentence(reasoning)} {answer}"


def drop_answer(reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """The reasoning in its tags, the answer without."""
    return f"<{tags[0]}> {reasoning} </{tags[0]}> {answer}"


def drop_reasoning(reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """The reasoning without tags, the answer in its own."""
    return f"{reasoning} <{tags[1]}> {answer} </{tags[1]}>"


def plain_answer(reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """``Answer: 12`` in place of the answer tags (``Answer : 12`` where the text spaces its punctuation)."""
    label = "Answer :" if _SPACED_PUNCTUATION.search(reasoning) else "Answer:"
    return f"<{tags[0]}> {reasoning} </{tags[0]}> {label} {answer}"


def shift(reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """All four tags, one boundary displaced: one of four ways, drawn.

    The reasoning closes early (at a word within it), or not before the whole answer has ended, or only inside the answer;
    or the answer tags close before the answer.
    """
    first, second = tags
    opening, closing = f"<{first}>", f"</{first}>"
    words = reasoning.split(" ")
    cut = rng.randrange(1, len(words)) if len(words) > 1 else 1
    early, late = " ".join(words[:cut]), " ".join(words[cut:])
    ways = [
        f"{opening} {reasoning} <{second}> {answer} </{second}> {closing}",
        f"{opening} {reasoning} <{second}> {closing} {answer} </{second}>",
        f"{opening} {reasoning} {closing} <{second}> </{second}> {answer}",
    ]
    if late.strip():
        ways.append(f"{opening} {early} {closing} {late} <{second}> {answer} </{second}>")
    return rng.choice(ways)


CORRUPTIONS: dict[str, Corruption] = {
    "drop_all": drop_all,
    "drop_answer": drop_answer,
    "drop_reasoning": drop_reasoning,
    "plain_answer": plain_answer,
    "shift": shift,
}
"""The five, by the names that the configuration uses."""


def corrupt(text: str, tags: Sequence[str], kind: str, rng: random.Random) -> str | None:
    """``text`` with its format broken in the way of ``kind``; None where that way does not apply to it.

    What is done, by what the text is (``parse_response`` says whether it keeps the format of ``tags``):

    - it keeps the format: the corruption of its reasoning and answer. ``natural`` does not apply.
    - it breaks the format: ``natural`` returns it as it is. A corruption is given the parts of `response_parts`, and the
      asked tags are written where the corruption leaves tags; it does not apply where there is no reasoning to part from
      the answer. Except ``drop_all``: it removes the tags of whatever states an answer, and so leaves a text without any
      as it is.

    The result always breaks the format (ValueError if it should not) and, as the corruptions move or remove tags only,
    states the same answer. ValueError for an unknown kind.
    """
    names = check_tags(tags)
    if kind != NATURAL and kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(CORRUPTIONS)}, {NATURAL}")
    complete = parse_response(text, names).ok
    if kind == NATURAL:
        return None if complete or not text.strip() else text
    if kind == "drop_all" and not TAG.search(text):
        return text if text.strip() else None
    parts = response_parts(text, names)
    if parts is None:
        return (_untagged(text) if find_answer(text) is not None else None) if kind == "drop_all" else None
    return apply(CORRUPTIONS[kind], *parts, names, rng)


def apply(corruption: Corruption, reasoning: str, answer: str, tags: tuple[str, str], rng: random.Random) -> str:
    """The corruption's text, held to its promise: ValueError if it follows the format after all."""
    broken = corruption(reasoning, answer, tags, rng)
    if parse_response(broken, tags).ok:
        raise ValueError(
            f"corruption {getattr(corruption, '__name__', corruption)!r} left the format intact: {broken!r}"
        )
    return broken


def response_parts(text: str, tags: Sequence[str]) -> tuple[str, str] | None:
    """(reasoning, answer) of a response in any style; None where it has no reasoning besides its answer, or no answer.

    In the asked format: the contents of the tags. Otherwise the answer is what `find_answer` finds, and the reasoning is
    the text before that statement (all of the text where the answer is read off the last sentence), without tags.
    """
    parsed = parse_response(text, tags)
    if parsed.ok:
        return str(parsed.reasoning), str(parsed.answer)
    found = find_answer(text)
    if found is None:
        return None
    reasoning = _untagged(text[: found.start] if found.explicit else text)
    if not reasoning or clean(reasoning) == found.value:
        return None
    return reasoning, found.value


def applicable(text: str, tags: Sequence[str]) -> list[str]:
    """The kinds, ``natural`` included, that `corrupt` can apply to this response."""
    kinds = [*CORRUPTIONS, NATURAL]
    return [kind for kind in kinds if corrupt(text, tags, kind, random.Random(0)) is not None]


def corrupt_by_mix(
    text: str, tags: Sequence[str], mix: Mapping[str, float], rng: random.Random
) -> tuple[str, str] | None:
    """(kind, corrupted text) with the kind drawn by weight among those of ``mix`` that apply; None where none does.

    mix: kind -> weight, relative. ValueError for an unknown kind.
    """
    unknown = sorted(set(mix) - {*CORRUPTIONS, NATURAL})
    if unknown:
        raise ValueError(f"unknown corruption {unknown[0]!r}; known: {', '.join(CORRUPTIONS)}, {NATURAL}")
    kinds = [kind for kind in applicable(text, tags) if mix.get(kind, 0.0) > 0]
    if not kinds:
        return None
    kind = rng.choices(kinds, [mix[name] for name in kinds])[0]
    broken = corrupt(text, tags, kind, rng)
    return None if broken is None else (kind, broken)


def _untagged(text: str) -> str:
    return re.sub(r" {2,}", " ", TAG.sub(" ", text)).strip()


def _sentence(text: str) -> str:
    """The text with a full stop, so that what follows it does not run into its last number."""
    if text.endswith((".", "!", "?", ":", "$", "]", ")")):
        return text
    return f"{text} ." if _SPACED_PUNCTUATION.search(text) else f"{text}."

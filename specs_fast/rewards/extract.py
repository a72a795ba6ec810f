"""The last answer of a response, whatever style it was written in.

Used where form must not matter: the correctness of both sides of a preference pair, and the evaluation's
format-independent accuracy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specs_fast.rewards.normalise import NUMBER_RUN, boxed, clean, last_marker, number, number_list

# Names that say what a pair of tags holds. Of two pairs with other names, the one that opens last holds the answer.
ANSWER_NAMES = {
    "answer",
    "ans",
    "final",
    "final_answer",
    "result",
    "reply",
    "response",
    "solution",
    "output",
    "conclusion",
}
REASONING_NAMES = {
    "think",
    "thinking",
    "thought",
    "thoughts",
    "reason",
    "reasoning",
    "rationale",
    "analysis",
    "scratchpad",
}
TAG = re.compile(r"<(/?)([A-Za-z_][\w-]{0,31})>")

_SENTENCE_END = re.compile(r"\s[.!?;](?=\s|$)|[.!?;](?=\s|$)|\n")
_CONCLUSION = re.compile(
    r"(?:(?:and|so|thus|hence|therefore|then|finally|that is|it is|this is|which is|is)\b|[,:*\s])+", re.I
)
_MATHS_SPAN = re.compile(r"\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)")
MAX_WORDS = 4


@dataclass(frozen=True)
class Found:
    """An answer and where it is stated: ``text[start:end]`` is the statement, markers and tags included.

    explicit: it is marked as the answer (tags, a box, "the answer is"), not read off the last sentence.
    """

    value: str
    start: int
    end: int
    explicit: bool


def extract_any(text: str) -> str | None:
    r"""The last answer that a response gives, in any style; None where there is none.

    The first of these that is there: the last non-blank pair of answer tags (of any name; an unclosed one counts to the
    end), unless "the answer is" corrects it afterwards; the last ``\boxed{}``; what follows the last "answer is" or
    "answer:"; the last sentence (after "=" or "so", its last number or list of numbers, or the whole of it when it is
    four words or fewer); the last number anywhere.
    """
    found = find_answer(text)
    return None if found is None else found.value


def find_answer(text: str) -> Found | None:
    """`extract_any` with the place of the statement."""
    plain = without_tags(text)  # as long as the text, so that positions carry over
    tagged = _tagged(text)
    if tagged is not None:
        # "I hope this answer is of use to you" after the tags is no answer; a short statement is a correction.
        later = _marked(plain, tagged.end)
        return later if later is not None and len(later.value.split()) <= MAX_WORDS else tagged
    content = boxed(plain)
    if content is not None:
        start = max(plain.rfind(r"\boxed"), plain.rfind(r"\fbox"))
        return Found(clean(content), start, len(plain), True)
    return _marked(plain, 0) or _from_last_sentence(plain)


def without_tags(text: str) -> str:
    """The text with every tag replaced by as many spaces (line breaks where a sentence may end there)."""
    return TAG.sub(lambda match: "\n" + " " * (len(match[0]) - 1), text)


def tag_pairs(text: str) -> list[tuple[str, int, int, int, int]]:
    """(name, start, content start, content end, end) of every pair of tags, in order of opening; pairs may overlap."""
    opened: dict[str, re.Match[str]] = {}
    pairs = []
    for match in TAG.finditer(text):
        name = match[2].lower()
        if not match[1]:
            opened[name] = match
        elif name in opened:
            opening = opened.pop(name)
            pairs.append((name, opening.start(), opening.end(), match.start(), match.end()))
    for name, opening in opened.items():
        if name in ANSWER_NAMES:
            pairs.append((name, opening.start(), opening.end(), len(text), len(text)))
    return sorted(pairs, key=lambda pair: pair[1])


def _marked(plain: str, after: int) -> Found | None:
    """What follows the last "answer is" or "answer:" at or behind a position, to the end of its sentence."""
    marker = last_marker(plain)
    if marker is None or marker.start() < after:
        return None
    end = _sentence_end(plain, marker.end())
    value = clean(plain[marker.end() : end])
    return Found(value, max(after, _phrase_start(plain, marker.start())), end, True) if value else None


def _tagged(text: str) -> Found | None:
    """The content of the last non-blank answer tags: those of an answer's name, and those that open last of several."""
    pairs = tag_pairs(text)
    several = len({pair[0] for pair in pairs}) > 1
    last = pairs[-1:] if several and pairs[-1][0] not in REASONING_NAMES else []
    for _, start, content_start, content_end, end in reversed([p for p in pairs if p[0] in ANSWER_NAMES or p in last]):
        value = _from_content(without_tags(text[content_start:content_end]))
        if value:
            return Found(value, start, end, True)
    return None


def _from_content(content: str) -> str:
    """The answer that the content of an answer tag states: all of it, or its last sentence's where it has several."""
    if boxed(content) is None and last_marker(content) is None and len(_sentences(content)) > 1:
        found = _from_last_sentence(content)
        return "" if found is None else found.value
    return clean(content)


def _from_last_sentence(text: str) -> Found | None:
    sentences = _sentences(text)
    if not sentences:
        return None
    start, end = sentences[-1]
    value = _conclusion(text[start:end])
    if value is None:
        for run in reversed(list(NUMBER_RUN.finditer(text))):
            return Found(run[0], run.start(), run.end(), False)
        return None
    return Found(value, start, end, False)


def _conclusion(sentence: str) -> str | None:
    """What the last sentence of a response comes to."""
    sentence = clean(sentence)
    if "=" in sentence and clean(sentence.rpartition("=")[2]):
        sentence = clean(sentence.rpartition("=")[2])
    lead = _CONCLUSION.match(sentence)
    rest = sentence[lead.end() :] if lead else sentence
    if not rest:
        return None
    if number(rest) is not None or number_list(rest) is not None:
        return rest
    spans = [a or b for a, b in _MATHS_SPAN.findall(rest)]
    if spans:
        return clean(spans[-1])
    runs = NUMBER_RUN.findall(rest)
    if runs:
        return str(runs[-1])
    tail = rest.rpartition(" is ")[2].rpartition(" so ")[2]
    return tail if len(tail.split()) <= MAX_WORDS else None


def _sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence that says something."""
    spans = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        spans.append((start, match.start()))
        start = match.end()
    spans.append((start, len(text)))
    return [(a, b) for a, b in spans if re.search(r"\w", text[a:b])]


def _sentence_end(text: str, start: int) -> int:
    match = _SENTENCE_END.search(text, start)
    return len(text) if match is None else match.start()


def _phrase_start(text: str, marker: int) -> int:
    """Where the sentence begins that holds the marker."""
    before = [match.end() for match in _SENTENCE_END.finditer(text, 0, marker)]
    return before[-1] if before else 0

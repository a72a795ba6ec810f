"""The response format: reasoning in one tag, then the answer in another, nothing else.

Reward functions have TRL's signature, ``reward(prompts, completions, **columns) -> list[float | None]``: completions are
strings or conversations (lists of messages), columns are lists with one entry per completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from specs_fast.data.types import DEFAULT_TAGS

FORMAT_REWARD = 0.5
"""What a response of the right format earns (Metis-SPECS, arXiv 2510.25801: 0.5 beside 1.0 for accuracy)."""


@dataclass(frozen=True)
class Parsed:
    """A response taken apart.

    reasoning, answer: content of the tag, stripped, where the tag occurs exactly once and closes; else None. They are
        filled in as far as they can be even when the format as a whole is wrong.
    ok: the response is exactly ``<reasoning tag> text </...> <answer tag> text </...>``: each of the four tags once, in
        this order, both contents not blank, and only whitespace outside.
    """

    reasoning: str | None
    answer: str | None
    ok: bool


def parse_response(text: str, tags: Sequence[str] = DEFAULT_TAGS) -> Parsed:
    """Take a response apart by the names of its reasoning and answer tag; tag names are matched as written.

    Stricter than MM-EUREKA's reward, which tolerates text around the tags. ValueError for tags that are not two different
    names.
    """
    reasoning_tag, answer_tag = check_tags(tags)
    reasoning = _content(text, reasoning_tag)
    answer = _content(text, answer_tag)
    ok = bool(reasoning) and bool(answer) and _structure(reasoning_tag, answer_tag).fullmatch(text) is not None
    return Parsed(reasoning, answer, ok)


def format_reward(
    prompts: Sequence[Any], completions: Sequence[Any], tags: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    """0.5 for a response in the right format, else 0.

    ``tags`` holds the two tag names each prompt asks for; without the column, or for an entry of None, they are
    ``think`` and ``answer``.
    """
    return [
        FORMAT_REWARD if parse_response(completion_text(completion), _tags_of(tags, index)).ok else 0.0
        for index, completion in enumerate(completions)
    ]


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a conversation whose contents are strings or lists of text parts.

    TypeError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence):
        return "".join(_message_text(message) for message in completion)
    raise TypeError(f"a completion must be a string or a list of messages, got {type(completion).__name__}")


def check_tags(tags: Sequence[str]) -> tuple[str, str]:
    """The two tag names; ValueError unless they are two different names of letters, digits, ``_`` and ``-``."""
    names = tuple(tags) if not isinstance(tags, str) else ()
    valid = len(names) == 2 and names[0] != names[1]
    if not valid or not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w-]*", name) for name in names):
        raise ValueError(f"tags must be two different tag names such as ('think', 'answer'), got {tags!r}")
    return names[0], names[1]


def _tags_of(tags: Sequence[Any] | None, index: int) -> Sequence[str]:
    return DEFAULT_TAGS if tags is None or tags[index] is None else tags[index]


def _message_text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise TypeError(f"a message of a completion needs 'content', a string or a list of parts, got {message!r}")


def _content(text: str, tag: str) -> str | None:
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


@lru_cache(maxsize=64)
def _structure(reasoning_tag: str, answer_tag: str) -> re.Pattern[str]:
    """Only used where each of the four tags is known to occur once, so the lazy parts cannot match in several ways."""
    return re.compile(
        rf"\s*<{reasoning_tag}>.+?</{reasoning_tag}>\s*<{answer_tag}>.+?</{answer_tag}>\s*", flags=re.DOTALL
    )

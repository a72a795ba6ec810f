"""Answers as people and models write them -> what they say: wrappers removed, numbers and lists read exactly.

Everything here is linear in the text, bounded, and evaluates nothing: what these rules cannot read goes to the
verifier (`specs_fast.rewards.verify`), which is bounded from outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBER_CHARS = 64
MAX_BOXES = 8  # how many unclosed \\boxed{ are tried from the end before giving up
_MARKER = re.compile(r"\banswer[\s*]*(?:(?:is|are|was)\b[\s*]*[:=]?|[:=])[\s*]*", re.IGNORECASE)
_REMARK = re.compile(r"(?:correct|right|wrong|incorrect|not)\b", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s*\{")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("{", "}"))
_LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}", re.ASCII)
_FRACTION = re.compile(r"([+-]?\d+)\s*/\s*(\d+)", re.ASCII)
_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)/(\d+)", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_WORD_END = r"(?![\w/])"
_IN_TEXT = rf"[+-]?\d++(?:,\d{{3}}(?!\d))*+(?:\.\d++)?+(?:\s?/\s?\d++)?+{_WORD_END}"
# Possessive throughout: "1,234,567" must not be read in every combination before it is refused.
NUMBER_RUN = re.compile(rf"(?<![\w.]){_IN_TEXT}(?:(?:\s*+,\s*+|\s++){_IN_TEXT})*+", re.ASCII)
"""One number within text, or several in a row, separated by commas or spaces."""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


@dataclass(frozen=True)
class Number:
    """An exact value, and whether it was written as a decimal (0.333) rather than as an integer or a fraction."""

    value: Fraction
    decimal: bool


@dataclass(frozen=True)
class NumberList:
    """Two or more numbers in order. bracket: "", "[", "(" or "{" as written."""

    items: tuple[Number, ...]
    bracket: str


def clean(text: str) -> str:
    r"""The answer without what surrounds it.

    In turn, until nothing changes: the content of the last ``\boxed{}``, what follows the last "answer is" or "answer:",
    the inside of ``$ $``, ``\( \)``, ``** **``, ``\text{}`` around the whole, trailing punctuation (also as a separate
    token). Whitespace runs become one space.
    """
    text = " ".join(text.replace("−", "-").split())
    for _ in range(16):
        before = text
        text = _unwrapped(after_marker(boxed(text) or text).strip())
        if text == before:
            break
    return text


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces; None where there is none."""
    for match in reversed(list(_BOXED.finditer(text))[-MAX_BOXES:]):
        end = closing_brace(text, match.end())
        if end is not None and text[match.end() : end].strip():
            return text[match.end() : end].strip()
    return None


def closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one just before ``start``; None where it never closes."""
    depth = 1
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
    return None


def last_marker(text: str) -> re.Match[str] | None:
    """The last "answer is", "answer:" or "answer =" that an answer can follow: not "I hope this answer is correct"."""
    found = None
    for match in _MARKER.finditer(text):
        if re.search(r"[^\s.:,;!?*$]", text[match.end() :]) and not _REMARK.match(text, match.end()):
            found = match
    return found


def after_marker(text: str) -> str:
    """What follows the last answer marker, or the whole text."""
    marker = last_marker(text)
    return text if marker is None else text[marker.end() :]


def _unwrapped(text: str) -> str:
    text = text.rstrip(" .,;:")
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        whole = len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
        if whole and opening not in inner and closing not in inner:
            if opening == "{" and "," in inner:
                continue  # a set
            return inner.strip()
    command = _TEXT_COMMAND.match(text)
    if command and closing_brace(text, command.end()) == len(text) - 1:
        return text[command.end() : -1].strip()
    return text


def number(text: str) -> Number | None:
    r"""An integer, decimal, fraction (3/4, ``\frac{3}{4}``), mixed number (1 1/2) or 1,234.5; None for anything else.

    At most 64 characters; no exponents, no percent, no operators.
    """
    text = text.strip()
    if text.startswith(r"\$"):
        text = text[2:].strip()
    if text[:1] in "+-":
        text = text[:1] + text[1:].strip()
    if not text or len(text) > MAX_NUMBER_CHARS:
        return None
    if _DECIMAL.fullmatch(text):
        return Number(Fraction(text), "." in text)
    if _THOUSANDS.fullmatch(text):
        return Number(Fraction(text.replace(",", "")), "." in text)
    if match := _FRACTION.fullmatch(text):
        return _ratio(int(match[1]), int(match[2]))
    if match := _LATEX_FRACTION.fullmatch(text):
        return _ratio(int(match[2]) * (-1 if match[1] == "-" else 1), int(match[3]))
    if match := _MIXED.fullmatch(text):
        part = _ratio(int(match[3]), int(match[4]))
        return part and Number((int(match[2]) + part.value) * (-1 if match[1] == "-" else 1), False)
    return None


def _ratio(numerator: int, denominator: int) -> Number | None:
    return Number(Fraction(numerator, denominator), False) if denominator else None


def number_list(text: str) -> NumberList | None:
    """Two or more numbers separated by commas, semicolons or spaces, with or without brackets; None for anything else."""
    text = text.strip()
    bracket = ""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = "{" + text[2:-2] + "}"
    if text[:1] in _BRACKETS and text[-1:] == _BRACKETS[text[:1]]:
        bracket, text = text[0], text[1:-1]
    parts = re.split(r"[,;]", text) if re.search(r"[,;]", text) else text.split()
    items = [number(part) for part in parts if part.strip()]
    found = [item for item in items if item is not None]
    return NumberList(tuple(found), bracket) if len(found) == len(items) >= 2 else None


def same_number(a: Number, b: Number) -> bool:
    """Equal values; between a decimal and a fraction equal to a relative 1e-6, since 0.333333 can stand for 1/3."""
    if a.value == b.value:
        return True
    if a.decimal == b.decimal:
        return False
    return abs(a.value - b.value) <= Fraction(1, 1_000_000) * max(abs(a.value), abs(b.value))

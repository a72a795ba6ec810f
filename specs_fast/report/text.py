"""Model-written text as safe HTML: every character escaped, tags shown as tags, differences marked."""

from __future__ import annotations

import difflib
import re
from html import escape

_TAG = re.compile(r"(</?[A-Za-z][\w-]*>)")
_PIECES = re.compile(r"</?[A-Za-z][\w-]*>|\s+|[^\s<]+|<")
LIMIT = 1200


def words_html(text: str) -> str:
    """The text, escaped, with ``<tag>`` tokens set apart; long texts are cut, and say so."""
    if not text.strip():
        return '<em class="empty">(empty)</em>'
    shown = text[:LIMIT]
    more = f'<em class="empty"> … {len(text) - LIMIT:,} more characters</em>' if len(text) > LIMIT else ""
    return "".join(_piece_html(piece) for piece in _TAG.split(shown) if piece) + more


def difference_html(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts, escaped, with what only the one has marked in each."""
    left, right = _PIECES.findall(chosen[:LIMIT]), _PIECES.findall(rejected[:LIMIT])
    parts_left, parts_right = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        changed = kind != "equal"
        parts_left.append(_marked(left[a:b], "only-chosen" if changed else ""))
        parts_right.append(_marked(right[c:d], "only-rejected" if changed else ""))
    return "".join(parts_left), "".join(parts_right)


def _marked(pieces: list[str], css_class: str) -> str:
    html = "".join(_piece_html(piece) for piece in pieces)
    if not css_class or not "".join(pieces).strip():
        return html
    return f'<mark class="{css_class}">{html}</mark>'


def _piece_html(piece: str) -> str:
    safe = escape(piece, quote=True)
    return f'<span class="tag">{safe}</span>' if _TAG.fullmatch(piece) else safe

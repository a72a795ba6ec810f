"""Sections with pictures: questions at every checkpoint, preference pairs side by side, rollouts during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from specs_fast.report.chart import funnel
from specs_fast.report.images import ImageBook
from specs_fast.report.run_data import MODEL_TITLES, MODELS, Run
from specs_fast.report.text import difference_html, words_html

QUESTIONS_FIRST_SPLIT, QUESTIONS_PER_SPLIT = 6, 4
PAIRS_SHOWN = 6
ROLLOUTS_PER_STEP = 2
CORRUPTION_TEXT = {
    "drop_all": "all tags removed",
    "drop_answer": "answer tags removed",
    "drop_reasoning": "reasoning tags removed",
    "plain_answer": "answer tags replaced by plain text",
    "shift": "tags displaced",
    "natural": "broken by itself",
}
OUTCOMES = (
    ((False, True), "became right"),
    ((True, False), "became wrong"),
    ((False, False), "stayed wrong"),
    ((True, True), "stayed right"),
)


def gallery_section(run: Run, images: ImageBook) -> str:
    """Questions of every split, with every checkpoint's words and marks; all four outcomes are shown where they occur."""
    answered = {name: _by_prompt(evaluation.rows) for name, evaluation in run.evaluations.items() if evaluation.rows}
    if not answered:
        return '<p class="missing">No evaluated responses are there yet.</p>'
    splits = list(dict.fromkeys(split for rows in answered.values() for split, _ in rows))
    first, *others = splits
    html = '<p class="note">The first sample of each model. Shown are some questions of each outcome, not the best ones.</p>'
    html += _split_gallery(first, answered, images, QUESTIONS_FIRST_SPLIT, folded=False)
    return html + "".join(_split_gallery(split, answered, images, QUESTIONS_PER_SPLIT, folded=True) for split in others)


def _split_gallery(
    split: str,
    answered: Mapping[str, Mapping[tuple[str, str], Any]],
    images: ImageBook,
    limit: int,
    *,
    folded: bool,
) -> str:
    first, last = list(answered)[0], list(answered)[-1]
    shared = [key for key in answered[first] if key[0] == split and key in answered[last]]
    groups: dict[tuple[bool, bool], list[tuple[str, str]]] = {outcome: [] for outcome, _ in OUTCOMES}
    for key in shared:
        groups[_right(answered[first][key]), _right(answered[last][key])].append(key)
    chosen = pick(list(groups.values()), limit)
    counts = " · ".join(f"{len(groups[outcome])} {title}" for outcome, title in OUTCOMES)
    said = f"{MODEL_TITLES[first]} to {MODEL_TITLES[last]}: {counts}"
    cards = f'<div class="cards">{"".join(_question_card(key, answered, images) for key in chosen)}</div>'
    if folded:
        return f'<details class="fold"><summary><b>{escape(split)}</b> {said}</summary>{cards}</details>'
    return f'<h3>{escape(split)}</h3><p class="note">{said}</p>{cards}'


def pick(groups: Sequence[Sequence[Any]], limit: int) -> list[Any]:
    """Up to ``limit`` items, taken from the groups in turn."""
    taken: list[Any] = []
    depth = 0
    while len(taken) < limit and any(depth < len(group) for group in groups):
        taken += [group[depth] for group in groups if depth < len(group)]
        depth += 1
    return taken[:limit]


def _question_card(
    key: tuple[str, str], answered: Mapping[str, Mapping[tuple[str, str], Any]], images: ImageBook
) -> str:
    rows = {name: rows[key] for name, rows in answered.items() if key in rows}
    some = next(iter(rows.values()))
    columns = "".join(_answer_html(name, rows[name]) for name in MODELS if name in rows)
    return f'<article class="card">{_prompt_html(some, images)}<div class="answers">{columns}</div></article>'


def _prompt_html(row: Mapping[str, Any], images: ImageBook, beside: Any = None) -> str:
    pictures = "".join(images.html(str(name), beside) for name in row.get("images") or [])
    gold = row.get("answer")
    answer = "" if gold is None else f'<p class="gold">answer <b>{escape(str(gold))}</b></p>'
    return f'<div class="prompt">{pictures}<p>{words_html(str(row.get("prompt", "")))}</p>{answer}</div>'


def _answer_html(name: str, row: Mapping[str, Any]) -> str:
    samples = row.get("samples") or []
    text = str(samples[0]) if samples else str(row.get("greedy") or "")
    marks = _marks("right", _first(row, "correct_any")) + _marks("format", _first(row, "format"))
    correct = row.get("correct_any") or []
    share = f"{sum(map(bool, correct))}/{len(correct)} samples right" if len(correct) > 1 else ""
    greedy = row.get("greedy")
    more = ""
    if samples and isinstance(greedy, str):
        signs = _marks("right", row.get("greedy_correct_any")) + _marks("format", row.get("greedy_format"))
        words = f'<div class="marks">{signs}</div><p class="words">{words_html(greedy)}</p>'
        more = f"<details><summary>greedy</summary>{words}</details>"
    return (
        f'<div class="answer top-{name}"><h4>{MODEL_TITLES[name]}</h4><div class="marks">{marks}</div>'
        f'<p class="words">{words_html(text)}</p><small>{share}</small>{more}</div>'
    )


def _marks(what: str, mark: object) -> str:
    """A sign with words: colour is not the only carrier."""
    if mark is None:
        return ""
    good = bool(mark)
    text = {"right": ("✓ right", "✗ wrong"), "format": ("✓ format", "✗ format")}[what][0 if good else 1]
    return f'<span class="mark {"yes" if good else "no"}">{text}</span>'


def _first(row: Mapping[str, Any], key: str) -> object:
    values = row.get(key)
    if isinstance(values, list):
        return values[0] if values else row.get(f"greedy_{key}")
    return values


def _right(row: Mapping[str, Any]) -> bool:
    return bool(_first(row, "correct_any"))


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(str(row.get("split")), str(row.get("prompt_id"))): row for row in rows}


def pairs_section(run: Run, images: ImageBook) -> str:
    """What every filter let through, the mix of corruptions, and pairs side by side."""
    if not run.pair_yield and not run.pair_rows:
        return '<p class="missing">The pairs are not there yet. They come after the zero stage.</p>'
    return _yield_html(run.pair_yield) + _pair_cards(run, images)


def _yield_html(counts: Mapping[str, Any]) -> str:
    figures = []
    for key, side in (("zero", "chosen"), ("base", "rejected")):
        chain = {k: v for k, v in counts.get(key, {}).items() if isinstance(v, int)}
        if chain:
            source = counts.get(f"{side}_from", key)
            figures.append(funnel(f"{side}: sampled from {source}", chain, "good" if side == "chosen" else "bad"))
    ends = {
        "prompts": counts.get("prompts"),
        "with both sides": counts.get("prompts_with_both"),
        "pairs": counts.get("pairs"),
    }
    chain = {key: value for key, value in ends.items() if isinstance(value, int)}
    if chain:
        figures.append(funnel("prompts to pairs", chain, "coldstart"))
    mix = {CORRUPTION_TEXT.get(k, k): v for k, v in (counts.get("corruptions") or {}).items() if isinstance(v, int)}
    if mix:
        most, total = max(mix.values()), sum(mix.values())
        bars = "".join(
            f'<div class="bar"><span>{escape(name)}</span><i><b class="bg-bad" style="width:{100 * count / max(1, most):.1f}%">'
            f"</b></i><em>{count:,}</em><small>{100 * count / max(1, total):.0f} %</small></div>"
            for name, count in mix.items()
        )
        figures.append(
            f'<figure class="funnel"><figcaption><b>corruption of the rejected side</b></figcaption>{bars}</figure>'
        )
    return f'<div class="funnels">{"".join(figures)}</div>'


def _pair_cards(run: Run, images: ImageBook) -> str:
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.pair_rows:
        by_kind.setdefault(str(row.get("corruption", "")), []).append(row)
    cards = []
    for row in pick(list(by_kind.values()), PAIRS_SHOWN):
        chosen, rejected = difference_html(_said(row.get("chosen")), _said(row.get("rejected")))
        kind = escape(CORRUPTION_TEXT.get(str(row.get("corruption", "")), str(row.get("corruption", ""))))
        asked = {"prompt": _said(row.get("prompt")), "images": row.get("images"), "answer": row.get("answer")}
        cards.append(
            f'<article class="card">{_prompt_html(asked, images, run.stages["pairs"].folder)}<div class="answers two">'
            f'<div class="answer top-good"><h4>chosen</h4><p class="words">{chosen}</p></div>'
            f'<div class="answer top-bad"><h4>rejected <span class="mark no">{kind}</span></h4>'
            f'<p class="words">{rejected}</p></div></div></article>'
        )
    note = '<p class="note">Both sides are correct; what only one side has is marked.</p>' if cards else ""
    return f'{note}<div class="cards">{"".join(cards)}</div>'


def _said(messages: object) -> str:
    """The text of a list of chat messages, image parts dropped."""
    texts = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content", "")
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return " ".join(text for text in texts if text)


def rollouts_section(run: Run, images: ImageBook) -> str:
    """A few logged rollouts at the beginning, middle and end of each RL stage."""
    parts = []
    for name in ("zero", "final"):
        rows = run.stages[name].completions
        steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
        if not steps:
            parts.append(f'<h3>{name}</h3><p class="missing">{name}: no rollouts are there yet.</p>')
            continue
        shown = list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])))
        columns = "".join(
            f"<div><h4>step {step}</h4>"
            + "".join(
                _rollout_html(row, images) for row in [r for r in rows if r.get("step") == step][:ROLLOUTS_PER_STEP]
            )
            + "</div>"
            for step in shown
        )
        parts.append(f'<h3>{name}</h3><div class="rollouts">{columns}</div>')
    return "".join(parts)


def _rollout_html(row: Mapping[str, Any], images: ImageBook) -> str:
    rewards = row.get("rewards") or {}
    listed = " · ".join(f"{escape(str(key))} {_short(value)}" for key, value in rewards.items())
    return (
        f'<article class="card">{_prompt_html(row, images)}<p class="words">{words_html(str(row.get("completion", "")))}</p>'
        f"<small>reward {_short(row.get('reward'))} ({listed}) · advantage {_short(row.get('advantage'))}</small></article>"
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"

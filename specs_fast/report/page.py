"""The page: header, before/after, curves, pairs, questions, training rollouts, configuration. Sections in reading order."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from specs_fast.progress import duration_text
from specs_fast.report.chart import track_chart
from specs_fast.report.curves import curves_section
from specs_fast.report.images import ImageBook
from specs_fast.report.pictures import gallery_section, pairs_section, rollouts_section
from specs_fast.report.run_data import MODEL_TITLES, MODELS, Run, Stage
from specs_fast.report.table import Row, before_after, find, percent, points, splits_of

STAGE_TEXT = {
    "zero": ("zero", "GRPO from base: the model learns the form and becomes its own teacher"),
    "pairs": ("pairs", "chosen from zero, rejected from base; both correct, differing in form"),
    "coldstart": ("cold start", "DPO + SFT on the pairs, from base again"),
    "final": ("final", "GRPO from the cold start"),
}


def page_html(run: Run) -> str:
    """The whole page for a run."""
    rows = before_after(run.evaluations)
    images = ImageBook(run.folder)
    sections = [
        ("results", "Before and after", results_section(rows, run)),
        ("questions", "Questions", gallery_section(run, images)),
        ("pairs", "Preference pairs", pairs_section(run, images)),
        ("curves", "Training curves", curves_section(run)),
        ("rollouts", "Rollouts in training", rollouts_section(run, images)),
        ("configuration", "Configuration", configuration_section(run)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    style, script = _asset("style.css"), _asset("script.js")
    # The page needs nothing from outside and runs one script of ours; whatever a model wrote can do neither.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · specs-fast</title><style>{style}</style></head><body>"
        f"<header>{header_html(run, rows)}</header><nav>{links}</nav><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def header_html(run: Run, rows: list[Row]) -> str:
    """Title, headline, the four stages, and what it was run on."""
    facts = [(key, value) for key, value in run_facts(run) if value]
    listed = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    steps = '<li class="done"><b>base</b><span>the model as it was</span></li>'
    steps += "".join(_stage_html(stage) for stage in run.stages.values())
    return (
        f'<p class="eyebrow">SPECS run report</p><h1>{escape(run.name)}</h1>{headline_html(rows)}'
        f'<ol class="steps">{steps}</ol><dl class="facts">{listed}</dl>'
    )


def headline_html(rows: list[Row]) -> str:
    """One sentence: what the first split says about the last model that was evaluated."""
    if not rows:
        return '<p class="lead">No model has been evaluated yet.</p>'
    split, mode = rows[0].split, rows[0].mode
    accuracy, form = find(rows, split, mode, "accuracy_any"), find(rows, split, mode, "format")
    last = next((m for m in reversed(MODELS) if accuracy and accuracy.cells.get(m)), None)
    if accuracy is None or last is None or last == "base" or not accuracy.cells.get("base"):
        return '<p class="lead">Base and trained models have not both been evaluated yet.</p>'
    base, now = accuracy.cells["base"], accuracy.cells[last]
    text = (
        f"On {accuracy.prompts:,} held-out questions (<b>{escape(split)}</b>, {mode}) the {MODEL_TITLES[last]} model answers "
        f"<b>{percent(now)} %</b> right, base {percent(base)} %: <b>{points(now)} points</b>."
    )
    if form is not None and form.cells.get("base") and form.cells.get(last):
        text += (
            f" The asked format: {percent(form.cells['base'])} % before, <b>{percent(form.cells[last])} %</b> after."
        )
    return f'<p class="lead">{text}</p>'


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What was run, on what, for how long."""
    info, machine = run.info, _mapping(run.info.get("machine"))
    seconds = run_seconds(run)
    versions = ", ".join(f"{name} {version}" for name, version in _mapping(info.get("versions")).items() if version)
    model = _mapping(run.config.get("model"))
    base = str(info.get("base_model") or model.get("path") or ("the embedded lab's" if run.config.get("lab") else ""))
    hardware = ", ".join(
        part
        for part in (
            str(machine.get("gpu") or ""),
            str(machine.get("cpu") or ""),
            f"{machine['threads']} CPU threads" if machine.get("threads") else "",
            str(machine.get("platform") or ""),
        )
        if part
    )
    command = info.get("command")
    return [
        ("base model", base),
        ("time", duration_text(sum(seconds.values())) if seconds else ""),
        ("machine", hardware),
        ("versions", versions),
        ("configuration", str(info.get("config_hash") or "")),
        ("started", str(info.get("started") or "")),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else ""),
    ]


def run_seconds(run: Run) -> dict[str, float]:
    """Seconds of each part of the run: stages by their own account, the rest by the command line's."""
    seconds = {key: float(value) for key, value in _mapping(run.info.get("seconds")).items() if _is_number(value)}
    for name, stage in run.stages.items():
        if _is_number(stage.done.get("seconds")):
            seconds[name] = float(stage.done["seconds"])
    return seconds


def results_section(rows: list[Row], run: Run) -> str:
    """Two overview charts, then the full table, sampled and greedy."""
    if not rows:
        return missing("No evaluation is there yet. It comes last, after the final stage.")
    absent = [MODEL_TITLES[name] for name in MODELS if name not in run.evaluations]
    note = missing(f"Not there yet: {', '.join(absent)}.") if absent else ""
    overview = [
        track_chart(f"{title}, {mode}", [row for row in rows if row.metric == metric and row.mode == mode])
        for mode in [rows[0].mode]
        for metric, title in (("accuracy_any", "Accuracy in any style, %"), ("format", "Format as asked, %"))
        if any(row.metric == metric and row.mode == mode for row in rows)
    ]
    first, *others = splits_of(rows)
    tables = _split_table(rows, first) + "".join(_folded_table(rows, split) for split in others)
    settings = _mapping(run.evaluations[next(iter(run.evaluations))].summary.get("settings"))
    names = ("samples", "temperature", "max_new_tokens", "seed", "limit")
    asked = ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in names if settings.get(key) is not None)
    return (
        f'{note}<div class="tracks">{"".join(overview)}</div>{tables}{_generalization_html(run)}'
        '<p class="note">Percent ± one standard error over questions; differences are paired, question by question. '
        "<b>Strict</b> asks for the right answer inside the asked tags, <b>any style</b> takes the last answer however it is "
        "written, <b>format</b> asks for the asked structure whatever the answer. "
        f"The same settings for every model: {escape(asked)}.</p>"
    )


def _folded_table(rows: list[Row], split: str) -> str:
    """A split's table behind one line that says what changed."""
    part = [row for row in rows if row.split == split]
    changes = []
    for row in part:
        cells = [cell for cell in row.cells.values() if cell is not None]
        if row.mode == part[0].mode and row.metric in ("accuracy_any", "format") and len(cells) > 1:
            changes.append(f"{row.title} {100 * cells[0].value:.1f} → {100 * cells[-1].value:.1f}")
    summary = f"<b>{escape(split)}</b> {escape(', '.join(changes))}"
    return f'<details class="fold"><summary>{summary}</summary>{_split_table(rows, split)}</details>'


def _split_table(rows: list[Row], split: str) -> str:
    shown = [model for model in MODELS if any(row.cells.get(model) for row in rows)]
    compare = [model for model in shown if model != "base"] if "base" in shown else []
    last = compare[-1] if compare else None
    head = "".join(f'<th class="{model}">{MODEL_TITLES[model]}</th>' for model in shown)
    head += f"<th>{MODEL_TITLES[last]} − base</th>" if last else ""
    lines, previous, count = [], None, 0
    for row in (row for row in rows if row.split == split):
        count = max(count, row.prompts)
        if row.mode != previous:
            lines.append(f'<tr class="group"><th colspan="{len(shown) + 1 + bool(last)}">{row.mode}</th></tr>')
            previous = row.mode
        cells = "".join(f"<td>{_with_error(percent(row.cells.get(model)))}</td>" for model in shown)
        cells += f'<td class="delta">{_with_error(points(row.cells.get(last)))}</td>' if last else ""
        lines.append(f"<tr><th>{escape(row.title)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="numbers"><caption><b>{escape(split)}</b> {count:,} questions</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _generalization_html(run: Run) -> str:
    """The Generalization Factor of every model on every out-of-distribution split, where it was computed."""
    found = {
        model: _mapping(_mapping(evaluation.summary.get("generalization_factor")).get("splits"))
        for model, evaluation in run.evaluations.items()
    }
    splits = list(dict.fromkeys(split for values in found.values() for split in values))
    if not splits:
        return ""
    head = "".join(f'<th class="{model}">{MODEL_TITLES[model]}</th>' for model in found)
    lines = []
    for split in splits:
        values = [values.get(split) for values in found.values()]
        cells = "".join("<td>–</td>" if value is None else f"<td>{100 * value:.1f}</td>" for value in values)
        lines.append(f"<tr><th>{escape(split)}</th>{cells}</tr>")
    return (
        '<div class="scroll"><table class="numbers"><caption><b>Generalization Factor</b> F₂ of strict sampled accuracy, '
        "in distribution as precision, out of distribution as recall, × 100</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _with_error(text: str) -> str:
    value, separator, error = text.partition(" ±")
    return f"{value} <small>±{error}</small>" if separator else value


def _stage_html(stage: Stage) -> str:
    title, what = STAGE_TEXT[stage.name]
    state = {"done": "", "running": "not finished", "absent": "not there yet"}[stage.state]
    detail = []
    if stage.state == "running" and stage.metrics:
        detail.append(f"at step {stage.metrics[-1].get('step')}")
    if _is_number(stage.done.get("steps")):
        detail.append(f"{stage.done['steps']} steps")
    if _is_number(stage.done.get("pairs")) and stage.name == "pairs":
        detail.append(f"{stage.done['pairs']} pairs")
    if _is_number(stage.done.get("seconds")):
        detail.append(duration_text(float(stage.done["seconds"])))
    small = " · ".join(part for part in (state, *detail) if part)
    return f'<li class="{stage.state}"><b>{title}</b><span>{what}</span><small>{escape(small)}</small></li>'


def configuration_section(run: Run) -> str:
    """The configuration as it is in the run folder."""
    if not run.config:
        return missing("config.yaml is not there.")
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def missing(text: str) -> str:
    """A note in the place of something that a run has not made yet."""
    return f'<p class="missing">{escape(text)}</p>'


def _asset(name: str) -> str:
    return files("specs_fast.report").joinpath(name).read_text(encoding="utf-8")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

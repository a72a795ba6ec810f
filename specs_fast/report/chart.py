"""Charts as inline SVG: lines over steps with hover values, and checkpoints on a 0 to 100 % track. No library, no request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from specs_fast.report.run_data import MODEL_TITLES, MODELS
from specs_fast.report.table import Row, percent

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 24


@dataclass(frozen=True)
class Series:
    """One line. ``color`` is a CSS class of the page (``zero``, ``final``, ``good``, ...)."""

    title: str
    color: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, series: Sequence[Series], note: str = "") -> str:
    """A figure with a legend, a smoothed line over faint raw values where there are many steps, and hover values."""
    series = [Series(s.title, s.color, _finite(s.points)) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    low, high, ticks = nice_range([y for s in series for _, y in s.points])
    x_low, x_high = min(xs), max(xs)
    x_span = (x_high - x_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT),
            TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for x, anchor in ((x_low, "start"), (x_high, "end")) if x_high > x_low else ((x_low, "start"),):
        place_x, _ = place(x, low)
        label = f"step {number(x)}" if anchor == "start" else number(x)
        parts.append(f'<text class="tick" x="{place_x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{label}</text>')
    window = 1
    for s in series:
        smooth, used = running_mean(s.points)
        window = max(window, used)
        if used > 1:
            parts.append(f'<path class="raw stroke-{s.color}" d="{_path(s.points, place)}"/>')
        parts.append(f'<path class="line stroke-{s.color}" d="{_path(smooth, place)}"/>')
        x, y = place(*smooth[-1])
        parts.append(f'<circle class="end fill-{s.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    data = {
        "x": [x_low, x_high, LEFT, WIDTH - RIGHT],
        "series": [
            {"title": s.title, "color": s.color, "points": [[x, float(f"{y:.5g}")] for x, y in s.points]}
            for s in series
        ],
    }
    legend = "".join(f'<span><i class="key bg-{s.color}"></i>{escape(s.title)}</span>' for s in series)
    smoothed = f"line: mean of {window} steps" if window > 1 else ""
    notes = " · ".join(part for part in (note, smoothed) if part)
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data), quote=True)}">'
        f"<figcaption><b>{escape(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
        f'<div class="tip" hidden></div><p class="note">{escape(notes)}</p></figure>'
    )


def track_chart(title: str, rows: Sequence[Row]) -> str:
    """Every checkpoint of every row's split on a 0 to 100 % track, with bars of one standard error."""
    width, left, right, row_height, top = 520, 96, 20, 40, 22
    height = top + row_height * len(rows) + 8

    def place(value: float) -> float:
        return left + max(0.0, min(1.0, value)) * (width - left - right)

    parts = []
    for tick in (0, 25, 50, 75, 100):
        x = place(tick / 100)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 6}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{top - 8}" text-anchor="middle">{tick}</text>')
    for index, row in enumerate(rows):
        y = top + row_height * (index + 0.5)
        values = [cell.value for cell in row.cells.values() if cell is not None]
        if not values:
            continue
        parts.append(
            f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(shorten(row.split, 13))}</text>'
            f'<line class="span" x1="{place(min(values)):.1f}" x2="{place(max(values)):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        for model in MODELS:
            cell = row.cells.get(model)
            if cell is None:
                continue
            low, high = place(cell.value - cell.error), place(cell.value + cell.error)
            hint = f"{row.split} · {MODEL_TITLES[model]}: {percent(cell)} %"
            parts.append(
                f"<g><title>{escape(hint)}</title>"
                f'<line class="error stroke-{model}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f"{_marker(model, place(cell.value), y)}</g>"
            )
    keys = [model for model in MODELS if any(row.cells.get(model) for row in rows)]
    legend = "".join(
        f'<span><svg class="marker" viewBox="-8 -8 16 16">{_marker(model, 0, 0)}</svg>{MODEL_TITLES[model]}</span>'
        for model in keys
    )
    return (
        f'<figure class="track"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def funnel(title: str, counts: Mapping[str, int], color: str) -> str:
    """A chain of filters as bars, each with its count and its share of the one before."""
    first = max(1, next(iter(counts.values()), 1))
    rows, previous = [], None
    for name, count in counts.items():
        share = "" if previous in (None, 0) else f"{100 * count / previous:.0f} %"
        rows.append(
            f'<div class="bar"><span>{escape(name)}</span><i><b class="bg-{color}" style="width:{100 * count / first:.1f}%">'
            f"</b></i><em>{count:,}</em><small>{share}</small></div>"
        )
        previous = count
    return f'<figure class="funnel"><figcaption><b>{escape(title)}</b></figcaption>{"".join(rows)}</figure>'


def nice_range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Axis limits around the values, and three to six round ticks between them."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [index * step for index in range(first, last + 1)]


def running_mean(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Centred means over about a twelfth of the points, and that window; short runs are left alone."""
    window = len(points) // 12
    if window < 3:
        return list(points), 1
    half = window // 2
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        part = points[index - reach : index + reach + 1]
        smooth.append((x, sum(y for _, y in part) / len(part)))
    return smooth, 2 * half + 1


def number(value: float) -> str:
    """A short number for an axis."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def shorten(text: str, limit: int) -> str:
    """``text`` cut to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(points: Sequence[tuple[float, float]], place: object) -> str:
    assert callable(place)
    return "M" + "L".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)


def _marker(model: str, x: float, y: float) -> str:
    """A shape of its own for each checkpoint, so that colour is not the only sign."""
    if model == "base":
        return f'<circle class="hollow stroke-base" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if model == "final":
        return f'<circle class="fill-final" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>'
    if model == "zero":
        path = f"M{x:.1f},{y - 6.5:.1f}l6,11h-12z"
    else:
        path = f"M{x - 4.8:.1f},{y - 4.8:.1f}h9.6v9.6h-9.6z"
    return f'<path class="fill-{model}" d="{path}"/>'

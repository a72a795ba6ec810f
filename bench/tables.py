"""Results as Markdown tables, and the tables of the pages in docs/, which are made from the committed JSON:

    python -m bench.tables

rewrites everything between ``<!-- bench: OP DEVICE -->`` and ``<!-- end -->`` in the pages, with the plot where there is one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(_ROOT / "docs" / name for name in ("kernels.md", "attention.md"))
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- bench: (\w+) ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def section_table(section: dict[str, Any]) -> str:
    """A section's rows, with what stands beside them: bare parts, bandwidth, other load."""
    rows = section["rows"]
    measured = [row for row in rows if "not_run" not in row]
    names = list(dict.fromkeys(name for row in measured for name in row["error"]))
    with_flop, with_bare = bool(section["useful_flop"]), any("times_bare" in row for row in measured)
    header = ["arm", "ms", "p20–p80"]
    header += ["TFLOP/s"] * with_flop + ["of the bare parts"] * with_bare + ["of copy"] * bool(section["useful_bytes"])
    header += ["extra MiB", "peak MiB", *(f"error {name}" for name in names)]
    lines = []
    for row in measured:
        times = row["milliseconds"]
        cells = [row["arm"], number(times["median"]), f"{number(times['p20'])}–{number(times['p80'])}"]
        if with_flop:
            cells.append(number(row["useful_tflops"]))
        if with_bare:
            cells.append(f"{row['times_bare']:.2f}x of {len(row['bare'])}" if "times_bare" in row else "")
        if section["useful_bytes"]:
            cells.append(f"{100 * row['of_copy_bandwidth']:.0f} %")
        cells += ["" if row[key] is None else f"{row[key]:,.0f}" for key in ("extra_mib", "peak_mib")]
        cells += [f"{row['error'][name]:.1e}" if name in row["error"] else "" for name in names]
        lines.append(cells)
    notes = [f"{row['arm']}: {row['note']}." for row in measured if "note" in row]
    notes += [f"{row['arm']}: not run, {row['not_run']}." for row in rows if "not_run" in row]
    notes = [f"- {note}" for note in notes]
    return "\n".join([f"**{section['name']}**", "", beside(section), "", *markdown(header, lines), "", *notes]).rstrip()


def beside(section: dict[str, Any]) -> str:
    """One line: bare parts, bandwidth, threads or GPU, other load."""
    machine = section["measured"]["hardware"]
    where = machine["gpu"] if machine["gpu"] != "none" else f"{machine['cpu']}, {machine['threads']} threads"
    parts = [f"bare {name} {number(value)} ms" for name, value in section["bare_milliseconds"].items()]
    parts += [f"copy {section['copy_gb_per_s']:.0f} GB/s", where, f"torch {section['measured']['versions']['torch']}"]
    load = section["cores_busy_with_other_processes"]
    if load is not None and load > 0.1:
        parts.append(f"{load} cores busy with other processes")
    return "; ".join(parts) + "."


def goal_line(goal: dict[str, Any]) -> str:
    """A goal in words: what was promised, what was measured."""
    sign = "<=" if goal["at_most"] else ">="
    value = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
    verdict = {True: "met", False: "MISSED", None: ""}[goal["met"]]
    return f"{goal['section']}: {goal['arm']}, {goal['figure']} {sign} {goal['bound']:g}: {value} {verdict}".rstrip()


def goals_table(goals: list[dict[str, Any]]) -> str:
    lines = []
    for goal in goals:
        value = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        verdict = {True: "yes", False: "**no**", None: ""}[goal["met"]]
        wanted = f"{'≤' if goal['at_most'] else '≥'} {goal['bound']:g}"
        lines.append([goal["section"], goal["arm"], goal["figure"].replace("_", " "), wanted, value, verdict])
    return "\n".join(markdown(["section", "arm", "figure", "goal", "measured", "met"], lines))


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose columns line up as text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def page(text: str) -> str:
    """The page with its tables as the committed JSON has them."""

    def block(match: re.Match[str]) -> str:
        path, picture = RESULTS / match[3] / f"{match[2]}.json", f"bench-{match[2]}-{match[3]}.png"
        body = "Not measured.\n" if not path.is_file() else document(json.loads(path.read_text(encoding="utf-8")))
        if path.is_file() and (_ROOT / "docs" / picture).is_file():
            body = f"![Time and memory over size]({picture})\n\n{body}"
        return f"{match[1]}{body}{match[5]}"

    return _BLOCK.sub(block, text)


def document(result: dict[str, Any]) -> str:
    """All tables of a result: goals first, then sections; sweeps are in the plot."""
    parts = [goals_table(result["goals"])] if result["goals"] else []
    parts += [section_table(section) for section in result["sections"] if "sweep" not in section["shape"]]
    runs = {(s["measured"]["command"], s["measured"]["commit"]) for s in result["sections"]}
    parts.append("\n".join(f"Measured by `{command}` at commit {commit}." for command, commit in sorted(runs)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")

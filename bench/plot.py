"""Speed and memory over the swept sizes, from a result's sweep sections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000", "#a6761d", "#66a61e")
AXES = {"N": "N, tokens", "V": "V, vocabulary", "G": "G, responses per prompt", "P": "P, prompt tokens"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Two rows (time against the bare products, extra memory), a column per swept letter. Ours are drawn thick.

    Time is divided by the bare parts of the section, each once, so that the slope of the GEMMs drops out; milliseconds without.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = [section for section in result["sections"] if "sweep" in section["shape"]]
    swept = [letter for letter in AXES if len(family(sections, letter)) > 1]
    if not swept:
        return
    figure, axes = pyplot.subplots(2, len(swept), figsize=(6.2 * len(swept), 8.2), squeeze=False)
    arms = list(dict.fromkeys(row["arm"] for section in sections for row in section["rows"] if "not_run" not in row))
    for column, letter in enumerate(swept):
        members = family(sections, letter)
        for index, arm in enumerate(arms):
            style = {
                "color": COLOURS[index % len(COLOURS)],
                "linewidth": 2.4 if arm.startswith("ours") else 1.2,
                "linestyle": "-" if arm.startswith("ours") else "--",
                "marker": "o",
                "markersize": 3.5,
            }
            for axis, curve in zip(
                axes[:, column], (times(members, letter, arm), memory(members, letter, arm)), strict=True
            ):
                if curve:
                    axis.plot(*zip(*curve, strict=True), label=arm, **style)
        shape = members[0]["shape"]
        fixed = [key for key in ("D", "P", "R", "G", "N", "V") if key in shape and key != letter]
        axes[0, column].set_title(
            ", ".join([shape["task"], shape["dtype"], *(f"{key} = {shape[key]:,}" for key in fixed)]),
            fontsize=10,
        )
        axes[0, column].set_ylabel(
            "time / bare products of the task" if members[0]["bare_milliseconds"] else "milliseconds"
        )
        axes[1, column].set_ylabel("extra memory, MiB")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(AXES[letter])
            axis.set_xticks([section["shape"][letter] for section in members])
            axis.set_xticklabels([f"{section['shape'][letter]:,}" for section in members])
            axis.grid(True, which="both", linewidth=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    machine = sections[0]["measured"]["hardware"]
    where = machine["gpu"] if machine["gpu"] != "none" else f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(f"{result['op']} on {where}, torch {sections[0]['measured']['versions']['torch']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.03 + 0.022 * -(-len(arms) // 3), 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def family(sections: Sequence[dict[str, Any]], letter: str) -> list[dict[str, Any]]:
    """The largest set of sections that differ in this letter only, in its order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for section in (section for section in sections if letter in section["shape"]):
        rest = tuple((key, value) for key, value in section["shape"].items() if key != letter)
        groups.setdefault(rest, []).append(section)
    largest = max(groups.values(), key=len, default=[])
    return sorted(largest, key=lambda section: section["shape"][letter])


def times(sections: Sequence[dict[str, Any]], letter: str, arm: str) -> list[tuple[int, float]]:
    """Times over the section's bare parts; milliseconds where it has none."""
    points = []
    for section in sections:
        bare = sum(section["bare_milliseconds"].values()) or 1.0
        for row in section["rows"]:
            if row["arm"] == arm and "milliseconds" in row:
                points.append((section["shape"][letter], row["milliseconds"]["median"] / bare))
    return points


def memory(sections: Sequence[dict[str, Any]], letter: str, arm: str) -> list[tuple[int, float]]:
    """Points above 0 only: the axis is logarithmic."""
    return [
        (section["shape"][letter], row["extra_mib"])
        for section in sections
        for row in section["rows"]
        if row["arm"] == arm and row.get("extra_mib")
    ]

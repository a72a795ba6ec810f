"""The runner of all op benchmarks: ``specs-fast bench OP``, or ``python -m bench.run OP`` from the source tree.

An op's file in this folder gives cases (``bench.section``); the runner builds one at a time, checks every arm against fp64,
measures its memory, times all arms of the case in alternating rounds, prints a table, and writes JSON and a plot. A run
replaces the sections that it measured and keeps the others of the file; every section carries its own command, commit,
hardware and versions.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import OtherLoad, provenance
from bench.measure import MEMORY_NOTE, Times, copier, held_beyond_gradients, interleaved, peak_bytes
from bench.section import Arm, Case, Goal, Section, version
from bench.tables import goal_line, section_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
OPS = ("linear_logprob", "selective_logprob", "packed_attention")
COPY = "copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runner's options; shared by ``specs-fast bench`` and ``python -m bench.run``."""
    parser.add_argument("op", choices=OPS, metavar="OP", help=f"what to measure: {', '.join(OPS)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, help="timed rounds of every section (default: the section's own)")
    parser.add_argument(
        "--seconds", type=float, help="begin no further round of a section after this, from the third on"
    )
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="only sections whose name contains one of these")
    parser.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names of sections and stop")
    parser.add_argument("--out", type=Path, help="JSON to write (default: bench/results/<cpu or GPU>/OP.json)")
    parser.add_argument("--plot", type=Path, help="PNG to write (default: docs/bench-OP-<cpu or GPU>.png)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument(
        "--tiny", action="store_true", help="the same sections at tiny sizes: tests the flow, not the speed"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what the JSON file holds. ValueError for options that name nothing."""
    device = checked_device(options.device)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    for name in ("repeats", "seconds"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be above 0")
    op = load(options.op)
    cases: list[Case] = chosen(op.cases(device, tiny=options.tiny), options.shapes)
    goals: list[Goal] = [] if options.tiny else op.goals(device)
    if options.list:
        print("\n".join(case.name for case in cases))
        return {}
    path = options.out or RESULTS / device_name(device) / f"{options.op}.json"
    result = read_or_new(path, options.op, op.WHAT, device)
    if options.tiny:
        result["tiny"] = True
    for case in cases:
        section = measure(case, device, options.repeats, options.seconds, options.arms, options.tiny)
        result["sections"] = merged(result["sections"], section)
        result["goals"] = judged(goals, result["sections"])
        print(section_table(section), end="\n\n", flush=True)
        if not options.no_write:
            write_json(path, result)
    for goal in result["goals"]:
        print(goal_line(goal))
    if not options.no_write:
        print(f"written: {path}")
        draw(result, options.plot or (None if options.out else DOCS / f"bench-{options.op}-{device_name(device)}.png"))
    return result


def load(op: str) -> Any:
    """The op's file."""
    return importlib.import_module(f"bench.{op}")


def measure(
    case: Case,
    device: torch.device,
    rounds: int | None,
    seconds: float | None,
    only: Sequence[str] | None = None,
    tiny: bool = False,
) -> dict[str, Any]:
    """One section: errors, memory, times. tiny: a copy too small to say anything about memory."""
    section = case.build(device)
    gc.collect()
    arms = [arm for arm in section.arms if not only or any(text in arm.name for text in only)]
    exact = section.exact() if section.exact is not None else {}
    rows: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Arm] = {}
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "library": arm.library}
        rows[arm.name] = row
        if arm.run is None:
            row["not_run"] = arm.why_not
            continue
        try:
            extra, outputs = held_beyond_gradients(arm.run, device)
            row["error"] = errors(outputs if arm.check is None else arm.check(outputs), exact)
            del outputs
            if device.type == "cuda":  # what a first call tries out is not what it needs
                extra, _ = held_beyond_gradients(arm.run, device)
            row["extra_mib"], row["peak_mib"] = mib(extra), mib(peak_bytes(arm.run, device))
        except Exception as error:  # a peer's failure is a result
            row["not_run"] = f"raised {type(error).__name__}: {first_line(error)}"
            continue
        if arm.note:
            row["note"] = arm.note
        runnable[arm.name] = arm
    del exact
    gc.collect()
    copy, copied = copier(device, 1 << 20 if tiny else None)
    functions: dict[str, Callable[[], Any]] = {f"bare {name}": part for name, part in section.bare.items()}
    functions[COPY] = copy
    for function in functions.values():
        function()
    functions |= {name: arm.run for name, arm in runnable.items() if arm.run is not None}
    others = OtherLoad()
    times = {
        name: Times.of(values)
        for name, values in interleaved(functions, device, rounds or case.rounds, seconds).items()
    }
    load = others.cores()
    bandwidth = copied / times[COPY].median
    bare = {name: times[f"bare {name}"].median for name in section.bare}
    for name, arm in runnable.items():
        rows[name] |= figures(times[name], arm, section, bare, bandwidth)
    return {
        "name": case.name,
        "shape": case.shape,
        "measured": provenance(),
        "cores_busy_with_other_processes": load,
        "memory": MEMORY_NOTE,
        "bare_milliseconds": {name: round(1e3 * value, 4) for name, value in bare.items()},
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "useful_flop": section.flop,
        "useful_bytes": section.moved,
        "rows": list(rows.values()),
    }


def figures(times: Times, arm: Arm, section: Section, bare: dict[str, float], bandwidth: float) -> dict[str, Any]:
    """What the table shows of an arm's times."""
    result: dict[str, Any] = {
        "milliseconds": {
            "median": round(1e3 * times.median, 4),
            "p20": round(1e3 * times.p20, 4),
            "p80": round(1e3 * times.p80, 4),
        },
        "rounds": times.rounds,
    }
    if section.flop:
        result["useful_tflops"] = round(section.flop / times.median / 1e12, 4)
    if arm.bare:
        result["bare"] = list(arm.bare)
        result["times_bare"] = round(times.median / sum(bare[name] for name in arm.bare), 4)
    if section.moved:
        result["of_copy_bandwidth"] = round(section.moved / times.median / bandwidth, 4)
    return result


def errors(outputs: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """||x - exact|| / ||exact|| of every output that the exact answer has."""
    result = {}
    for name, value in outputs.items():
        if name in exact:
            wanted = exact[name]
            scale = float(wanted.double().norm())
            result[name] = float(f"{_distance(value.detach(), wanted) / (scale or 1.0):.3g}")
    return result


def _distance(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference, in fp64, a slice at a time."""
    if value.shape != exact.shape:
        raise ValueError(f"an output has shape {tuple(value.shape)}; the exact one has {tuple(exact.shape)}")
    if value.dim() == 0:
        return abs(float(value.double() - exact.double()))
    pieces = zip(value.split(8192), exact.split(8192), strict=True)
    return sum(float((a.double() - b.double()).norm()) ** 2 for a, b in pieces) ** 0.5


def mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def chosen(cases: Sequence[Case], texts: Sequence[str] | None) -> list[Case]:
    """The cases whose name contains one of the texts; all without texts. ValueError when there is none."""
    found = [case for case in cases if not texts or any(text in case.name for text in texts)]
    if not found:
        names = "; ".join(case.name for case in cases)
        raise ValueError(f"--shapes {' '.join(texts or ())}: no section's name contains that; sections: {names}")
    return found


def merged(sections: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections with this one in the place of its namesake, or at the end."""
    names = [section["name"] for section in sections]
    if new["name"] not in names:
        return [*sections, new]
    return [new if section["name"] == new["name"] else section for section in sections]


def judged(goals: Sequence[Goal], sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with what was measured of it: ``measured`` None where it was not."""
    result = []
    for goal in goals:
        value = goal_value(goal, sections)
        met = None if value is None else (value <= goal.bound if goal.at_most else value >= goal.bound)
        result.append({**vars(goal), "measured": value, "met": met})
    return result


def goal_value(goal: Goal, sections: list[dict[str, Any]]) -> float | None:
    rows = {row["arm"]: row for section in sections if section["name"] == goal.section for row in section["rows"]}
    row = rows.get(goal.arm)
    if row is None or "not_run" in row:
        return None
    figure, _, other = goal.figure.partition(":")
    if not other:
        value = row["milliseconds"]["median"] if figure == "milliseconds" else row.get(figure)
        return None if value is None else float(value)
    baseline = rows.get(other)
    if baseline is None or "not_run" in baseline:
        return None
    if figure == "memory_of":
        mine, theirs = row.get("extra_mib"), baseline.get("extra_mib")
        return round(mine / theirs, 4) if mine is not None and theirs else None
    return round(baseline["milliseconds"]["median"] / row["milliseconds"]["median"], 4)


def read_or_new(path: Path, op: str, what: str, device: torch.device) -> dict[str, Any]:
    """The file's content, its sections to be replaced one by one, or an empty result."""
    result: dict[str, Any] = {"op": op, "what": what, "device": device_name(device), "sections": [], "goals": []}
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old.get("op") == op and not old.get("tiny"):
            result["sections"] = old["sections"]
    return result


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def draw(result: dict[str, Any], path: Path | None) -> None:
    """The plot, where there is something to plot and matplotlib is installed."""
    if path is None or not any("sweep" in section["shape"] for section in result["sections"]):
        return
    if version("matplotlib") is None:
        print("no plot: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
        return
    from bench.plot import plot

    plot(result, path)
    print(f"written: {path}")


def checked_device(name: str) -> torch.device:
    """ValueError for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; allowed: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name in a form fit for a path."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure an op against its peers.")
    add_arguments(parser)
    try:
        run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

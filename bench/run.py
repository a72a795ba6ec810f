"""The runner of all op benchmarks: ``specs-fast bench OP``, or ``python -m bench.run OP`` from the source tree.

An op's file in this folder gives cases (``bench.section``); the runner builds one at a time, checks every arm against fp64,
measures its memory, times all arms of the case in alternating rounds, prints a table, and writes JSON and a plot. A run
replaces the sections that it measured and keeps the others of the file; every section carries its own command, commit,
hardware and versions.

What fails is said and costs nothing else: an arm that raises is a row with the reason, a section that raises stands under
"run" in the JSON and makes the exit code 1. An arm after which the GPU is of no use any more, or that does not return, ends
the process with exit code 3; the same command with ``--resume`` leaves that arm out and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.arms import ARM_SECONDS, DeviceLost, measure, problem_of, usable
from bench.section import Case, Goal, version
from bench.tables import goal_line, section_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
OPS = ("linear_logprob", "selective_logprob", "packed_attention", "update")
FAILED, DEVICE_LOST = 1, 3


class BadOption(ValueError):
    """An option that names nothing, or that cannot be; the text says what is allowed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runner's options; shared by ``specs-fast bench`` and ``python -m bench.run``."""
    parser.add_argument("op", choices=OPS, metavar="OP", help=f"what to measure: {', '.join(OPS)}")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but the name of what is measured."""
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
        "--resume",
        action="store_true",
        help="go on with the run in --out: without its sections and the arms it died of",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="the same sections at tiny sizes: tests the flow, not the speed"
    )


def run(options: argparse.Namespace, op: Any = None) -> dict[str, Any]:
    """Measure; returns what the JSON file holds, ``exit_code`` says how it went. BadOption for options that name nothing.

    op: gives cases and goals instead of the op's file.
    """
    device = checked_device(options.device)
    if options.threads is not None:
        if options.threads < 1:
            raise BadOption(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    for name in ("repeats", "seconds"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise BadOption(f"--{name} is {getattr(options, name)}; it must be above 0")
    op = op or load(options.op)
    cases: list[Case] = chosen(op.cases(device, tiny=options.tiny), options.shapes)
    goals: list[Goal] = [] if options.tiny else op.goals(device)
    if options.list:
        print("\n".join(case.name for case in cases))
        return {}
    path = options.out or RESULTS / device_name(device) / f"{options.op}.json"
    result = read_or_new(path, options.op, op.WHAT, device, resume=options.resume)
    if options.tiny:
        result["tiny"] = True
    log, store = result["run"], (lambda: None) if options.no_write else (lambda: write_json(path, result))
    skipped: list[str] = []
    for case in [case for case in cases if case.name not in log["sections"]]:
        try:
            section = measure_watched(case, device, options, log, store)
        except DeviceLost:
            return result
        if section is None:
            skipped.append(case.name)
        elif section:
            result["sections"] = merged(result["sections"], section)
            print(section_table(section), end="\n\n", flush=True)
        log["sections"].append(case.name)
        result["goals"] = judged(goals, result["sections"])
        store()
    if options.arms and len(skipped) == len(cases):
        raise BadOption(f"--arms {' '.join(options.arms)}: no arm's name contains that in: {'; '.join(skipped)}")
    for goal in result["goals"]:
        print(goal_line(goal))
    if not options.no_write:
        print(f"written: {path}")
        draw(result, options.plot or (None if options.out else DOCS / f"bench-{options.op}-{device_name(device)}.png"))
    return result


def exit_code(result: Mapping[str, Any]) -> int:
    """0, 1 where a section failed, 3 where the run ended because an arm left the GPU of no use."""
    log = result.get("run", {})
    return DEVICE_LOST if log.get("ended") == "device lost" else FAILED if log.get("failed") else 0


def measure_watched(
    case: Case, device: torch.device, options: argparse.Namespace, log: dict[str, Any], store: Callable[[], None]
) -> dict[str, Any] | None:
    """The section; None without an arm that was asked for, empty where it failed. What went wrong is noted in ``log``."""

    def lost(arm: str, problem: str) -> None:
        log["lost"].append({"section": case.name, "arm": arm, "problem": problem})
        log["ended"] = "device lost"
        print(f"{case.name}: {arm}: {problem}; the GPU is lost to this process", file=sys.stderr, flush=True)
        store()

    def stuck(arm: str) -> None:
        lost(arm, f"did not return within {ARM_SECONDS:g} s")
        os._exit(DEVICE_LOST)  # the main thread waits for the GPU

    without = {entry["arm"]: f"{entry['problem']}, in {entry['section']}" for entry in log["lost"]}
    try:
        return measure(
            case, device, options.repeats, options.seconds, options.arms, options.tiny, without=without, stuck=stuck
        )
    except DeviceLost as error:
        lost(error.arm, str(error))
        raise
    except Exception as error:
        traceback.print_exc()
        log["failed"].append({"section": case.name, "problem": problem_of(error)})
        if not usable(device):
            log["sections"].append(case.name)
            lost("", problem_of(error))
            raise DeviceLost("", problem_of(error)) from error
        return {}


def load(op: str) -> Any:
    """The op's file."""
    return importlib.import_module(f"bench.{op}")


def chosen(cases: Sequence[Case], texts: Sequence[str] | None) -> list[Case]:
    """The cases whose name contains one of the texts; all without texts. BadOption when there is none."""
    found = [case for case in cases if not texts or any(text in case.name for text in texts)]
    if not found:
        names = "; ".join(case.name for case in cases)
        raise BadOption(f"--shapes {' '.join(texts or ())}: no section's name contains that; sections: {names}")
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


def read_or_new(path: Path, op: str, what: str, device: torch.device, *, resume: bool = False) -> dict[str, Any]:
    """The file's content, its sections to be replaced one by one, or an empty result.

    "run" says of the last run which sections it is done with, which of them failed, and which arms the GPU was lost to.
    """
    result: dict[str, Any] = {"op": op, "what": what, "device": device_name(device), "sections": [], "goals": []}
    result["run"] = {"sections": [], "failed": [], "lost": []}
    if path.is_dir():
        raise BadOption(f"--out is {path}, a folder; name a file")
    if not path.is_file():
        return result
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["op"] == op and (resume or not old.get("tiny")):
            result |= {"sections": old["sections"]}
            result["run"] |= {key: old["run"][key] for key in result["run"]} if resume else {}
    except (ValueError, KeyError, TypeError):
        raise BadOption(f"--out is {path}, which is no result of this program; move it away or name another") from None
    return result


def write_json(path: Path, result: dict[str, Any]) -> None:
    """At once: whoever reads or is stopped meanwhile finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    written.replace(path)


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
    """BadOption for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadOption(f"--device is {name!r}; allowed: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BadOption(f"--device is {name!r}; allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadOption(f"--device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name in a form fit for a path."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure an op against its peers.")
    add_arguments(parser)
    try:
        return exit_code(run(parser.parse_args(arguments)))
    except BadOption as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

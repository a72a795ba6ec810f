"""A section's arms: each checked against the exact answer, its memory measured, and all of them timed together.

An arm that raises is a row with the reason. Where nothing runs on the GPU after it, that is a DeviceLost.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.machine import OtherLoad, provenance
from bench.measure import MEMORY_NOTE, CallFailed, Times, copier, held_beyond_gradients, interleaved, peak_bytes
from bench.section import Arm, Case, Section

COPY = "copy"
ARM_SECONDS = 60.0
"""How long an arm's first calls on a GPU may take, compiling included, before it counts as stuck."""


class DeviceLost(RuntimeError):
    """An arm left the GPU in a state in which nothing runs any more."""

    def __init__(self, arm: str, problem: str) -> None:
        super().__init__(problem)
        self.arm = arm


def measure(
    case: Case,
    device: torch.device,
    rounds: int | None,
    seconds: float | None,
    only: Sequence[str] | None = None,
    tiny: bool = False,
    *,
    without: Mapping[str, str] | None = None,
    stuck: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """One section: errors, memory, times. None where ``only`` leaves no arm. tiny: a copy too small to say anything about memory.

    without: arms not to be run, and why. stuck: called from another thread when an arm's first calls take too long.
    """
    tidy(device, tiny)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    section = case.build(device)
    arms = [arm for arm in section.arms if not only or any(text in arm.name for text in only)]
    if not arms:
        return None
    exact = section.exact() if section.exact is not None else {}
    rows: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Arm] = {}
    for arm in arms:
        row = rows[arm.name] = {"arm": arm.name, "library": arm.library}
        if arm.run is None or arm.name in (without or {}):
            row["not_run"] = arm.why_not if arm.run is None else (without or {})[arm.name]
            continue
        try:
            with watched(arm.name, device, stuck):
                row |= errors_and_memory(arm, exact, device)
        except Exception as error:  # a peer's failure is a result
            refused(row, error, device)
            continue
        if arm.note:
            row["note"] = arm.note if isinstance(arm.note, str) else arm.note()
        runnable[arm.name] = arm
    del exact
    tidy(device, tiny)
    copy, copied = copier(device, 1 << 20 if tiny else None)
    functions: dict[str, Callable[[], Any]] = {f"bare {name}": part for name, part in section.bare.items()}
    functions[COPY] = copy
    for function in functions.values():
        function()
    functions |= {name: arm.run for name, arm in runnable.items() if arm.run is not None}
    others = OtherLoad()
    times: dict[str, Times] = {}
    while not times:
        try:
            measured = interleaved(functions, device, rounds or case.rounds, seconds)
            times = {name: Times.of(values) for name, values in measured.items()}
        except CallFailed as failure:  # memory may run out in company
            if failure.name not in runnable:
                raise
            refused(rows[failure.name], failure.error, device)
            del functions[failure.name], runnable[failure.name]
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


def errors_and_memory(arm: Arm, exact: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """What a row says of one call. On a GPU a first call compiles and tunes, which is not what a call needs."""
    assert arm.run is not None
    if device.type == "cuda":
        arm.run()
        torch.cuda.synchronize(device)
    extra, outputs = held_beyond_gradients(arm.run, device)
    error = errors(outputs if arm.check is None else arm.check(outputs), exact)
    del outputs
    return {"error": error, "extra_mib": mib(extra), "peak_mib": mib(peak_bytes(arm.run, device))}


def refused(row: dict[str, Any], error: Exception, device: torch.device) -> None:
    """The row of an arm that raised. DeviceLost where nothing runs after it."""
    for figure in ("error", "extra_mib", "peak_mib", "note"):
        row.pop(figure, None)
    row["not_run"] = problem_of(error)
    if not usable(device):
        raise DeviceLost(row["arm"], row["not_run"]) from error


@contextmanager
def watched(arm: str, device: torch.device, stuck: Callable[[str], None] | None) -> Iterator[None]:
    """Within, ``stuck`` is called when ``ARM_SECONDS`` have passed; on GPUs only, whose work nothing interrupts."""
    if stuck is None or device.type == "cpu":
        yield
        return
    timer = threading.Timer(ARM_SECONDS, stuck, [arm])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tidy(device: torch.device, tiny: bool) -> None:
    """Give back what is held no longer."""
    if not tiny:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    rows = max(1, (1 << 27) * len(value) // max(1, value.numel()))
    pieces = zip(value.split(rows), exact.split(rows), strict=True)
    return sum(float((a.double() - b.double()).norm()) ** 2 for a, b in pieces) ** 0.5


def mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def problem_of(error: Exception) -> str:
    """Kind and first line."""
    lines = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {lines[0][:200] if lines else ''}"


def usable(device: torch.device) -> bool:
    """Whether anything runs on the device after an error: a bad memory access is reported for ever."""
    if device.type == "cpu":
        return True
    try:
        torch.ones(1, device=device).item()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True

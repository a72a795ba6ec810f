"""Time, peak memory and bandwidth, on CPU and CUDA devices.

Functions to be compared are timed in rounds, each once per round and in an order that alternates, so that whatever else the
machine does (clocks, other processes) meets all of them.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile  # the one in torch.profiler imports the whole compiler

Outputs = Callable[[], dict[str, torch.Tensor]]
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler reports starts and stops otherwise
MIN_ROUNDS = 3
COPY_BYTES = 256 << 20
"""Far beyond the caches of a CPU; a GPU copies more (``copier``)."""


class Times(NamedTuple):
    """Seconds: median, 20th and 80th percentile, and how many were measured."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        if len(seconds) == 1:
            return Times(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return Times(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


class CallFailed(RuntimeError):
    """One of the functions that were timed together raised."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: wall time on a CPU; on a GPU time between events, after a sweep that empties its L2 cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        elapsed = time.perf_counter() - start
        del result
        return elapsed
    _evict(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


_scratch: dict[torch.device, torch.Tensor] = {}


def _evict(device: torch.device) -> None:
    if device not in _scratch:
        _scratch[device] = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    _scratch[device].zero_()


def interleaved(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, seconds: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every call of every function. They must have run once before. CallFailed where one raises.

    rounds: how many at most. seconds: no further round is begun after this time, but ``MIN_ROUNDS`` (or ``rounds``) are made.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    started = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name in names if done % 2 == 0 else reversed(names):
            try:
                times[name].append(clock(functions[name], device))
            except Exception as error:
                raise CallFailed(name, error) from error
    return times


def held_beyond_gradients(function: Outputs, device: torch.device) -> tuple[int | None, dict[str, torch.Tensor]]:
    """The most that PyTorch's allocations of one call hold at a time, the returned gradients ("d ...") left out; and the outputs.

    From the profiler's record of every allocation and release; None where it holds none.
    """
    with profile(profile_memory=True) as record:
        outputs = function()
    events: list[tuple[int, int, int]] = []
    pending = list(record.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device.type:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    if not events:
        return None, outputs
    gradients = {x.untyped_storage().data_ptr() for name, x in outputs.items() if name.startswith("d ")}
    held = peak = 0
    events.sort()
    made = {pointer: index for index, (_, pointer, size) in enumerate(events) if size > 0 and pointer in gradients}
    for index, (_, pointer, size) in enumerate(events):
        if made.get(pointer) != index:
            held += size
            peak = max(peak, held)
    return peak, outputs


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory a call holds beyond what is held before it, what it returns included. It should have been called before.

    CUDA: PyTorch's allocator. CPU under Linux: resident memory of the process (the mark is reset before the call and freed heap
    is given back first), so scratch of C++ code and of BLAS counts too. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return None
    held = _resident("VmRSS")
    result = function()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - held)


MEMORY_NOTE = (
    "extra: the most that PyTorch's allocations of one call hold at a time beyond its inputs and the gradients it returns, "
    "from the profiler's record; peak: all that a call holds beyond its inputs, gradients included (CPU: resident memory of "
    "the process, reset before the call, freed heap returned first; GPU: PyTorch's allocator)"
)


def _reset_resident_peak() -> bool:
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not (clear.exists() and status.exists()):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        clear.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def copier(device: torch.device, size: int | None = None) -> tuple[Callable[[], Any], int]:
    """A function that copies one buffer to another, and the bytes it moves (read and written)."""
    size = size or (COPY_BYTES * 8 if device.type == "cuda" else COPY_BYTES)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size

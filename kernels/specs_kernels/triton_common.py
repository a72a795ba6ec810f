"""What the Triton kernels share: the online softmax in registers, rounding, and how a kernel is launched.

Importing this module imports Triton; ``import specs_kernels`` does not. Under ``TRITON_INTERPRET=1`` (set before Triton is
imported) the same kernels run on the CPU, one program after another.

A row of scores is reduced to (m, s, t) with m the maximum, s = sum_j exp(z_j - m), t = sum_j exp(z_j - m) (z_j - m), as in
``softmax.py``. Two constants keep the arithmetic finite without a branch:

* ``LOWEST`` starts a maximum. A maximum that starts at 0 loses rows whose scores are all far below 0; one that starts at
  -inf makes -inf - (-inf).
* ``FLOOR`` bounds a difference z - m where it meets its factor exp(z - m) = 0: their product is then 0, not NaN. NaN
  scores still reach s through the exponential, so a bad row reports itself.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels of this process run in the interpreter, where bf16 casts truncate and bf16 ``tl.dot`` is wrong."""

LOWEST = tl.constexpr(-3.4028234663852886e38)
FLOOR = tl.constexpr(-1e5)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_EMULATE = tl.constexpr(INTERPRETED)


TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's names of the arithmetic dtypes."""


@triton.jit
def merge(m, s, t, m_other, s_other, t_other, to_log2, ENTROPY: tl.constexpr):
    """(m, s, t) of two disjoint sets of scores together; exp(x) is taken as 2^(x * to_log2)."""
    new = tl.maximum(m, m_other)
    shift = m - new
    shift_other = m_other - new
    factor = tl.exp2(shift * to_log2)
    factor_other = tl.exp2(shift_other * to_log2)
    if ENTROPY:
        t = factor * (t + tl.maximum(shift, FLOOR) * s) + factor_other * (
            t_other + tl.maximum(shift_other, FLOOR) * s_other
        )
    s = factor * s + factor_other * s_other
    return new, s, t


@triton.jit
def take_in(m, s, t, z, to_log2, to_log2_of_tile, AXIS: tl.constexpr, ENTROPY: tl.constexpr):
    """(m, s, t) after the tile ``z``, whose scores along AXIS belong to one row; -inf or LOWEST stands for "no score".

    ``to_log2`` must broadcast against m, ``to_log2_of_tile`` is the same against z.
    """
    new = tl.maximum(m, tl.max(z, AXIS))
    shifted = z - tl.expand_dims(new, AXIS)
    power = tl.exp2(shifted * to_log2_of_tile)
    shift = m - new
    factor = tl.exp2(shift * to_log2)
    if ENTROPY:
        t = factor * (t + tl.maximum(shift, FLOOR) * s) + tl.sum(power * tl.maximum(shifted, FLOOR), AXIS)
    s = factor * s + tl.sum(power, AXIS)
    return new, s, t


@triton.jit
def merge_all(m, s, t, to_log2, ENTROPY: tl.constexpr):
    """(m, s, t) of all lanes of three vectors together."""
    new = tl.max(m, 0)
    shift = m - new
    factor = tl.exp2(shift * to_log2)
    total = tl.sum(factor * s, 0)
    if ENTROPY:
        weighted = tl.sum(factor * (t + tl.maximum(shift, FLOOR) * s), 0)
    else:
        weighted = total
    return new, total, weighted


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in full precision: fp32 operands never become TF32.

    The interpreter multiplies bf16 operands as the integers that hold them, so there they are upcast.
    """
    if _EMULATE:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def softcapped(x, CAP: tl.constexpr):
    """``CAP * tanh(x / CAP)``. 2^(..) alone loses digits near 0, where a short series takes over (not needed in fp64)."""
    y = x * (1.0 / CAP)
    size = tl.abs(y)
    decay = tl.exp2(size * (-2.0 * LOG2E))
    tanh = (1.0 - decay) / (1.0 + decay)
    if x.dtype == tl.float32:
        square = y * y
        series = size * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315))))
        tanh = tl.where(size < 0.2, series, tanh)
    return tl.where(y < 0, -CAP * tanh, CAP * tanh)


@triton.jit
def softcap_slope(x, CAP: tl.constexpr):
    """Derivative of :func:`softcapped`, ``1 - tanh(x / CAP)^2``, without the cancellation where it is small."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / CAP))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in DTYPE, rounded to nearest even. The interpreter truncates fp32 to bf16, so there the rounding is added."""
    if _EMULATE and DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN's payload must not carry into its sign and exponent.
        x = tl.where(x == x, up, bits).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def checked_temperature(temperature):
    """NaN instead of a temperature that is not a finite number above 0: the row reports itself."""
    good = (temperature > 0) & (temperature < float("inf"))
    return tl.where(good, temperature, float("nan"))


def per_row(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A ``[N]`` vector as kernels read it: contiguous, in the arithmetic dtype."""
    return None if values is None else values.to(dtype).contiguous()


def strided(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, int]:
    """A number or a vector as kernels read it, a vector and its stride; (None, 0) for the number 1.

    Numbers go through memory because a kernel's own float arguments are fp32, and constants would compile anew per value.
    """
    if isinstance(value, Tensor):
        return per_row(value, dtype), 1
    if value == 1.0:
        return None, 0
    return torch.full((1,), value, dtype=dtype, device=device), 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what the compile gate needs to compile the very same thing."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Recording:
    """Launches are collected instead of made, as for a GPU of this architecture."""

    architecture: str
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("_recording", default=None)


@contextlib.contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """Within, host functions called with meta tensors collect the launches they would make on ``architecture``."""
    recording = Recording(architecture, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def architecture(device: torch.device) -> str:
    """Which column of a launch table applies: "sm80" (also any NVIDIA GPU not named), "sm90", "sm100", "gfx942" (any AMD
    GPU) or "interpreter"."""
    recording = _recording.get()
    if recording is not None:
        return recording.architecture
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm90", 10: "sm100"}.get(torch.cuda.get_device_capability(device)[0], "sm80")


def launch(
    kernel: Any, programs: int, device: torch.device, num_warps: int, num_stages: int = 2, **arguments: Any
) -> None:
    """Run ``kernel`` on a 1-D grid on ``device``. FP fusion is set, since Triton's default for it differs by version."""
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, arguments, num_warps, num_stages))
        return
    if INTERPRETED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scores of -inf are meant
            kernel[(programs,)](**arguments)
        return
    # A launch goes to the current GPU, whatever its arguments say.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)

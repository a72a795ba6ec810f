"""``selective_logprob`` in Triton: one read of the logits forward, one read and one write backward.

One program per row. A tile of a row is laid out [SUB, LANES] so that the online softmax keeps one (m, s, t) per lane: the
maximum over SUB is taken inside a thread, and threads meet once, after the last tile. Scores stay in units of the logits
until the end (the temperature is a factor inside the exponential), so differences from the maximum are exact.

Numerics: statistics in fp32 (fp64 for fp64 logits); the target's column of the gradient is formed before rounding.
Deterministic; a row does not depend on the others. Offsets are 64 bit. Rows whose target is ``ignore_index`` are not read.
A target outside [0, V) or a temperature that is not above 0 gives NaN in its own row and reads nothing out of bounds.

Letters: N targets, V vocabulary.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specs_kernels.softmax import accumulation_dtype
from specs_kernels.triton_common import (
    FLOOR,
    LN2,
    LOG2E,
    LOWEST,
    TL_DTYPES,
    checked_temperature,
    launch,
    merge_all,
    per_row,
    rounded,
    strided,
    take_in,
)

_FORWARD_WARPS = 4
_FORWARD_SUB = 4
"""Tiles of this many 16-byte loads per thread: one extra exponential per _FORWARD_SUB scores."""
_BACKWARD_WARPS = 8


@triton.jit
def selective_forward_kernel(
    logits,
    target,
    temperature,
    logp,
    entropy,
    lse,
    maximum,
    log_total,
    mean,
    stride_row: tl.int64,
    stride_column: tl.int64,
    stride_temperature: tl.int64,
    V,
    ignore_index,
    ACC: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUB: tl.constexpr,
    LANES: tl.constexpr,
):
    """Outputs and, for the backward, m in units of the logits, log s, and t / s in units of the scores."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row).to(tl.int64)
    if label == ignore_index:
        nothing = tl.full((), 0.0, ACC)
        tl.store(logp + row, nothing)
        tl.store(lse + row, nothing)
        tl.store(maximum + row, nothing)
        tl.store(log_total + row, nothing)
        if ENTROPY:
            tl.store(entropy + row, nothing)
            tl.store(mean + row, nothing)
        return
    inverse = tl.full((), 1.0, ACC)
    if TEMPERATURE:
        inverse = 1.0 / checked_temperature(tl.load(temperature + row * stride_temperature).to(ACC))
    to_log2 = inverse * LOG2E

    base = logits + row * stride_row
    columns = tl.arange(0, SUB)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([LANES], LOWEST, ACC)
    s = tl.zeros([LANES], ACC)
    t = tl.zeros([LANES], ACC)
    for start in range(0, V, SUB * LANES):
        column = start + columns
        x = tl.load(base + column.to(tl.int64) * stride_column, mask=column < V, other=float("-inf")).to(ACC)
        m, s, t = take_in(m, s, t, x, to_log2, to_log2, 0, ENTROPY)
    m, s, t = merge_all(m, s, t, to_log2, ENTROPY)

    known = (label >= 0) & (label < V)
    x_target = tl.load(base + label * stride_column, mask=known, other=float("nan")).to(ACC)
    log_s = tl.log2(s) * LN2
    tl.store(logp + row, (x_target - m) * inverse - log_s)
    tl.store(lse + row, m * inverse + log_s)
    tl.store(maximum + row, m)
    tl.store(log_total + row, log_s)
    if ENTROPY:
        t = t / s * inverse
        tl.store(entropy + row, log_s - t)
        tl.store(mean + row, t)


@triton.jit
def selective_backward_kernel(
    logits,
    grad_logits,
    target,
    temperature,
    grad_logp,
    grad_entropy,
    grad_lse,
    maximum,
    log_total,
    mean,
    stride_row: tl.int64,
    stride_column: tl.int64,
    grad_stride_row: tl.int64,
    grad_stride_column: tl.int64,
    stride_temperature: tl.int64,
    V,
    ignore_index,
    ACC: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    LOGP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dx_j = (p_j [(r - g) - q (z_j - E)] + g 1[j = target]) / temperature``. May run in place.

    A row without upstream gradient is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row).to(tl.int64)
    inverse = tl.full((), 1.0, ACC)
    if TEMPERATURE:
        inverse = 1.0 / checked_temperature(tl.load(temperature + row * stride_temperature).to(ACC))
    to_log2 = inverse * LOG2E
    g = tl.full((), 0.0, ACC)
    q = tl.full((), 0.0, ACC)
    r = tl.full((), 0.0, ACC)
    if LOGP:
        g = tl.load(grad_logp + row).to(ACC) * inverse
    if ENTROPY:
        q = tl.load(grad_entropy + row).to(ACC) * inverse
    if LSE:
        r = tl.load(grad_lse + row).to(ACC) * inverse
    counts = label != ignore_index
    g = tl.where((label >= 0) & (label < V), g, float("nan"))
    live = counts & ((g != 0) | (q != 0) | (r != 0))

    base = logits + row * stride_row
    grad_base = grad_logits + row * grad_stride_row
    columns = tl.arange(0, BLOCK)
    if live:
        m = tl.load(maximum + row)
        log2_s = tl.load(log_total + row) * LOG2E
        common = r - g
        if ENTROPY:
            common += q * tl.load(mean + row)
        for start in range(0, V, BLOCK):
            column = start + columns
            wide = column.to(tl.int64)
            x = tl.load(base + wide * stride_column, mask=column < V, other=float("-inf")).to(ACC)
            shifted = x - m
            p = tl.exp2(shifted * to_log2 - log2_s)
            if ENTROPY:
                dz = p * (common - q * (tl.maximum(shifted, FLOOR) * inverse))
            else:
                dz = p * common
            dz = tl.where(column == label, dz + g, dz)
            dx = rounded(dz, grad_logits.dtype.element_ty)
            tl.store(grad_base + wide * grad_stride_column, dx, mask=column < V)
    else:
        zero = tl.zeros([BLOCK], grad_logits.dtype.element_ty)
        for start in range(0, V, BLOCK):
            column = start + columns
            tl.store(grad_base + column.to(tl.int64) * grad_stride_column, zero, mask=column < V)


class Statistics(NamedTuple):
    """Per target, for the backward: m in units of the logits, log s, and t / s in units of the scores."""

    maximum: Tensor
    log_total: Tensor
    mean: Tensor | None


def forward(
    logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Statistics]:
    """(logp, entropy, lse, statistics for :func:`backward`), all ``[N]``, from logits ``[N, V]`` of any strides."""
    num_targets, vocab_size = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    temperature_N, stride_temperature = strided(temperature, dtype, logits.device)
    logp, lse, maximum, log_total = (torch.empty(num_targets, dtype=dtype, device=logits.device) for _ in range(4))
    entropy, mean = (torch.empty_like(logp), torch.empty_like(logp)) if return_entropy else (None, None)
    if num_targets:
        lanes = _FORWARD_WARPS * 32 * 16 // logits.dtype.itemsize
        launch(
            selective_forward_kernel,
            num_targets,
            logits.device,
            num_warps=_FORWARD_WARPS,
            logits=logits,
            target=target.contiguous(),
            temperature=temperature_N,
            logp=logp,
            entropy=entropy,
            lse=lse,
            maximum=maximum,
            log_total=log_total,
            mean=mean,
            stride_row=logits.stride(0),
            stride_column=logits.stride(1),
            stride_temperature=stride_temperature,
            V=vocab_size,
            ignore_index=ignore_index,
            ACC=TL_DTYPES[dtype],
            TEMPERATURE=temperature_N is not None,
            ENTROPY=return_entropy,
            SUB=_FORWARD_SUB,
            LANES=lanes,
        )
    return logp, entropy, lse, Statistics(maximum, log_total, mean)


def backward(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    statistics: Statistics,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, in ``out`` if given, which may be the logits themselves.

    ValueError when ``grad_entropy`` is given with the statistics of a forward without entropy.
    """
    num_targets, vocab_size = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    grad_logits = torch.empty_like(logits) if out is None else out
    if grad_logp is None and grad_entropy is None and grad_lse is None:
        return grad_logits.zero_()
    if grad_entropy is not None and statistics.mean is None:
        raise ValueError("grad_entropy needs the statistics of a forward with return_entropy=True")
    temperature_N, stride_temperature = strided(temperature, dtype, logits.device)
    if num_targets:
        launch(
            selective_backward_kernel,
            num_targets,
            logits.device,
            num_warps=_BACKWARD_WARPS,
            logits=logits,
            grad_logits=grad_logits,
            target=target.contiguous(),
            temperature=temperature_N,
            grad_logp=per_row(grad_logp, dtype),
            grad_entropy=per_row(grad_entropy, dtype),
            grad_lse=per_row(grad_lse, dtype),
            maximum=statistics.maximum,
            log_total=statistics.log_total,
            mean=statistics.mean,
            stride_row=logits.stride(0),
            stride_column=logits.stride(1),
            grad_stride_row=grad_logits.stride(0),
            grad_stride_column=grad_logits.stride(1),
            stride_temperature=stride_temperature,
            V=vocab_size,
            ignore_index=ignore_index,
            ACC=TL_DTYPES[dtype],
            TEMPERATURE=temperature_N is not None,
            LOGP=grad_logp is not None,
            ENTROPY=grad_entropy is not None,
            LSE=grad_lse is not None,
            BLOCK=_BACKWARD_WARPS * 32 * 16,
        )
    return grad_logits

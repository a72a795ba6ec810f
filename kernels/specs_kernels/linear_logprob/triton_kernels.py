"""The kernels of the row passes (``row_pass.py`` says what they compute); ``triton.py`` launches them.

Letters: R rows and C columns of a tile.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from specs_kernels.linear_logprob.row_pass import SKIP_ROW
from specs_kernels.triton_common import (
    FLOOR,
    LOG2E,
    LOWEST,
    merge,
    merge_all,
    rounded,
    softcap_slope,
    softcapped,
    take_in,
)

_SKIP = tl.constexpr(SKIP_ROW)


@triton.jit
def _products(x, bias, column, C, BIAS: tl.constexpr, ACC: tl.constexpr):
    """``x + bias`` of some columns of a row; -inf past the end."""
    y = tl.load(x + column, mask=column < C, other=float("-inf")).to(ACC)
    if BIAS:
        y += tl.load(bias + column, mask=column < C, other=0.0)
    return y


@triton.jit
def _inverse(inverse_temperature, row, stride, TEMPERATURE: tl.constexpr, ACC: tl.constexpr):
    inverse = tl.full((), 1.0, ACC)
    if TEMPERATURE:
        inverse = tl.load(inverse_temperature + row * stride)
    return inverse


@triton.jit
def stats_kernel(
    x,
    target,
    bias,
    inverse_temperature,
    maximum,
    total,
    weighted,
    found,
    keep,
    offset,
    exp_out,
    weighted_out,
    stride_x: tl.int64,
    stride_keep: tl.int64,
    stride_exp: tl.int64,
    stride_weighted: tl.int64,
    stride_temperature: tl.int64,
    C,
    first: tl.int64,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BIAS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    EXP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUB: tl.constexpr,
    LANES: tl.constexpr,
):
    """State of a row after a tile. KEEP: ``z - offset`` to keep. EXP, WEIGHTED: the tile's unnormalised weights."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    if label == _SKIP:
        # What is kept of a skipped row must be finite: it enters a GEMM as a row of zeros.
        zeros = tl.zeros([SUB * LANES], ACC)
        for start in range(0, C, SUB * LANES):
            column = start + tl.arange(0, SUB * LANES)
            if KEEP:
                tl.store(keep + row * stride_keep + column, zeros.to(keep.dtype.element_ty), mask=column < C)
            if EXP:
                tl.store(exp_out + row * stride_exp + column, zeros.to(exp_out.dtype.element_ty), mask=column < C)
            if WEIGHTED:
                tl.store(
                    weighted_out + row * stride_weighted + column,
                    zeros.to(weighted_out.dtype.element_ty),
                    mask=column < C,
                )
        if KEEP or EXP:
            tl.store(offset + row, tl.full((), 0.0, ACC))
        return
    inverse = _inverse(inverse_temperature, row, stride_temperature, TEMPERATURE, ACC)
    to_log2 = inverse * LOG2E
    base = x + row * stride_x
    columns = tl.arange(0, SUB)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([LANES], LOWEST, ACC)
    s = tl.zeros([LANES], ACC)
    t = tl.zeros([LANES], ACC)
    for start in range(0, C, SUB * LANES):
        column = start + columns
        y = _products(base, bias, column, C, BIAS, ACC)
        if SOFTCAP is not None:
            y = tl.where(column < C, softcapped(y, SOFTCAP), float("-inf"))
        m, s, t = take_in(m, s, t, y, to_log2, to_log2, 0, ENTROPY)
    m, s, t = merge_all(m, s, t, to_log2, ENTROPY)
    # From here on in units of the scores; a row of -inf keeps the lowest finite number.
    m = tl.maximum(m * inverse, LOWEST)
    t = t * inverse
    top = m
    shift = tl.full((), 0.0, ACC)
    if not FIRST:
        before = tl.load(maximum + row)
        t_before = t
        if ENTROPY:
            t_before = tl.load(weighted + row)
        m, s, t = merge(before, tl.load(total + row), t_before, m, s, t, LOG2E, ENTROPY)
        shift = before - m
    here = (label >= first) & (label < first + C)
    place = tl.where(here, label - first, 0)
    z = _products(base, bias, place, C, BIAS, ACC)
    if SOFTCAP is not None:
        z = softcapped(z, SOFTCAP)

    if KEEP or EXP:
        # The scores were read above by every warp before any warp overwrites them.
        tl.debug_barrier()
        columns = tl.arange(0, SUB * LANES)
        for start in range(0, C, SUB * LANES):
            column = start + columns
            y = _products(base, bias, column, C, BIAS, ACC)
            slope = tl.full((), 1.0, ACC)
            if SOFTCAP is not None:
                slope = softcap_slope(y, SOFTCAP)
                y = softcapped(y, SOFTCAP)
            if KEEP:
                kept = rounded(y * inverse - top, keep.dtype.element_ty)
                tl.store(keep + row * stride_keep + column, kept, mask=column < C)
            if EXP:
                shifted = y * inverse - m
                power = tl.exp2(shifted * LOG2E) * slope
                power = tl.where(column + first == label, 0.0, power)
                tl.store(exp_out + row * stride_exp + column, rounded(power, exp_out.dtype.element_ty), mask=column < C)
                if WEIGHTED:
                    power = power * tl.maximum(shifted, FLOOR)
                    tl.store(
                        weighted_out + row * stride_weighted + column,
                        rounded(power, weighted_out.dtype.element_ty),
                        mask=column < C,
                    )
        tl.store(offset + row, shift if EXP else top)
    tl.store(found + row, z * inverse, mask=here)
    tl.store(maximum + row, m)
    tl.store(total + row, s)
    if ENTROPY:
        tl.store(weighted + row, t)


@triton.jit
def dscores_kernel(
    x,
    dx,
    target,
    bias,
    inverse_temperature,
    maximum,
    log_total,
    base,
    grad_entropy,
    grad_logp,
    offset,
    stride_x: tl.int64,
    stride_dx: tl.int64,
    stride_temperature: tl.int64,
    C,
    first: tl.int64,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BIAS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGP: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of a row; x holds products, or ``z - offset`` with OFFSET. A row that passes no gradient is not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    common = tl.load(base + row)
    q = tl.full((), 0.0, ACC)
    g = tl.full((), 0.0, ACC)
    if ENTROPY:
        q = tl.load(grad_entropy + row)
    if LOGP:
        g = tl.load(grad_logp + row)
    from_row = x + row * stride_x
    to_row = dx + row * stride_dx
    columns = tl.arange(0, BLOCK)
    if (label != _SKIP) & ((common != 0) | (q != 0) | (g != 0)):
        inverse = _inverse(inverse_temperature, row, stride_temperature, TEMPERATURE, ACC)
        m = tl.load(maximum + row)
        log2_s = tl.load(log_total + row) * LOG2E
        for start in range(0, C, BLOCK):
            column = start + columns
            slope = inverse
            if OFFSET:
                above = tl.load(offset + row)
                kept = tl.load(from_row + column, mask=column < C, other=float("-inf")).to(ACC)
                shifted = kept + (above - m)
                if SOFTCAP is not None:
                    tanh = (kept + above) / (inverse * SOFTCAP)
                    slope = inverse * (1.0 - tanh * tanh)
            else:
                y = _products(from_row, bias, column, C, BIAS, ACC)
                if SOFTCAP is not None:
                    slope = inverse * softcap_slope(y, SOFTCAP)
                    y = softcapped(y, SOFTCAP)
                shifted = y * inverse - m
            power = tl.exp2(shifted * LOG2E - log2_s)
            if ENTROPY:
                dz = power * (common - q * tl.maximum(shifted, FLOOR))
            else:
                dz = power * common
            if LOGP:
                dz = tl.where(column + first == label, dz + g, dz)
            tl.store(to_row + column, rounded(dz * slope, dx.dtype.element_ty), mask=column < C)
    else:
        zero = tl.zeros([BLOCK], dx.dtype.element_ty)
        for start in range(0, C, BLOCK):
            column = start + columns
            tl.store(to_row + column, zero, mask=column < C)

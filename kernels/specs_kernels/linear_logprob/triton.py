"""The row passes of ``linear_logprob`` in Triton: one sweep over a tile of products between two GEMMs.

One program per row. The softmax statistics of a tile are kept per lane and in units of scores before the temperature, then
merged once into the running state of the row. Passes that write what depends on the tile's maximum (``stats`` with a
lower-precision ``keep_RC``, ``stats_exp``) go over the row twice; the second time it comes from cache.

``row_pass.py`` says what every pass computes. Deterministic, 64-bit offsets, no host synchronisation.

Letters: R rows and C columns of a tile.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import SKIP_ROW, RowGradients, RowState, Transform
from specs_kernels.triton_common import (
    FLOOR,
    LOG2E,
    LOWEST,
    acc_dtype,
    launch,
    merge,
    merge_all,
    rounded,
    softcap_slope,
    softcapped,
    take_in,
)

_SKIP = tl.constexpr(SKIP_ROW)
_STATS_WARPS = 4
_STATS_SUB = 4
"""Tiles of this many 16-byte loads per thread: one extra exponential per _STATS_SUB scores."""
_WRITE_WARPS = 4


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


def _inverse_temperature(transform: Transform, x_RC: Tensor) -> tuple[Tensor | None, int]:
    """The factor as kernels read it, a vector and its stride; (None, 0) when it is 1."""
    inverse = transform.inverse_temperature
    if isinstance(inverse, Tensor):
        return inverse, 1
    if inverse == 1.0:
        return None, 0
    dtype = torch.promote_types(x_RC.dtype, torch.float32)
    return torch.full((1,), inverse, dtype=dtype, device=x_RC.device), 0


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


class TritonRowPass:
    """:class:`~specs_kernels.linear_logprob.row_pass.RowPass` in Triton; ``scratch`` is not needed, nothing is overwritten
    but the outputs."""

    def _stats(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        keep_RC: Tensor | None = None,
        exp_RC: Tensor | None = None,
        weighted_RC: Tensor | None = None,
    ) -> Tensor | None:
        num_rows, num_columns = x_RC.shape
        out = keep_RC if exp_RC is None else exp_RC
        offset_R = None if out is None else torch.empty_like(state.maximum)
        if num_rows == 0 or num_columns == 0:
            return offset_R
        inverse, stride_temperature = _inverse_temperature(transform, x_RC)
        launch(
            stats_kernel,
            num_rows,
            x_RC.device,
            num_warps=_STATS_WARPS,
            x=x_RC,
            target=target_R,
            bias=transform.bias_C,
            inverse_temperature=inverse,
            maximum=state.maximum,
            total=state.total,
            weighted=state.weighted,
            found=state.target,
            keep=keep_RC,
            offset=offset_R,
            exp_out=exp_RC,
            weighted_out=weighted_RC,
            stride_x=x_RC.stride(0),
            stride_keep=_row_stride(keep_RC),
            stride_exp=_row_stride(exp_RC),
            stride_weighted=_row_stride(weighted_RC),
            stride_temperature=stride_temperature,
            C=num_columns,
            first=first,
            SOFTCAP=transform.softcap,
            ACC=acc_dtype(x_RC.dtype),
            BIAS=transform.bias_C is not None,
            TEMPERATURE=inverse is not None,
            ENTROPY=state.weighted is not None,
            FIRST=first == 0,
            KEEP=keep_RC is not None,
            EXP=exp_RC is not None,
            WEIGHTED=weighted_RC is not None,
            SUB=_STATS_SUB,
            LANES=_STATS_WARPS * 32 * 16 // x_RC.dtype.itemsize,
        )
        return offset_R

    def stats(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        *,
        keep_RC: Tensor | None = None,
        scratch: bool = True,
    ) -> Tensor | None:
        if keep_RC is not None and keep_RC.dtype == x_RC.dtype:
            self._stats(x_RC, target_R, first, transform, state)
            if keep_RC.data_ptr() != x_RC.data_ptr():
                keep_RC.copy_(x_RC)
            return None
        return self._stats(x_RC, target_R, first, transform, state, keep_RC)

    def stats_exp(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        exp_RC: Tensor,
        weighted_RC: Tensor | None,
    ) -> Tensor:
        rescale = self._stats(x_RC, target_R, first, transform, state, None, exp_RC, weighted_RC)
        assert rescale is not None
        return rescale

    def dscores(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        gradients: RowGradients,
        dx_RC: Tensor,
        *,
        offset_R: Tensor | None = None,
        scratch: bool = True,
    ) -> None:
        num_rows, num_columns = x_RC.shape
        if num_rows == 0 or num_columns == 0:
            return
        inverse, stride_temperature = _inverse_temperature(transform, x_RC)
        arguments: dict[str, Any] = {
            "x": x_RC,
            "dx": dx_RC,
            "target": target_R,
            "bias": transform.bias_C,
            "inverse_temperature": inverse,
            "maximum": gradients.maximum,
            "log_total": gradients.log_total,
            "base": gradients.base,
            "grad_entropy": gradients.entropy,
            "grad_logp": gradients.target,
            "offset": offset_R,
        }
        launch(
            dscores_kernel,
            num_rows,
            x_RC.device,
            num_warps=_WRITE_WARPS,
            **arguments,
            stride_x=x_RC.stride(0),
            stride_dx=dx_RC.stride(0),
            stride_temperature=stride_temperature,
            C=num_columns,
            first=first,
            SOFTCAP=transform.softcap,
            ACC=acc_dtype(gradients.base.dtype),
            BIAS=transform.bias_C is not None,
            TEMPERATURE=inverse is not None,
            ENTROPY=gradients.entropy is not None,
            LOGP=gradients.target is not None,
            OFFSET=offset_R is not None,
            BLOCK=_WRITE_WARPS * 32 * 16,
        )

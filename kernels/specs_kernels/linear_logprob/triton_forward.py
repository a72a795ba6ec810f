"""Fused forward of ``linear_logprob`` in Triton: scores live in registers only, nothing of size ``[N, V]`` is written.

A program takes BLOCK_N rows and one slice of SLICE columns, walks the slice in tiles of BLOCK_V columns, and keeps the
online softmax of its rows. Each (row block, slice) writes its own (m, s, t, target score); a second kernel merges the slices
of a row in column order. No atomics, no locks: deterministic. The number of slices depends on V only and a row's
arithmetic does not see the other rows, so results are the same bits in every batch.

Letters: N rows, D hidden size, V vocabulary, S slices.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specs_kernels.softmax import accumulation_dtype
from specs_kernels.triton_common import (
    LN2,
    LOG2E,
    LOWEST,
    acc_dtype,
    architecture,
    checked_temperature,
    dot,
    launch,
    merge,
    softcapped,
    strided_temperature,
    take_in,
)

SLICE = 1024
"""Columns per slice. A constant, so that slice boundaries never depend on the batch or the device."""
MERGE_ROWS = 128


@triton.jit
def fused_forward_kernel(
    hidden,
    weight,
    bias,
    target,
    temperature,
    partial,
    stride_hidden: tl.int64,
    stride_hidden_d: tl.int64,
    stride_weight: tl.int64,
    stride_weight_d: tl.int64,
    stride_temperature: tl.int64,
    stride_slice: tl.int64,
    stride_part: tl.int64,
    N,
    V,
    D,
    ignore_index,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BIAS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_D: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """partial ``[S, 4, N]``: m and target score in units of scores before the temperature, s, and t.

    hidden ``[N, D]`` and weight ``[V, D]`` are pointers, or tensor descriptors with DESCRIPTOR.
    """
    # Programs that run together share GROUP row blocks and neighbouring slices, so both operands come from cache.
    program = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    slices = tl.cdiv(V, SLICE)
    group = program // (GROUP * slices)
    first = group * GROUP
    members = tl.minimum(blocks - first, GROUP)
    inside = program - group * GROUP * slices
    block = first + inside % members
    part = inside // members

    row0 = block * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one: every load is in bounds without a mask in the loop.
    row = tl.minimum(rows, N - 1).to(tl.int64)
    label = tl.load(target + row)
    if tl.max((label != ignore_index).to(tl.int32), 0) == 0:
        return
    inverse = tl.full([BLOCK_N], 1.0, ACC)
    if TEMPERATURE:
        inverse = 1.0 / checked_temperature(tl.load(temperature + row * stride_temperature).to(ACC))
    to_log2 = inverse * LOG2E

    m = tl.full([BLOCK_N], LOWEST, ACC)
    s = tl.zeros([BLOCK_N], ACC)
    t = tl.zeros([BLOCK_N], ACC)
    found = tl.zeros([BLOCK_N], ACC)
    depth = tl.arange(0, BLOCK_D)
    begin = part * SLICE
    for column0 in range(begin, tl.minimum(begin + SLICE, V), BLOCK_V):
        columns = column0 + tl.arange(0, BLOCK_V)
        column = tl.minimum(columns, V - 1).to(tl.int64)
        acc = tl.zeros([BLOCK_N, BLOCK_V], ACC)
        for d0 in range(0, D, BLOCK_D):
            if DESCRIPTOR:
                x = hidden.load([row0, d0])
                w = weight.load([column0, d0])
            else:
                d = (d0 + depth).to(tl.int64)
                x_at = hidden + row[:, None] * stride_hidden + d[None, :] * stride_hidden_d
                w_at = weight + column[:, None] * stride_weight + d[None, :] * stride_weight_d
                if EVEN_D:
                    x = tl.load(x_at)
                    w = tl.load(w_at)
                else:
                    x = tl.load(x_at, mask=(d < D)[None, :], other=0.0)
                    w = tl.load(w_at, mask=(d < D)[None, :], other=0.0)
            acc = dot(x, w.T, acc)
        if SCALE != 1.0:
            acc = acc * SCALE
        if BIAS:
            acc += tl.load(bias + column).to(ACC)[None, :]
        if SOFTCAP is not None:
            acc = softcapped(acc, SOFTCAP)
        found += tl.sum(tl.where(columns[None, :] == label[:, None], acc, 0.0), 1)
        # After the softcap, so that no column past V counts as a score of +-SOFTCAP.
        acc = tl.where((columns < V)[None, :], acc, LOWEST)
        m, s, t = take_in(m, s, t, acc, to_log2, to_log2[:, None], 1, ENTROPY)

    at = partial + part.to(tl.int64) * stride_slice + rows
    real = rows < N
    tl.store(at, m, mask=real)
    tl.store(at + stride_part, s, mask=real)
    tl.store(at + 2 * stride_part, found, mask=real)
    if ENTROPY:
        tl.store(at + 3 * stride_part, t, mask=real)


@triton.jit
def merge_slices_kernel(
    partial,
    target,
    temperature,
    logp,
    entropy,
    lse,
    maximum,
    log_total,
    mean,
    stride_slice: tl.int64,
    stride_part: tl.int64,
    stride_temperature: tl.int64,
    N,
    V,
    slices,
    ignore_index,
    ACC: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Outputs and statistics of BLOCK_N rows from their slices, merged in column order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < N
    label = tl.load(target + rows, mask=real, other=ignore_index)
    counts = real & (label != ignore_index)
    known = (label >= 0) & (label < V)
    inverse = tl.full([BLOCK_N], 1.0, ACC)
    if TEMPERATURE:
        inverse = 1.0 / checked_temperature(tl.load(temperature + rows * stride_temperature, mask=counts, other=1.0))
    to_log2 = inverse * LOG2E

    m = tl.full([BLOCK_N], LOWEST, ACC)
    s = tl.zeros([BLOCK_N], ACC)
    t = tl.zeros([BLOCK_N], ACC)
    found = tl.zeros([BLOCK_N], ACC)
    at = partial + rows
    for _ in range(slices):
        m_slice = tl.load(at, mask=counts, other=LOWEST)
        s_slice = tl.load(at + stride_part, mask=counts, other=0.0)
        found += tl.load(at + 2 * stride_part, mask=counts, other=0.0)
        t_slice = t
        if ENTROPY:
            t_slice = tl.load(at + 3 * stride_part, mask=counts, other=0.0)
        m, s, t = merge(m, s, t, m_slice, s_slice, t_slice, to_log2, ENTROPY)
        at += stride_slice

    log_s = tl.log2(s) * LN2
    z = tl.where(known, found, float("nan"))
    tl.store(logp + rows, tl.where(counts, (z - m) * inverse - log_s, 0.0), mask=real)
    tl.store(lse + rows, tl.where(counts, m * inverse + log_s, 0.0), mask=real)
    tl.store(maximum + rows, tl.where(counts, m * inverse, 0.0), mask=real)
    tl.store(log_total + rows, tl.where(counts, log_s, 0.0), mask=real)
    if ENTROPY:
        t = t / s * inverse
        tl.store(entropy + rows, tl.where(counts, log_s - t, 0.0), mask=real)
        tl.store(mean + rows, tl.where(counts, t, 0.0), mask=real)


class Statistics(NamedTuple):
    """Per row: m, log s and t / s in units of the scores (after the temperature), as ``softmax.py`` has them."""

    maximum: Tensor
    log_total: Tensor
    mean: Tensor | None


class Tile(NamedTuple):
    """Rows, columns and depth of a tile; programs that share operands; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


def tile_for(arch: str, dtype: torch.dtype, softcap: bool, dim: int, descriptor: bool) -> Tile:
    """The largest tile that the compile gate finds without spills. A depth that pointers must mask takes registers."""
    if arch == "interpreter":
        return Tile(32, 256, 64, 4, 4, 1)
    if dtype == torch.float64:
        return Tile(32, 32, 16, 8, 8, 2)
    if dtype == torch.float32:
        return Tile(64, 128, 16, 8, 8, 3)
    if dim % 64 != 0 and not descriptor:
        return Tile(64, 128, 64, 8, 8, 2) if arch == "sm80" else Tile(128, 128, 32, 8, 8, 2)
    if arch == "gfx942":
        return Tile(128, 128, 64, 8, 8, 2)
    if arch == "sm80":
        return Tile(128, 128, 64, 8, 8, 3)
    return Tile(128, 128, 64, 8, 8, 4) if softcap else Tile(128, 256, 64, 8, 8, 3)


def _operand(tensor: Tensor, rows: int, depth: int, descriptor: bool) -> Any:
    return TensorDescriptor.from_tensor(tensor, [rows, depth]) if descriptor else tensor


def _describable(tensor: Tensor) -> bool:
    """Whether the tensor-memory unit can fetch tiles: unit inner stride, rows and base on 16-byte boundaries."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.dtype.itemsize % 16 == 0
    return aligned and tensor.stride(1) == 1 and 0 not in tensor.shape


def fused_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Statistics]:
    """(logp, entropy, lse, statistics), all ``[N]``, with ``ceil(V / SLICE) * 4 * N`` numbers of workspace.

    Operands of any strides; fetched by tensor descriptors where aligned (Hopper and later), by pointers otherwise.
    A target outside [0, V) or a temperature that is not above 0 gives NaN in its own row.
    """
    num_rows, dim = hidden_ND.shape
    vocab_size = weight_VD.shape[0]
    device, dtype = hidden_ND.device, accumulation_dtype(hidden_ND.dtype)
    arch = architecture(device)
    descriptor = arch in ("sm90", "sm100", "interpreter") and _describable(hidden_ND) and _describable(weight_VD)
    tile = tile_for(arch, hidden_ND.dtype, softcap is not None, dim, descriptor)
    slices = triton.cdiv(vocab_size, SLICE)
    logp, lse, maximum, log_total = (torch.empty(num_rows, dtype=dtype, device=device) for _ in range(4))
    entropy, mean = (torch.empty_like(logp), torch.empty_like(logp)) if return_entropy else (None, None)
    statistics = Statistics(maximum, log_total, mean)
    if num_rows == 0:
        return logp, entropy, lse, statistics
    temperature_N, stride_temperature = strided_temperature(temperature, dtype, hidden_ND)
    target_N = target_N.contiguous()
    partial = torch.empty(slices, 4, num_rows, dtype=dtype, device=device)
    launch(
        fused_forward_kernel,
        triton.cdiv(num_rows, tile.rows) * slices,
        device,
        num_warps=tile.warps,
        num_stages=tile.stages,
        hidden=_operand(hidden_ND, tile.rows, tile.depth, descriptor),
        weight=_operand(weight_VD, tile.columns, tile.depth, descriptor),
        bias=bias_V if bias_V is None else bias_V.contiguous(),
        target=target_N,
        temperature=temperature_N,
        partial=partial,
        stride_hidden=hidden_ND.stride(0),
        stride_hidden_d=hidden_ND.stride(1),
        stride_weight=weight_VD.stride(0),
        stride_weight_d=weight_VD.stride(1),
        stride_temperature=stride_temperature,
        stride_slice=partial.stride(0),
        stride_part=partial.stride(1),
        N=num_rows,
        V=vocab_size,
        D=dim,
        ignore_index=ignore_index,
        SCALE=logit_scale,
        SOFTCAP=softcap,
        ACC=acc_dtype(hidden_ND.dtype),
        BIAS=bias_V is not None,
        TEMPERATURE=temperature_N is not None,
        ENTROPY=return_entropy,
        DESCRIPTOR=descriptor,
        EVEN_D=dim % tile.depth == 0,
        SLICE=SLICE,
        BLOCK_N=tile.rows,
        BLOCK_V=tile.columns,
        BLOCK_D=tile.depth,
        GROUP=tile.group,
    )
    launch(
        merge_slices_kernel,
        triton.cdiv(num_rows, MERGE_ROWS),
        device,
        num_warps=4,
        partial=partial,
        target=target_N,
        temperature=temperature_N,
        logp=logp,
        entropy=entropy,
        lse=lse,
        maximum=maximum,
        log_total=log_total,
        mean=mean,
        stride_slice=partial.stride(0),
        stride_part=partial.stride(1),
        stride_temperature=stride_temperature,
        N=num_rows,
        V=vocab_size,
        slices=slices,
        ignore_index=ignore_index,
        ACC=acc_dtype(hidden_ND.dtype),
        TEMPERATURE=temperature_N is not None,
        ENTROPY=return_entropy,
        BLOCK_N=MERGE_ROWS,
    )
    return logp, entropy, lse, statistics

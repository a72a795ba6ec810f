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

from specs_kernels.linear_logprob.row_pass import SKIP_ROW, RowState
from specs_kernels.triton_common import (
    LOG2E,
    LOWEST,
    TL_DTYPES,
    architecture,
    dot,
    launch,
    merge,
    softcapped,
    strided,
    take_in,
)

_SKIP = tl.constexpr(SKIP_ROW)
SLICE = 1024
"""Columns per slice. A constant, so that slice boundaries never depend on the batch or the device."""
MERGE_ROWS = 128


@triton.jit
def fused_forward_kernel(
    hidden,
    weight,
    bias,
    target,
    inverse_temperature,
    factor,
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
    FACTOR: tl.constexpr,
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
    if tl.max((label != _SKIP).to(tl.int32), 0) == 0:
        return
    inverse = tl.full([BLOCK_N], 1.0, ACC)
    if TEMPERATURE:
        inverse = tl.load(inverse_temperature + row * stride_temperature)
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
        if FACTOR:
            acc = acc * tl.load(factor)
        if BIAS:
            acc += tl.load(bias + column)[None, :]
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
    inverse_temperature,
    maximum,
    total,
    weighted,
    found,
    stride_slice: tl.int64,
    stride_part: tl.int64,
    stride_temperature: tl.int64,
    N,
    slices,
    ACC: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The state of BLOCK_N rows from their slices, merged in column order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = tl.load(target + rows, mask=rows < N, other=_SKIP) != _SKIP
    inverse = tl.full([BLOCK_N], 1.0, ACC)
    if TEMPERATURE:
        inverse = tl.load(inverse_temperature + rows * stride_temperature, mask=counts, other=1.0)
    to_log2 = inverse * LOG2E

    m = tl.full([BLOCK_N], LOWEST, ACC)
    s = tl.zeros([BLOCK_N], ACC)
    t = tl.zeros([BLOCK_N], ACC)
    y = tl.zeros([BLOCK_N], ACC)
    at = partial + rows
    for _ in range(slices):
        m_slice = tl.load(at, mask=counts, other=LOWEST)
        s_slice = tl.load(at + stride_part, mask=counts, other=0.0)
        y += tl.load(at + 2 * stride_part, mask=counts, other=0.0)
        t_slice = t
        if ENTROPY:
            t_slice = tl.load(at + 3 * stride_part, mask=counts, other=0.0)
        m, s, t = merge(m, s, t, m_slice, s_slice, t_slice, to_log2, ENTROPY)
        at += stride_slice

    tl.store(maximum + rows, tl.maximum(m * inverse, LOWEST), mask=counts)
    tl.store(total + rows, s, mask=counts)
    tl.store(found + rows, y * inverse, mask=counts)
    if ENTROPY:
        tl.store(weighted + rows, t * inverse, mask=counts)


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


def fused_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    factor: float,
    state: RowState,
) -> None:
    """Fill ``state`` (all columns, see ``row_pass.py``) with ``ceil(V / SLICE) * 4 * N`` numbers of workspace.

    hidden_ND, weight_VD: any strides; fetched by tensor descriptors where the weight is aligned to 16 bytes and the GPU has
    them (Hopper and later), by pointers otherwise.
    target_N: int64 in ``[0, V)``, NO_TARGET, or SKIP_ROW; a block of skipped rows is not read. bias_V, inverse_temperature
    ``[N]`` and the state are in the arithmetic dtype. Products are ``factor * hidden @ weight.T``.
    """
    num_rows, dim = hidden_ND.shape
    vocab_size = weight_VD.shape[0]
    if num_rows == 0:
        return
    device, dtype = hidden_ND.device, state.maximum.dtype
    arch = architecture(device)
    descriptor = arch in ("sm90", "sm100", "interpreter") and _describable(weight_VD)
    if descriptor and not _describable(hidden_ND):
        # How a row is computed must not depend on where the batch lies in memory, so the batch moves.
        hidden_ND = hidden_ND.clone(memory_format=torch.contiguous_format)
    tile = tile_for(arch, weight_VD.dtype, softcap is not None, dim, descriptor)
    slices = triton.cdiv(vocab_size, SLICE)
    inverse, stride_temperature = strided(inverse_temperature, dtype, device)
    scale, _ = strided(factor, dtype, device)
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
        bias=None if bias_V is None else bias_V.contiguous(),
        target=target_N,
        inverse_temperature=inverse,
        factor=scale,
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
        FACTOR=scale is not None,
        SOFTCAP=softcap,
        ACC=TL_DTYPES[dtype],
        BIAS=bias_V is not None,
        TEMPERATURE=inverse is not None,
        ENTROPY=state.weighted is not None,
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
        inverse_temperature=inverse,
        maximum=state.maximum,
        total=state.total,
        weighted=state.weighted,
        found=state.target,
        stride_slice=partial.stride(0),
        stride_part=partial.stride(1),
        stride_temperature=stride_temperature,
        N=num_rows,
        slices=slices,
        ACC=TL_DTYPES[dtype],
        TEMPERATURE=inverse is not None,
        ENTROPY=state.weighted is not None,
        BLOCK_N=MERGE_ROWS,
    )

"""delta and dQ of ``packed_attention``; ``triton.py`` says what they compute.

One program owns a block of queries of one head and sums their dQ in key order: no atomics. Letters as in ``triton_kernels.py``.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from specs_kernels.packed_attention.triton_blocks import (
    END_KEY,
    FIRST_KEY,
    HIGH,
    LOW,
    QUERY_ORDER,
    bound,
    key_runs,
)
from specs_kernels.packed_attention.triton_kernels import base2_scores, key_rules, positions, sees, tile
from specs_kernels.triton_common import LOG2E, dot, rounded, softcap_slope


@triton.jit(do_not_specialize=["T"])
def attention_delta_kernel(
    grad_out,
    out,
    grad_lse,
    delta,
    stride_grad_t: tl.int64,
    stride_grad_h: tl.int64,
    stride_grad_d: tl.int64,
    stride_out_t: tl.int64,
    stride_out_h: tl.int64,
    T,
    heads,
    LSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``delta = sum_d grad_out out - grad_lse`` of BLOCK rows of ``[T * heads]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = rows // heads
    head = rows % heads
    depth = tl.arange(0, BLOCK_D)
    inside = token < T
    mask = inside[:, None] & (depth < D)[None, :]
    grad_at = grad_out + (token * stride_grad_t + head * stride_grad_h)[:, None]
    g = tl.load(grad_at + depth.to(tl.int64)[None, :] * stride_grad_d, mask=mask, other=0.0).to(tl.float32)
    out_at = out + (token * stride_out_t + head * stride_out_h)[:, None] + depth[None, :]
    total = tl.sum(g * tl.load(out_at, mask=mask, other=0.0).to(tl.float32), 1)
    if LSE:
        total -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    tl.store(delta + rows, total, mask=inside)


@triton.jit
def _query_step(
    acc,
    q,
    g,
    lse2,
    d,
    key,
    value,
    sound,
    visible_from,
    visible_until,
    position_ids,
    rows,
    row_position,
    columns,
    depth,
    scale,
    stride_key_t,
    stride_key_d,
    stride_value_t,
    stride_value_d,
    kv_heads,
    T,
    window,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dQ without its factor ``scale`` after one more block of keys."""
    keep = columns < T
    if MASKED:
        # Rows that see what is left out here have an lse of NaN.
        keep = keep & (tl.load(sound + columns.to(tl.int64) * kv_heads, mask=keep, other=0) != 0)
    k = tile(key, columns, depth, stride_key_t, stride_key_d, keep, D, BLOCK_D, MASKED)
    v = tile(value, columns, depth, stride_value_t, stride_value_d, keep, D, BLOCK_D, MASKED)
    zero = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    products = dot(q, k.T, zero)
    p = tl.exp2(base2_scores(products, scale, SOFTCAP) - lse2[:, None])
    ds = p * (dot(g, v.T, zero) - d[:, None])
    if SOFTCAP is not None:
        ds = ds * softcap_slope(products * scale, SOFTCAP)
    if MASKED:
        first, until, position = key_rules(visible_from, visible_until, position_ids, columns, T, WINDOW)
        visible = sees(
            rows[:, None], row_position[:, None], first[None, :], until[None, :], position[None, :], window, WINDOW
        )
        ds = tl.where(visible, ds, 0.0)
    return dot(rounded(ds, k.dtype), k, acc)


@triton.jit(do_not_specialize=["T", "window"])
def attention_query_kernel(
    query,
    key,
    value,
    sound,
    grad_out,
    lse,
    delta,
    grad_query,
    visible_from,
    visible_until,
    position_ids,
    query_bounds,
    key_bounds,
    scale,
    stride_query_t: tl.int64,
    stride_query_h: tl.int64,
    stride_query_d: tl.int64,
    stride_key_t: tl.int64,
    stride_key_h: tl.int64,
    stride_key_d: tl.int64,
    stride_value_t: tl.int64,
    stride_value_h: tl.int64,
    stride_value_d: tl.int64,
    stride_grad_t: tl.int64,
    stride_grad_h: tl.int64,
    stride_grad_d: tl.int64,
    stride_to_t: tl.int64,
    stride_to_h: tl.int64,
    T,
    window,
    heads,
    group,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    """dQ of BLOCK_Q queries of one head; walks the blocks that the forward walks."""
    program = tl.program_id(0)
    blocks_q = tl.cdiv(T, BLOCK_Q)
    blocks_k = tl.cdiv(T, BLOCK_K)
    block = bound(query_bounds, blocks_q, QUERY_ORDER, program // heads)
    head = (program % heads).to(tl.int64)
    row0 = block * BLOCK_Q
    rows = row0 + tl.arange(0, BLOCK_Q)
    inside = rows < T
    depth = tl.arange(0, BLOCK_D)
    row_position = positions(position_ids, rows, T, WINDOW)
    low = bound(query_bounds, blocks_q, LOW, block)
    high = bound(query_bounds, blocks_q, HIGH, block)
    key += head // group * stride_key_h
    value += head // group * stride_value_h
    sound += head // group
    q = tile(query + head * stride_query_h, rows, depth, stride_query_t, stride_query_d, inside, D, BLOCK_D, True)
    g = tile(grad_out + head * stride_grad_h, rows, depth, stride_grad_t, stride_grad_d, inside, D, BLOCK_D, True)
    at = rows.to(tl.int64) * heads + head
    lse2 = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
    d = tl.load(delta + at, mask=inside, other=0.0)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = bound(query_bounds, blocks_q, FIRST_KEY, block) // BLOCK_K
    stop = tl.cdiv(bound(query_bounds, blocks_q, END_KEY, block), BLOCK_K)
    while start < stop:
        a, b, c = key_runs(key_bounds, blocks_k, start, stop, row0, row0 + BLOCK_Q, low, high, window, WINDOW, SCAN)
        first = start
        last = start + a
        for MASKED in tl.static_range(2):
            for i in range(first, last):
                acc = _query_step(
                    acc,
                    q,
                    g,
                    lse2,
                    d,
                    key,
                    value,
                    sound,
                    visible_from,
                    visible_until,
                    position_ids,
                    rows,
                    row_position,
                    i * BLOCK_K + tl.arange(0, BLOCK_K),
                    depth,
                    scale,
                    stride_key_t,
                    stride_key_d,
                    stride_value_t,
                    stride_value_d,
                    heads // group,
                    T,
                    window,
                    SOFTCAP,
                    WINDOW,
                    D,
                    BLOCK_D,
                    MASKED,
                )
            first = last
            last = start + b
        start += c

    to = grad_query + rows.to(tl.int64)[:, None] * stride_to_t + head * stride_to_h + depth[None, :]
    result = rounded(acc * scale, grad_query.dtype.element_ty)
    tl.store(to, result, mask=inside[:, None] & (depth < D)[None, :])

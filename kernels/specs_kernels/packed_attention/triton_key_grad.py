"""dK and dV of ``packed_attention``; ``triton.py`` says what they compute.

One program owns a block of keys of one key head and walks all query heads of its group, in order: no atomics. Letters as in
``triton_kernels.py``.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from specs_kernels.packed_attention.triton_blocks import (
    FIRST_FROM,
    FIRST_UNTIL,
    HIGH,
    KEY_ORDER,
    LAST_FROM,
    LAST_UNTIL,
    LOW,
    bound,
    query_runs,
)
from specs_kernels.packed_attention.triton_kernels import base2_scores, is_finite, key_rules, positions, sees, tile
from specs_kernels.triton_common import LOG2E, dot, rounded, softcap_slope


@triton.jit
def _key_step(
    dk,
    dv,
    k,
    v,
    query,
    grad_out,
    lse,
    delta,
    position_ids,
    columns,
    first_from,
    until,
    column_position,
    rows,
    depth,
    scale,
    stride_query_t,
    stride_query_d,
    stride_grad_t,
    stride_grad_d,
    heads,
    T,
    window,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
):
    """dK (without its factor ``scale``) and dV after one more block of queries of one head. Products are ``[keys, queries]``."""
    at = rows.to(tl.int64) * heads
    if MASKED:
        lse2 = tl.load(lse + at, mask=rows < T, other=0.0) * LOG2E
        d = tl.load(delta + at, mask=rows < T, other=0.0)
    else:
        lse2 = tl.load(lse + at) * LOG2E
        d = tl.load(delta + at)
    # A query that is not finite shows in lse, an upstream gradient in delta: they make NaN of what the row sees.
    lse2 += d - d
    keep = (rows < T) & is_finite(lse2)
    q = tile(query, rows, depth, stride_query_t, stride_query_d, keep, D, BLOCK_D, MASKED)
    g = tile(grad_out, rows, depth, stride_grad_t, stride_grad_d, keep, D, BLOCK_D, MASKED)
    zero = tl.zeros([columns.shape[0], rows.shape[0]], tl.float32)
    products = dot(k, q.T, zero)
    p = tl.exp2(base2_scores(products, scale, SOFTCAP) - lse2[None, :])
    if MASKED:
        row_position = positions(position_ids, rows, T, WINDOW)
        visible = sees(
            rows[None, :],
            row_position[None, :],
            first_from[:, None],
            until[:, None],
            column_position[:, None],
            window,
            WINDOW,
        )
        p = tl.where(visible, p, 0.0)
    if OF_VALUE:
        dv = dot(rounded(p, g.dtype), g, dv)
    if OF_KEY:
        ds = p * (dot(v, g.T, zero) - d[None, :])
        if SOFTCAP is not None:
            ds = ds * softcap_slope(products * scale, SOFTCAP)
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
        dk = dot(rounded(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["T", "window"])
def attention_key_kernel(
    query,
    key,
    value,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
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
    OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr,
):
    """dK and dV, or one of them, of BLOCK_K keys of one key head, summed over the query heads of its group in order."""
    program = tl.program_id(0)
    blocks_q = tl.cdiv(T, BLOCK_Q)
    blocks_k = tl.cdiv(T, BLOCK_K)
    kv_heads = heads // group
    block = bound(key_bounds, blocks_k, KEY_ORDER, program // kv_heads)
    kv_head = (program % kv_heads).to(tl.int64)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    depth = tl.arange(0, BLOCK_D)
    first_from = bound(key_bounds, blocks_k, FIRST_FROM, block)
    last_from = bound(key_bounds, blocks_k, LAST_FROM, block)
    first_until = bound(key_bounds, blocks_k, FIRST_UNTIL, block)
    last_until = bound(key_bounds, blocks_k, LAST_UNTIL, block)
    low = bound(key_bounds, blocks_k, LOW, block)
    high = bound(key_bounds, blocks_k, HIGH, block)
    seen_from, seen_until, column_position = key_rules(visible_from, visible_until, position_ids, columns, T, WINDOW)
    inside = columns < T
    k = tile(key + kv_head * stride_key_h, columns, depth, stride_key_t, stride_key_d, inside, D, BLOCK_D, True)
    v = tile(value + kv_head * stride_value_h, columns, depth, stride_value_t, stride_value_d, inside, D, BLOCK_D, True)

    dk = tl.zeros([BLOCK_K, BLOCK_D if OF_KEY else 1], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D if OF_VALUE else 1], tl.float32)
    stop = tl.cdiv(last_until, BLOCK_Q)
    for head in range(kv_head * group, kv_head * group + group):
        start = first_from // BLOCK_Q
        while start < stop:
            a, b, c = query_runs(
                query_bounds,
                blocks_q,
                start,
                stop,
                first_from,
                last_from,
                first_until,
                last_until,
                low,
                high,
                window,
                WINDOW,
                BLOCK_Q,
                SCAN,
            )
            first = start
            last = start + a
            for MASKED in tl.static_range(2):
                for i in range(first, last):
                    dk, dv = _key_step(
                        dk,
                        dv,
                        k,
                        v,
                        query + head * stride_query_h,
                        grad_out + head * stride_grad_h,
                        lse + head,
                        delta + head,
                        position_ids,
                        columns,
                        seen_from,
                        seen_until,
                        column_position,
                        i * BLOCK_Q + tl.arange(0, BLOCK_Q),
                        depth,
                        scale,
                        stride_query_t,
                        stride_query_d,
                        stride_grad_t,
                        stride_grad_d,
                        heads,
                        T,
                        window,
                        SOFTCAP,
                        WINDOW,
                        D,
                        BLOCK_D,
                        MASKED,
                        OF_KEY,
                        OF_VALUE,
                    )
                first = last
                last = start + b
            start += c

    mask = inside[:, None] & (depth < D)[None, :]
    to = columns.to(tl.int64)[:, None] * stride_to_t + kv_head * stride_to_h + depth[None, :]
    if OF_KEY:
        tl.store(grad_key + to, rounded(dk * scale, grad_key.dtype.element_ty), mask=mask)
    if OF_VALUE:
        tl.store(grad_value + to, rounded(dv, grad_value.dtype.element_ty), mask=mask)

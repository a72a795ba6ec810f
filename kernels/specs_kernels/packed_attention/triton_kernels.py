"""The forward kernel of ``packed_attention`` and what the backward kernels share with it; ``triton.py`` says what they compute.

Scores are in base 2 (``z = score * log2 e``). A *full* block, where every query sees every key, runs without masks. In a
*partial* one, hidden scores are -inf before the exponential and hidden probabilities and gradients are 0 after it; and because
0 * NaN is NaN, tokens with a non-finite entry are read as zeros there. They reach the rows that see them by way of the scores,
which become NaN. ``sound`` says which key tokens are finite; for queries, lse and delta do.

Letters: T tokens, D head size; BLOCK_Q queries by BLOCK_K keys in a block, BLOCK_D >= D a power of 2.
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
from specs_kernels.triton_common import LN2, LOG2E, LOWEST, dot, rounded, softcapped

_HIDDEN = tl.constexpr(2**31 - 1)
"""visible_from of keys past T: no query sees them."""


@triton.jit
def tile(base, tokens, depth, stride_t, stride_d, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """``[tokens, BLOCK_D]`` of one head; zeros beyond D and, where MASKED, in rows that ``keep`` leaves out."""
    at = base + tokens.to(tl.int64)[:, None] * stride_t + depth.to(tl.int64)[None, :] * stride_d
    if MASKED:
        return tl.load(at, mask=keep[:, None] & (depth < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=(depth < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def base2_scores(products, scale, SOFTCAP: tl.constexpr):
    """Base-2 scores of products q . k."""
    if SOFTCAP is not None:
        return softcapped(products * scale, SOFTCAP) * LOG2E
    return products * (scale * LOG2E)


@triton.jit
def key_rules(visible_from, visible_until, position_ids, columns, T, WINDOW: tl.constexpr):
    """visible_from, visible_until and position of some keys."""
    inside = columns < T
    first = tl.load(visible_from + columns, mask=inside, other=_HIDDEN)
    until = tl.load(visible_until + columns, mask=inside, other=0)
    position = first
    if WINDOW:
        position = tl.load(position_ids + columns, mask=inside, other=0).to(tl.int32)
    return first, until, position


@triton.jit
def positions(position_ids, rows, T, WINDOW: tl.constexpr):
    if WINDOW:
        return tl.load(position_ids + rows, mask=rows < T, other=0).to(tl.int32)
    return rows


@triton.jit
def sees(rows, row_position, first, until, position, window, WINDOW: tl.constexpr):
    """The rule of the layout; arguments broadcast against each other. Rows past T see nothing, since until <= T."""
    visible = (first <= rows) & (rows < until)
    if WINDOW:
        visible = visible & (row_position - position < window)
    return visible


@triton.jit
def _forward_step(
    acc,
    m,
    s,
    q,
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
    """Running output, maximum and sum of a block of queries after one more block of keys."""
    keep = columns < T
    if MASKED:
        keep = keep & (tl.load(sound + columns.to(tl.int64) * kv_heads, mask=keep, other=0) != 0)
    k = tile(key, columns, depth, stride_key_t, stride_key_d, keep, D, BLOCK_D, MASKED)
    v = tile(value, columns, depth, stride_value_t, stride_value_d, keep, D, BLOCK_D, MASKED)
    z = base2_scores(dot(q, k.T, tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)), scale, SOFTCAP)
    if MASKED:
        first, until, position = key_rules(visible_from, visible_until, position_ids, columns, T, WINDOW)
        visible = sees(
            rows[:, None], row_position[:, None], first[None, :], until[None, :], position[None, :], window, WINDOW
        )
        z = tl.where(visible, tl.where(keep[None, :], z, float("nan")), float("-inf"))
    # The maximum starts at LOWEST and stays finite, so a row without a visible key so far gets -inf - finite, not NaN.
    new = tl.maximum(m, tl.max(z, 1))
    p = tl.exp2(z - new[:, None])
    decay = tl.exp2(m - new)
    s = s * decay + tl.sum(p, 1)
    acc = dot(rounded(p, v.dtype), v, acc * decay[:, None])
    return acc, new, s


@triton.jit(do_not_specialize=["T"])
def attention_sound_kernel(
    key,
    value,
    sound,
    stride_key_t: tl.int64,
    stride_key_h: tl.int64,
    stride_key_d: tl.int64,
    stride_value_t: tl.int64,
    stride_value_h: tl.int64,
    stride_value_d: tl.int64,
    T,
    heads,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """int8 ``[T, heads]``: 1 where all of a token's key and value are finite; BLOCK rows of ``[T * heads]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = rows // heads
    head = rows % heads
    depth = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = (token < T)[:, None] & (depth < D)
    key_at = key + (token * stride_key_t + head * stride_key_h)[:, None] + depth * stride_key_d
    value_at = value + (token * stride_value_t + head * stride_value_h)[:, None] + depth * stride_value_d
    good = is_finite(tl.load(key_at, mask=mask, other=0.0)) & is_finite(tl.load(value_at, mask=mask, other=0.0))
    tl.store(sound + rows, tl.min(good.to(tl.int32), 1).to(tl.int8), mask=token < T)


@triton.jit(do_not_specialize=["T", "window"])
def attention_forward_kernel(
    query,
    key,
    value,
    sound,
    out,
    lse,
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
    stride_out_t: tl.int64,
    stride_out_h: tl.int64,
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
    """out and lse of BLOCK_Q queries of one head. Heads of one block run next to each other and share its keys in cache."""
    program = tl.program_id(0)
    blocks_q = tl.cdiv(T, BLOCK_Q)
    blocks_k = tl.cdiv(T, BLOCK_K)
    block = bound(query_bounds, blocks_q, QUERY_ORDER, program // heads)
    head = (program % heads).to(tl.int64)
    row0 = block * BLOCK_Q
    rows = row0 + tl.arange(0, BLOCK_Q)
    depth = tl.arange(0, BLOCK_D)
    row_position = positions(position_ids, rows, T, WINDOW)
    low = bound(query_bounds, blocks_q, LOW, block)
    high = bound(query_bounds, blocks_q, HIGH, block)
    key += head // group * stride_key_h
    value += head // group * stride_value_h
    sound += head // group
    inside = rows < T
    q = tile(query + head * stride_query_h, rows, depth, stride_query_t, stride_query_d, inside, D, BLOCK_D, True)

    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    # A query that is not finite makes its row NaN, also where a softcap would hide it.
    s = tl.sum(tl.where(is_finite(q), 0.0, float("nan")), 1)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = bound(query_bounds, blocks_q, FIRST_KEY, block) // BLOCK_K
    stop = tl.cdiv(bound(query_bounds, blocks_q, END_KEY, block), BLOCK_K)
    while start < stop:
        a, b, c = key_runs(key_bounds, blocks_k, start, stop, row0, row0 + BLOCK_Q, low, high, window, WINDOW, SCAN)
        first = start
        last = start + a
        for MASKED in tl.static_range(2):
            for i in range(first, last):
                acc, m, s = _forward_step(
                    acc,
                    m,
                    s,
                    q,
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

    at = out + rows.to(tl.int64)[:, None] * stride_out_t + head * stride_out_h + depth[None, :]
    result = rounded(acc / s[:, None], out.dtype.element_ty)
    tl.store(at, result, mask=inside[:, None] & (depth < D)[None, :])
    tl.store(lse + rows.to(tl.int64) * heads + head, (m + tl.log2(s)) * LN2, mask=inside)

"""Which blocks of queries meet which blocks of keys: a few integers per block, made on the device from the layout's tensors.

Every token has two integers (``visible_from``, ``visible_until``); a block has their smallest and largest. From those a
program tells for each block on the other side whether no pair is visible (*dead*: it costs the loads of these integers), all
pairs are (*full*: no mask is needed) or some may be (*partial*), for SCAN blocks at once, and walks runs of equal blocks, so
that its inner loops are plain loops which Triton can pipeline.

Three facts about a depth-first row keep the walk short. ``visible_from`` never decreases, so the keys that a query can see
end at one index. A token at position 0 sees nothing before itself and begins a tree, so the keys that a query can see do not
start before the last such token. The queries that see a key are one range.

Nothing here reads a value on the host, and shapes depend on T only; the result is kept with the layout.
"""

# Annotations of a kernel's parameters are instructions to Triton, so most have none.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specs_kernels.layout import PackedLayout

_NEVER = 2**31 - 1

FIRST_FROM = tl.constexpr(0)
"""Smallest visible_from of a block's tokens."""
LAST_FROM = tl.constexpr(1)
"""Largest visible_from; beyond every token for the last block when it reaches past T, which makes that block never full."""
FIRST_UNTIL = tl.constexpr(2)
"""Smallest visible_until."""
LAST_UNTIL = tl.constexpr(3)
"""Largest visible_until."""
LOW = tl.constexpr(4)
"""Smallest position."""
HIGH = tl.constexpr(5)
"""Largest position."""
FIRST_KEY = tl.constexpr(6)
"""As queries: no token before this one is visible to any of them."""
END_KEY = tl.constexpr(7)
"""As queries: no token from this one on is visible to any of them."""
QUERY_ORDER = tl.constexpr(8)
"""Blocks of queries, longest path first: what a block costs grows with the path of its tokens."""
KEY_ORDER = tl.constexpr(9)
"""Blocks of keys, seen by most first."""


def block_bounds(layout: PackedLayout, block: int) -> Tensor:
    """int32 ``[10, ceil(T / block)]``, a row per constant above; made on the layout's device and kept with the layout."""
    name = ("packed_attention.triton", block)
    bounds: Tensor | None = layout.cache.get(name)
    if bounds is None:
        with torch.inference_mode(False):  # the first call may be a rollout's, the next one a training step's
            bounds = _block_bounds(layout, block)
        # What a CUDA graph records is only computed when it is replayed; a tracer's stand-in never is.
        recording = bounds.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(bounds) is Tensor and not recording:
            layout.cache[name] = bounds
    return bounds


def _block_bounds(layout: PackedLayout, block: int) -> Tensor:
    num_tokens, device = layout.num_tokens, layout.device
    blocks = triton.cdiv(num_tokens, block)
    tokens = torch.arange(num_tokens, device=device)
    starts = torch.arange(blocks, device=device) * block
    ends = starts + block
    padded = torch.arange(blocks * block, device=device).clamp_(max=num_tokens - 1)
    position = layout.position_ids.to(torch.int32)
    per_token = torch.stack([layout.visible_from, layout.visible_until, position])
    per_token = per_token.index_select(1, padded).view(3, blocks, block)
    (first_from, first_until, low), (last_from, last_until, high) = per_token.amin(2), per_token.amax(2)
    tree = torch.where(position == 0, tokens, 0).cummax(0).values
    return torch.stack(
        [
            first_from,
            last_from.masked_fill(ends > num_tokens, _NEVER),
            first_until,
            last_until,
            low,
            high,
            tree.index_select(0, starts).to(torch.int32),
            torch.searchsorted(layout.visible_from, ends.to(torch.int32)).to(torch.int32),
            torch.argsort(high, descending=True, stable=True).to(torch.int32),
            torch.argsort(last_until - first_from, descending=True, stable=True).to(torch.int32),
        ]
    )


@triton.jit
def bound(bounds, blocks, ROW: tl.constexpr, block):
    """One integer of a block."""
    return tl.load(bounds + ROW * blocks + block)


@triton.jit
def _runs(live, full, SCAN: tl.constexpr):
    """Ends (a, b, c) of the runs at the front: full blocks [0, a), partial ones [a, b), dead ones [b, c). c > 0."""
    index = tl.arange(0, SCAN)
    partial = live & (full == 0)
    a = tl.min(tl.where(full, SCAN, index), 0)
    b = tl.min(tl.where((index < a) | partial, SCAN, index), 0)
    c = tl.min(tl.where((index >= b) & live, index, SCAN), 0)
    return a, b, c


@triton.jit
def key_runs(bounds, blocks, start, stop, row0, row_end, low, high, window, WINDOW: tl.constexpr, SCAN: tl.constexpr):
    """Runs of key blocks from ``start`` for the queries [row0, row_end) at positions low to high; those from ``stop`` are dead.

    ``bounds`` are those of the key blocks.
    """
    block = start + tl.arange(0, SCAN)
    inside = block < stop
    at = bounds + block
    live = inside & (tl.load(at + FIRST_FROM * blocks, mask=inside, other=0) < row_end)
    live = live & (tl.load(at + LAST_UNTIL * blocks, mask=inside, other=0) > row0)
    full = live & (tl.load(at + LAST_FROM * blocks, mask=inside, other=0) <= row0)
    full = full & (tl.load(at + FIRST_UNTIL * blocks, mask=inside, other=0) >= row_end)
    if WINDOW:
        live = live & (low - tl.load(at + HIGH * blocks, mask=inside, other=0) < window)
        full = full & live & (high - tl.load(at + LOW * blocks, mask=inside, other=0) < window)
    return _runs(live, full, SCAN)


@triton.jit
def query_runs(
    bounds,
    blocks,
    start,
    stop,
    first_from,
    last_from,
    first_until,
    last_until,
    low,
    high,
    window,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Runs of query blocks from ``start`` for a key block of these bounds; those from ``stop`` are dead.

    ``bounds`` are those of the query blocks. A full block of queries ends at or before ``first_until`` <= T.
    """
    block = start + tl.arange(0, SCAN)
    inside = block < stop
    row0 = block * BLOCK_Q
    live = inside & (first_from < row0 + BLOCK_Q) & (last_until > row0)
    full = live & (last_from <= row0) & (first_until >= row0 + BLOCK_Q)
    if WINDOW:
        at = bounds + block
        live = live & (tl.load(at + LOW * blocks, mask=inside, other=0) - high < window)
        full = full & live & (tl.load(at + HIGH * blocks, mask=inside, other=0) - low < window)
    return _runs(live, full, SCAN)

"""How a packed forest is cut into rectangles of queries and keys.

The row is cut into *blocks*: pieces of segments of at most ``BLOCK_TOKENS`` tokens (a long segment becomes a chain of
blocks, which sees exactly the same tokens; a bidirectional span is never cut; short only children join their parent's
block). A block is visible to itself and to everything in the rest of its subtree, which is one contiguous token range.
So attention is

* level 0: for every block, its own tokens against its own tokens (causal, or open inside a span);
* level d + 1: for every block with d blocks above it, the rest of its subtree against its tokens: an unmasked
  rectangle. Subtrees of the same depth are disjoint, so within a level every query token occurs at most once, and over
  all levels d >= 1 every key token occurs at most once.

Pieces of similar size on one level are padded to a common shape and run as one batched product (a *group*); padding
never refers to a token of another piece. A plan depends on the layout, the head counts and the window only. It is
computed once per layout and kept in ``layout.cache``.

Letters: T tokens, K key/value heads, B pieces of a group, Q and L padded queries and keys per piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels.layout import PackedLayout

BLOCK_TOKENS = 256
JOIN_TOKENS = 96
"""Only children join their parent's block up to this size: cheaper than one more level."""
GROUP_COST = 50_000
"""Padded scores that cost about as much as launching one more group."""
MASK_ENTRIES = 1 << 22
"""Masks larger than this are formed tile by tile instead of being kept."""


@dataclass(frozen=True)
class Block:
    """Tokens [start, end) at depth ``level`` of the block tree; the rest of its subtree is [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int
    level: int


@dataclass(frozen=True)
class Piece:
    """Queries against keys. kind: "causal" (shared lower triangle), "open" (all visible), "explicit" (masked by rule)."""

    kind: str
    query_start: int
    num_queries: int
    key_start: int
    num_keys: int
    queries: Tensor | None = None
    """int64 token indices when the queries are not the range ``[query_start, query_start + num_queries)``."""


@dataclass(frozen=True)
class Group:
    """B pieces padded to Q queries and L keys, run as one batched product over K heads x B pieces.

    query_offset, key_offset: first row in the level's gathered queries and keys; rows are ordered [K, B, Q] and [K, B, L].
    mask: additive fp32 ``[1 or B, 1 or Q, L]`` of 0 and -inf, or None when every key is visible.
    rule: (query tokens [B, Q], key tokens [B, L], key counts [B]) when the mask is to be formed tile by tile.
    """

    query_offset: int
    key_offset: int
    batch: int
    num_queries: int
    num_keys: int
    mask: Tensor | None
    rule: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class Level:
    """One level's groups and the index maps between tokens and gathered rows. Row of (token t, head k): ``t * K + k``.

    query_rows, key_rows: token row of each gathered row. padded_queries: gathered query rows that are padding, or None.
    query_tokens, key_tokens: token rows covered by the level (None: all, in order).
    query_slots, key_slots: gathered row of each covered token row.
    """

    groups: tuple[Group, ...]
    query_rows: Tensor
    key_rows: Tensor
    padded_queries: Tensor | None
    query_tokens: Tensor | None
    key_tokens: Tensor | None
    query_slots: Tensor
    key_slots: Tensor


@dataclass(frozen=True)
class Plan:
    """Level 0 covers every token once as query and once as key."""

    levels: tuple[Level, ...]
    num_scores: int
    """Scores per head, padding included."""


def plan_for(layout: PackedLayout, num_heads: int, num_kv_heads: int, window: int | None) -> Plan:
    """The plan of a layout, from its cache after the first call."""
    cache_key = ("packed_attention.chunked", num_heads, num_kv_heads, window)
    plan = layout.cache.get(cache_key)
    if plan is None:
        with torch.inference_mode(False):  # the first call may be a rollout's, the next one a training step's
            plan = layout.cache[cache_key] = _build(layout, num_heads, num_kv_heads, window)
    return plan


def visibility(layout: PackedLayout, query_BQ: Tensor, key_BL: Tensor, window: int | None) -> Tensor:
    """Bool ``[B, Q, L]``: the layout's rule for these tokens."""
    query = query_BQ[:, :, None]
    visible = layout.visible_from[key_BL][:, None, :] <= query
    visible &= query < layout.visible_until[key_BL][:, None, :]
    if window is not None:
        visible &= layout.position_ids[query_BQ][:, :, None] - layout.position_ids[key_BL][:, None, :] < window
    return visible


def cut_blocks(layout: PackedLayout) -> list[Block]:
    """Blocks in token order."""
    span_starts = [start for start, _ in layout.bidirectional]
    pieces: list[tuple[int, int, int]] = []
    start = 0
    for length, subtree_end in zip(layout.lengths, layout.subtree_ends, strict=True):
        end = start + length
        if length:
            last = pieces[-1] if pieces else None
            # Same subtree end and no token in between: everything below the last piece is below this segment.
            if last is not None and last[1] == start and last[2] == subtree_end and end - last[0] <= JOIN_TOKENS:
                pieces[-1] = (last[0], end, subtree_end)
            else:
                cuts = _cuts(start, end, layout.bidirectional, span_starts)
                pieces.extend((a, b, subtree_end) for a, b in zip(cuts, cuts[1:], strict=False))
        start = end
    blocks: list[Block] = []
    above: list[int] = []
    for piece_start, piece_end, subtree_end in pieces:
        while above and above[-1] <= piece_start:
            above.pop()
        blocks.append(Block(piece_start, piece_end, subtree_end, len(above)))
        above.append(subtree_end)
    return blocks


def _cuts(start: int, end: int, spans: tuple[tuple[int, int], ...], span_starts: list[int]) -> list[int]:
    """Block borders of a segment, both ends included. Never inside a span; long spans become blocks of their own."""
    if end - start <= BLOCK_TOKENS:
        return [start, end]
    cuts = [start]
    n = bisect_right(span_starts, start - 1)
    while n < len(spans) and spans[n][0] < end:
        span_start, span_end = spans[n]
        if span_end - span_start > BLOCK_TOKENS:
            _cut_evenly(cuts, span_start, spans, span_starts)
            if cuts[-1] < span_start:
                cuts.append(span_start)
            cuts.append(span_end)
        n += 1
    _cut_evenly(cuts, end, spans, span_starts)
    if cuts[-1] < end:
        cuts.append(end)
    return cuts


def _cut_evenly(cuts: list[int], end: int, spans: tuple[tuple[int, int], ...], span_starts: list[int]) -> None:
    """Append borders before ``end`` so that blocks have about equal size, moving a border out of a span to its end."""
    while end - cuts[-1] > BLOCK_TOKENS:
        remaining = end - cuts[-1]
        cut = cuts[-1] + -(-remaining // -(-remaining // BLOCK_TOKENS))
        n = bisect_right(span_starts, cut) - 1
        if n >= 0 and spans[n][0] < cut < spans[n][1]:
            cut = spans[n][0] if spans[n][0] > cuts[-1] else spans[n][1]
        if cut >= end:
            return
        cuts.append(cut)


def _pieces(layout: PackedLayout, window: int | None) -> list[list[Piece]]:
    """Pieces per level."""
    blocks = cut_blocks(layout)
    levels: list[list[Piece]] = [[] for _ in range(max((block.level for block in blocks), default=-1) + 2)]
    span_starts = [start for start, _ in layout.bidirectional]
    positions = layout.position_ids.cpu() if window is not None else None
    for block in blocks:
        start, end, size = block.start, block.end, block.end - block.start
        n = bisect_right(span_starts, start)
        first = n - 1 if n and layout.bidirectional[n - 1][1] > start else n
        has_span = first < len(span_starts) and span_starts[first] < end
        whole = has_span and layout.bidirectional[first] == (start, end)
        if whole and (window is None or size <= window):
            kind = "open"
        else:
            kind = "explicit" if has_span else "causal"
        levels[0].append(Piece(kind, start, size, start, size))
        if block.subtree_end > end:
            rest = Piece("open", end, block.subtree_end - end, start, size)
            piece = rest if positions is None or window is None else _within_window(rest, positions, window)
            if piece is not None:
                levels[block.level + 1].append(piece)
    return [level for level in levels if level]


def _within_window(piece: Piece, positions: Tensor, window: int) -> Piece | None:
    """Drop keys that no query reaches and queries that reach no key. Keys are consecutive on the path to every query."""
    num_keys = min(piece.num_keys, window - 1)
    if num_keys == 0:
        return None
    key_start = piece.key_start + piece.num_keys - num_keys
    query_positions = positions[piece.query_start : piece.query_start + piece.num_queries]
    last_position = int(positions[key_start + num_keys - 1])
    reaching = query_positions < last_position + window
    farthest = int(query_positions[reaching].max())
    kind = "open" if farthest - int(positions[key_start]) < window else "explicit"
    if bool(reaching.all()):
        return Piece(kind, piece.query_start, piece.num_queries, key_start, num_keys)
    queries = reaching.nonzero().squeeze(1) + piece.query_start
    return Piece(kind, int(queries[0]), queries.shape[0], key_start, num_keys, queries)


def _grouped(pieces: Iterable[Piece], num_heads: int) -> list[list[Piece]]:
    """Pieces of one kind and similar size, largest first, cut into groups of least cost: launches and padding."""
    by_size: dict[tuple[str, int, int], list[Piece]] = {}
    for piece in pieces:
        by_size.setdefault((piece.kind, piece.num_queries, piece.num_keys), []).append(piece)
    groups: list[list[Piece]] = []
    for kind in sorted({kind for kind, _, _ in by_size}):
        sizes = sorted((size for size in by_size if size[0] == kind), reverse=True)
        counts = [len(by_size[size]) for size in sizes]
        for start, end in _cheapest_cuts([(q, k) for _, q, k in sizes], counts, num_heads):
            groups.append([piece for size in sizes[start:end] for piece in by_size[size]])
    return groups


def _cheapest_cuts(sizes: list[tuple[int, int]], counts: list[int], num_heads: int) -> list[tuple[int, int]]:
    """Cut sizes (queries, keys), descending in queries, into ranges that minimise ``GROUP_COST`` + scores per range."""
    best = [0.0]
    begin = [0]
    for end in range(1, len(sizes) + 1):
        cheapest, at = float("inf"), end - 1
        keys = pieces = used = 0
        for start in range(end - 1, -1, -1):
            keys = max(keys, sizes[start][1])
            pieces += counts[start]
            used += counts[start] * sizes[start][0] * sizes[start][1]
            padded = pieces * sizes[start][0] * keys
            cost = best[start] + GROUP_COST + padded * num_heads
            if cost < cheapest:
                cheapest, at = cost, start
            if (padded - used) * num_heads > GROUP_COST * (end - start):
                break  # a group per size is cheaper, and a longer range only pads more
        best.append(cheapest)
        begin.append(at)
    cuts = []
    end = len(sizes)
    while end:
        cuts.append((begin[end], end))
        end = begin[end]
    return cuts[::-1]


def _build(layout: PackedLayout, num_heads: int, num_kv_heads: int, window: int | None) -> Plan:
    levels: list[Level] = []
    num_scores = 0
    for number, pieces in enumerate(_pieces(layout, window)):
        groups = _grouped(pieces, num_heads)
        num_scores += sum(len(g) * g[0].num_queries * max(piece.num_keys for piece in g) for g in groups)
        levels.append(_build_level(layout, groups, number == 0, num_kv_heads, num_heads // num_kv_heads, window))
    return Plan(tuple(levels), num_scores)


def _build_level(
    layout: PackedLayout, grouped: list[list[Piece]], everything: bool, num_kv_heads: int, fold: int, window: int | None
) -> Level:
    groups: list[Group] = []
    query_side = _Side(num_kv_heads)
    key_side = _Side(num_kv_heads)
    for pieces in grouped:
        query_BQ, query_count = _padded(
            [piece.query_start for piece in pieces],
            [piece.num_queries for piece in pieces],
            [piece.queries for piece in pieces],
        )
        key_BL, key_count = _padded([piece.key_start for piece in pieces], [piece.num_keys for piece in pieces])
        mask, rule = _mask(layout, pieces[0].kind, query_BQ, key_BL, key_count, window)
        groups.append(
            Group(
                query_side.add(query_BQ, query_count),
                key_side.add(key_BL, key_count),
                len(pieces),
                query_BQ.shape[1],
                key_BL.shape[1],
                mask,
                rule,
            )
        )
    device = layout.device
    query_rows, padded_queries, query_tokens, query_slots = query_side.finish(everything, device)
    key_rows, _, key_tokens, key_slots = key_side.finish(everything, device)
    return Level(tuple(groups), query_rows, key_rows, padded_queries, query_tokens, key_tokens, query_slots, key_slots)


class _Side:
    """Collects the gathered rows of a level's groups, for queries or for keys."""

    def __init__(self, num_kv_heads: int) -> None:
        self.heads = torch.arange(num_kv_heads)
        self.rows: list[Tensor] = []
        self.valid: list[Tensor] = []
        self.offset = 0

    def add(self, tokens_BX: Tensor, counts_B: Tensor) -> int:
        """Add one group; returns its offset."""
        num_kv_heads = self.heads.shape[0]
        rows = tokens_BX[None] * num_kv_heads + self.heads[:, None, None]
        valid = torch.arange(tokens_BX.shape[1])[None] < counts_B[:, None]
        self.rows.append(rows.reshape(-1))
        self.valid.append(valid[None].expand(rows.shape).reshape(-1))
        offset, self.offset = self.offset, self.offset + rows.numel()
        return offset

    def finish(self, everything: bool, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """(token row of each gathered row, padding, covered token rows or None for all, their gathered rows)."""
        rows, valid = torch.cat(self.rows), torch.cat(self.valid)
        slots = valid.nonzero().squeeze(1)
        tokens, order = rows[slots].sort()
        padding = None if bool(valid.all()) else (~valid).nonzero().squeeze(1).to(device)
        return rows.to(device), padding, None if everything else tokens.to(device), slots[order].to(device)


def _padded(starts: list[int], counts: list[int], listed: list[Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
    """Token indices ``[B, X]`` padded with each piece's own first token, and the counts ``[B]``."""
    starts_B, counts_B = torch.tensor(starts), torch.tensor(counts)
    steps = torch.arange(max(counts))[None]
    tokens_BX = starts_B[:, None] + torch.where(steps < counts_B[:, None], steps, 0)
    for n, tokens in enumerate(listed or []):
        if tokens is not None:
            tokens_BX[n, : tokens.shape[0]] = tokens
    return tokens_BX, counts_B


def _mask(
    layout: PackedLayout, kind: str, query_BQ: Tensor, key_BL: Tensor, key_count: Tensor, window: int | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    device = layout.device
    num_queries, num_keys = query_BQ.shape[1], key_BL.shape[1]
    if kind == "causal":
        # One triangle for all pieces: a real query never reaches the padded keys, which come after it.
        distance = torch.arange(num_queries)[:, None] - torch.arange(num_keys)[None]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        return _additive(visible[None]).to(device), None
    if kind == "open":
        if bool((key_count == num_keys).all()):
            return None, None
        return _additive((torch.arange(num_keys)[None] < key_count[:, None])[:, None, :]).to(device), None
    query_BQ, key_BL, key_count = query_BQ.to(device), key_BL.to(device), key_count.to(device)
    if query_BQ.shape[0] * num_queries * num_keys > MASK_ENTRIES:
        return None, (query_BQ, key_BL, key_count)
    return rule_mask(layout, query_BQ, key_BL, key_count, window), None


def rule_mask(layout: PackedLayout, query_BQ: Tensor, key_BL: Tensor, key_count: Tensor, window: int | None) -> Tensor:
    """Additive mask ``[B, Q, L]`` from the layout's rule; padded keys are hidden."""
    visible = visibility(layout, query_BQ, key_BL, window)
    visible &= torch.arange(key_BL.shape[1], device=key_BL.device) < key_count[:, None, None]
    return _additive(visible)


def _additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)

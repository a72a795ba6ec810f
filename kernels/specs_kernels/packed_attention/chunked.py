"""``packed_attention`` in plain PyTorch: dense rectangles over the forest, merged by log-sum-exp.

``plan.py`` cuts the row into rectangles; here each runs as batched products in tiles of at most ``TILE_SCORES`` scores
(one row of queries against its keys at least). Nothing of size ``[T, T]`` exists, a prefix shared by many responses is
multiplied once per response token and stored once, and the query heads of one key head are folded into rows, so K and V
are never repeated.

Forward: every level gives partial (out, lse) of its queries; two partial results merge as
``lse = logaddexp(lse_a, lse_b)``, ``out = out_a + sigmoid(lse_b - lse_a) (out_b - out_a)``.
Backward: each rectangle is recomputed with the *final* lse, so its probabilities are final, and with
``D_i = sum_d dout_id out_id - dlse_i`` one has ``dscore_ij = p_ij (dout_i . v_j - D_i)``; gradients of all rectangles
add up. Memory beyond inputs and results: one level's copies of its queries and keys, and two tiles.

All sums run in a fixed order that depends on the layout and the head counts only: deterministic.

Letters: T tokens, H query heads, K key/value heads, G = H / K, D head size; rows r of gathered queries or keys; in a
tile X = products in the batch, R query rows (queries x G), L keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.plan import Group, Level, plan_for, rule_mask
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import without_autocast

TILE_SCORES = 1 << 19


@dataclass(frozen=True)
class _Setting:
    layout: PackedLayout
    scale: float
    softcap: float | None
    window: int | None
    num_kv_heads: int
    fold: int
    """G."""


@dataclass(frozen=True)
class _Tile:
    """Products ``[batch]`` of a group with their query rows; ``heads`` x ``pieces`` is that batch."""

    batch: slice
    num_heads: int
    pieces: slice
    queries: slice


def _tiles(group: Group, num_kv_heads: int, fold: int) -> Iterator[_Tile]:
    """Cover a group: whole heads, then pieces of one head, then query rows of one piece."""
    piece_scores = group.num_queries * fold * group.num_keys
    head_scores = group.batch * piece_scores
    everything, all_pieces = slice(0, group.num_queries), slice(0, group.batch)
    if head_scores <= TILE_SCORES:
        heads = TILE_SCORES // head_scores
        for head in range(0, num_kv_heads, heads):
            last = min(head + heads, num_kv_heads)
            yield _Tile(slice(head * group.batch, last * group.batch), last - head, all_pieces, everything)
        return
    pieces = max(1, TILE_SCORES // piece_scores)
    queries = group.num_queries if piece_scores <= TILE_SCORES else max(1, TILE_SCORES // (fold * group.num_keys))
    for head in range(num_kv_heads):
        for piece in range(0, group.batch, pieces):
            last = min(piece + pieces, group.batch)
            for query in range(0, group.num_queries, queries):
                yield _Tile(
                    slice(head * group.batch + piece, head * group.batch + last),
                    1,
                    slice(piece, last),
                    slice(query, min(query + queries, group.num_queries)),
                )


def _tile_mask(group: Group, tile: _Tile, setting: _Setting) -> Tensor | None:
    """Additive ``[1 or pieces, 1 or queries, L]``."""
    if group.rule is not None:
        query_BQ, key_BL, key_count = group.rule
        pieces = tile.pieces
        return rule_mask(
            setting.layout, query_BQ[pieces, tile.queries], key_BL[pieces], key_count[pieces], setting.window
        )
    mask = group.mask
    if mask is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[tile.pieces]
    return mask[:, tile.queries] if mask.shape[1] > 1 else mask


class _Rows:
    """Gathered rows of one tensor on one level, seen group by group."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def queries(self, group: Group, tile: _Tile, setting: _Setting) -> Tensor:
        """``[X, R, n]`` of rows that hold ``[G, n]`` per query."""
        count = setting.num_kv_heads * group.batch * group.num_queries
        view = self.rows[group.query_offset : group.query_offset + count]
        view = view.view(setting.num_kv_heads * group.batch, group.num_queries * setting.fold, -1)
        return view[tile.batch, tile.queries.start * setting.fold : tile.queries.stop * setting.fold]

    def keys(self, group: Group, tile: _Tile, setting: _Setting) -> Tensor:
        """``[X, L, D]``."""
        count = setting.num_kv_heads * group.batch * group.num_keys
        view = self.rows[group.key_offset : group.key_offset + count]
        return view.view(setting.num_kv_heads * group.batch, group.num_keys, -1)[tile.batch]


def _scores(query_XRD: Tensor, key_XLD: Tensor, setting: _Setting) -> tuple[Tensor, Tensor | None]:
    """Scores ``[X, R, L]`` before the mask, and with a softcap the slope d score / d (scale * q.k)."""
    nothing = query_XRD.new_empty(1, 1, 1)
    alpha = setting.scale if setting.softcap is None else setting.scale / setting.softcap
    scores = torch.baddbmm(nothing, query_XRD, key_XLD.transpose(1, 2), beta=0, alpha=alpha)
    if setting.softcap is None:
        return scores, None
    tanh = scores.tanh_()
    slope = torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1)
    return tanh.mul_(setting.softcap), slope


def _add_mask_(scores_XRL: Tensor, mask: Tensor | None, tile: _Tile, setting: _Setting) -> None:
    if mask is None:
        return
    num_keys = scores_XRL.shape[2]
    view = scores_XRL.view(tile.num_heads, tile.pieces.stop - tile.pieces.start, -1, setting.fold, num_keys)
    view.add_(mask[None, :, :, None, :])


def _level_forward(
    level: Level, query_rows: Tensor, key_rows: Tensor, value_rows: Tensor, setting: _Setting
) -> tuple[Tensor, Tensor]:
    """Partial out ``[n, G, D]`` and lse ``[n, G]`` of the token rows that the level covers."""
    query = _Rows(query_rows.index_select(0, level.query_rows))
    key = _Rows(key_rows.index_select(0, level.key_rows))
    value = _Rows(value_rows.index_select(0, level.key_rows))
    out = _Rows(torch.empty_like(query.rows))
    lse = _Rows(query.rows.new_empty(query.rows.shape[0], setting.fold))
    for group in level.groups:
        for tile in _tiles(group, setting.num_kv_heads, setting.fold):
            scores, _ = _scores(query.queries(group, tile, setting), key.keys(group, tile, setting), setting)
            _add_mask_(scores, _tile_mask(group, tile, setting), tile, setting)
            maximum = scores.amax(2, keepdim=True)
            total = scores.sub_(maximum).exp_().sum(2, keepdim=True)
            tile_out = out.queries(group, tile, setting)
            torch.bmm(scores, value.keys(group, tile, setting), out=tile_out)
            tile_out.div_(total)
            torch.add(maximum, total.log_(), out=lse.queries(group, tile, setting))
    covered = level.query_slots.shape[0]
    return (
        out.rows.index_select(0, level.query_slots).view(covered, setting.fold, -1),
        lse.rows.index_select(0, level.query_slots),
    )


def _level_backward(
    level: Level,
    query_rows: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    grad_out_rows: Tensor,
    lse_rows: Tensor,
    delta_rows: Tensor,
    setting: _Setting,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the level's query, key and value token rows; query and key still lack the factor ``scale``."""
    query = _Rows(query_rows.index_select(0, level.query_rows))
    key = _Rows(key_rows.index_select(0, level.key_rows))
    value = _Rows(value_rows.index_select(0, level.key_rows))
    grad_out = _Rows(grad_out_rows.index_select(0, level.query_rows))
    lse = _Rows(lse_rows.index_select(0, level.query_rows))
    delta = _Rows(delta_rows.index_select(0, level.query_rows))
    if level.padded_queries is not None:
        lse.rows.index_fill_(0, level.padded_queries, torch.inf)  # probability 0: padding gives no gradient
    grad_query = _Rows(torch.empty_like(query.rows))
    grad_key = _Rows(torch.empty_like(key.rows))
    grad_value = _Rows(torch.empty_like(value.rows))
    for group in level.groups:
        for tile in _tiles(group, setting.num_kv_heads, setting.fold):
            tile_query, tile_key = query.queries(group, tile, setting), key.keys(group, tile, setting)
            tile_grad_out = grad_out.queries(group, tile, setting)
            probs, slope = _scores(tile_query, tile_key, setting)
            _add_mask_(probs, _tile_mask(group, tile, setting), tile, setting)
            probs.sub_(lse.queries(group, tile, setting)).exp_()
            first = 0 if tile.queries.start == 0 else 1
            grad_value.keys(group, tile, setting).baddbmm_(probs.transpose(1, 2), tile_grad_out, beta=first)
            dscores = torch.bmm(tile_grad_out, value.keys(group, tile, setting).transpose(1, 2))
            dscores.sub_(delta.queries(group, tile, setting)).mul_(probs)
            if slope is not None:
                dscores.mul_(slope)
            torch.bmm(dscores, tile_key, out=grad_query.queries(group, tile, setting))
            grad_key.keys(group, tile, setting).baddbmm_(dscores.transpose(1, 2), tile_query, beta=first)
    return (
        grad_query.rows.index_select(0, level.query_slots),
        grad_key.rows.index_select(0, level.key_slots),
        grad_value.rows.index_select(0, level.key_slots),
    )


def _add_rows_(total: Tensor, token_rows: Tensor | None, part: Tensor) -> None:
    """Add to rows that occur once each."""
    if token_rows is None:
        total.add_(part)
    else:
        total.index_copy_(0, token_rows, total.index_select(0, token_rows).add_(part))


class _PackedAttention(torch.autograd.Function):
    """query ``[T, H, D]``, key and value ``[T, K, D]`` -> out ``[T, H, D]``, lse ``[T, H]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, setting: _Setting) -> tuple[Tensor, Tensor]:
        num_tokens, num_heads, head_dim = query.shape
        fold = setting.fold
        rows = num_tokens * setting.num_kv_heads
        query_rows, key_rows, value_rows = _token_rows(query, key, value, setting)
        out = torch.zeros(rows, fold, head_dim, dtype=query_rows.dtype, device=query.device)
        lse = torch.zeros(rows, fold, dtype=query_rows.dtype, device=query.device)
        plan = plan_for(setting.layout, num_heads, setting.num_kv_heads, setting.window)
        for level in plan.levels:
            part_out, part_lse = _level_forward(level, query_rows, key_rows, value_rows, setting)
            if level.query_tokens is None:
                out, lse = part_out, part_lse
                continue
            old_out, old_lse = out.index_select(0, level.query_tokens), lse.index_select(0, level.query_tokens)
            share = torch.sigmoid(part_lse - old_lse)
            out.index_copy_(0, level.query_tokens, old_out.lerp_(part_out, share[..., None]))
            lse.index_copy_(0, level.query_tokens, torch.logaddexp(old_lse, part_lse))
        out = out.view(num_tokens, num_heads, head_dim).to(query.dtype)
        lse = lse.view(num_tokens, num_heads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.setting = setting
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("packed_attention")
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 4
        return *_gradients(grad_out, grad_lse, query, key, value, out, lse, ctx.setting), None


def _gradients(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    setting: _Setting,
) -> tuple[Tensor, ...]:
    num_tokens, num_heads, _ = query.shape
    dtype = lse.dtype
    with without_autocast(query.device):
        query_rows, key_rows, value_rows = _token_rows(query, key, value, setting)
        if grad_out is None:
            grad_out_rows, delta = torch.zeros_like(query_rows), torch.zeros_like(lse)
        else:
            grad_out_rows = grad_out.to(dtype).reshape(query_rows.shape)
            delta = (grad_out_rows.view(out.shape) * out).sum(2)
        if grad_lse is not None:
            delta = delta - grad_lse
        rows = (num_tokens * setting.num_kv_heads, setting.fold)
        grads = [torch.zeros_like(query_rows), torch.zeros_like(key_rows), torch.zeros_like(value_rows)]
        plan = plan_for(setting.layout, num_heads, setting.num_kv_heads, setting.window)
        for level in plan.levels:
            parts = _level_backward(
                level,
                query_rows,
                key_rows,
                value_rows,
                grad_out_rows,
                lse.reshape(rows),
                delta.reshape(rows),
                setting,
            )
            if level.query_tokens is None:
                grads = list(parts)
                continue
            for total, tokens, part in zip(
                grads, (level.query_tokens, level.key_tokens, level.key_tokens), parts, strict=True
            ):
                _add_rows_(total, tokens, part)
        grads[0].mul_(setting.scale)
        grads[1].mul_(setting.scale)
    return tuple(
        grad.view(tensor.shape).to(tensor.dtype) for grad, tensor in zip(grads, (query, key, value), strict=True)
    )


def _token_rows(query: Tensor, key: Tensor, value: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``t * K + k``: query ``[T * K, G * D]``, key and value ``[T * K, D]``, in the accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    rows = query.shape[0] * setting.num_kv_heads
    return (
        query.to(dtype).reshape(rows, setting.fold * query.shape[2]),
        key.to(dtype).reshape(rows, key.shape[2]),
        value.to(dtype).reshape(rows, value.shape[2]),
    )


def _setting(
    query: Tensor, key: Tensor, layout: PackedLayout, scale: float, softcap: float | None, window: int | None
) -> _Setting:
    num_kv_heads = key.shape[1]
    return _Setting(layout, scale, softcap, window, num_kv_heads, query.shape[1] // num_kv_heads)


def packed_attention_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`specs_kernels.packed_attention`; returns (out, lse)."""
    out, lse = _PackedAttention.apply(query, key, value, _setting(query, key, layout, scale, softcap, window))
    return out, lse


def packed_attention_chunked_gradient(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, in their shapes and dtype, from inputs and results of :func:`packed_attention_chunked`.

    One upstream gradient may be None.
    """
    setting = _setting(query, key, layout, scale, softcap, window)
    return _gradients(grad_out, grad_lse, query, key, value, out, lse, setting)

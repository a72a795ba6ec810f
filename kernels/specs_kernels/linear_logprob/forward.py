"""The forward of ``linear_logprob``: statistics of all rows, with a cache of scores or the frozen head's vectors on request.

Columns are the outer loop, so each slice of the weight is fetched (and upcast) once for all rows. Rows from several tiles
share nothing but the weight.

Letters: M targets that count, D hidden size, V vocabulary, R rows and C columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels.linear_logprob.head import Head, Rows, Tiling, product_, slices
from specs_kernels.linear_logprob.row_pass import RowGradients, RowPass, RowState


@dataclass(frozen=True, slots=True)
class Cache:
    """Scores of the first rows, for the backward.

    scores: ``[P, V]`` with P a multiple of the row block. offsets: per tile of columns ``[P]`` or None: what to add to the
    scores (``row_pass.py``); None where the cache holds products. rows: how many of the P rows are targets. A fused backend
    uses both as it likes: the same memory in another order, and its offsets in one tensor.
    """

    scores: Tensor
    offsets: list[Tensor | None]
    rows: int

    @staticmethod
    def empty(num_rows: int, head: Head, tiles: Tiling, dtype: torch.dtype, room: Tensor | None = None) -> Cache:
        """room: ``[at least P, V]`` to use instead of new memory."""
        padded = -(-num_rows // tiles.row_block) * tiles.row_block
        if room is None:
            room = torch.empty(padded, head.vocab_size, dtype=dtype, device=head.weight_VD.device)
        scores = room[:padded]
        return Cache(scores, [None] * -(-head.vocab_size // tiles.tile_columns), num_rows)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Per target: the state after all columns (``row_pass.py``), log s and t / s."""

    state: RowState
    log_total: Tensor
    mean: Tensor | None

    @property
    def logp(self) -> Tensor:
        return (self.state.target - self.state.maximum) - self.log_total

    @property
    def entropy(self) -> Tensor | None:
        return None if self.mean is None else self.log_total - self.mean

    @property
    def lse(self) -> Tensor:
        return self.state.maximum + self.log_total

    def gradients(self, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None) -> RowGradients:
        """For upstream gradients ``[M]``, of which one at least is there."""
        base = torch.zeros_like(self.log_total) if grad_lse is None else grad_lse.to(self.log_total.dtype)
        if grad_logp is not None:
            grad_logp = grad_logp.to(base.dtype)
            base = base - grad_logp
        if grad_entropy is not None:
            assert self.mean is not None
            grad_entropy = grad_entropy.to(base.dtype)
            # The mean of a row of NaN that passes no gradient must not reach its base.
            base = torch.addcmul(base, grad_entropy, torch.where(grad_entropy == 0, 0.0, self.mean))
        return RowGradients(self.state.maximum, self.log_total, base, grad_entropy, grad_logp)


def _finish(state: RowState) -> Statistics:
    mean = None if state.weighted is None else state.weighted / state.total
    return Statistics(state, state.total.log(), mean)


def empty_state(num_rows: int, want_entropy: bool, dtype: torch.dtype, device: torch.device) -> RowState:
    data = torch.zeros(4, num_rows, dtype=dtype, device=device)
    return RowState(data[0], data[1], data[2] if want_entropy else None, data[3])


def forward_statistics(
    head: Head,
    rows: Rows,
    target_M: Tensor,
    tiles: Tiling,
    row_pass: RowPass,
    want_entropy: bool,
    cache: Cache | None = None,
) -> Statistics:
    """Statistics of all rows; ``cache`` is filled with the scores of its rows."""
    state = empty_state(rows.count, want_entropy, head.dtype, target_M.device)
    if rows.count == 0 or row_pass.statistics(rows, head, target_M, state, cache):
        return _finish(state)
    cached = 0 if cache is None else cache.rows
    pieces = [(piece, True) for piece in slices(0, cached, tiles.tile_rows)]
    pieces += [(piece, False) for piece in slices(cached, rows.count, tiles.tile_rows)]
    buffer = _Buffer(head, tiles, rows.count)
    for tile, columns in enumerate(slices(0, head.vocab_size, tiles.tile_columns)):
        operands = head.columns(columns)
        offsets = []
        for piece, keep in pieces:
            padded = slice(
                piece.start, piece.start + -(-(piece.stop - piece.start) // tiles.row_block) * tiles.row_block
            )
            keep_PC = cache.scores[padded, columns] if keep and cache is not None else None
            in_place = keep_PC is not None and keep_PC.dtype == head.dtype
            x_PC = keep_PC if in_place and keep_PC is not None else buffer.tile(padded.stop - padded.start, columns)
            rows.products_(x_PC, piece.start, operands)
            count = piece.stop - piece.start
            offset = row_pass.stats(
                x_PC[:count],
                target_M[piece],
                columns.start,
                head.transform(piece, columns),
                state.rows(piece),
                keep_RC=None if keep_PC is None else keep_PC[:count],
            )
            if keep:
                offsets.append(offset)
        if cache is not None and offsets and offsets[0] is not None:
            cache.offsets[tile] = offsets[0] if len(offsets) == 1 else torch.cat([o for o in offsets if o is not None])
    return _finish(state)


class _Buffer:
    """Room for one tile, handed out in the shape asked for."""

    def __init__(self, head: Head, tiles: Tiling, num_rows: int) -> None:
        rows = min(tiles.tile_rows, -(-num_rows // tiles.row_block) * tiles.row_block)
        self._data = torch.empty(rows * tiles.tile_columns, dtype=head.dtype, device=head.weight_VD.device)

    def tile(self, num_rows: int, columns: slice) -> Tensor:
        num_columns = columns.stop - columns.start
        return self._data[: num_rows * num_columns].view(num_rows, num_columns)


@dataclass(frozen=True, slots=True)
class FrozenVectors:
    """Gradients of log-prob and entropy with respect to the hidden state, ``[M, D]`` each, for upstream gradients of 1.

    of_logp: ``sum_j dz_j/dlogp W_j`` and so on, all factors of the head included, rounded to the dtype of hidden.
    """

    of_logp: Tensor
    of_entropy: Tensor | None


def frozen_forward(
    head: Head,
    rows: Rows,
    target_M: Tensor,
    tiles: Tiling,
    row_pass: RowPass,
    want_entropy: bool,
    entropy_grad: bool,
    vector_dtype: torch.dtype,
) -> tuple[Statistics, FrozenVectors]:
    """Statistics and the vectors that turn the backward of a frozen head into a row scale.

    With e_j = exp(z_j - m) slope_j over all columns but the target's, sums of ``e_j W_j`` and ``e_j (z_j - m) W_j`` run along
    with the statistics and are rescaled when a row's maximum grows. The target column joins at the end, in the arithmetic
    dtype, with 1 - p computed as ``-expm1(logp)``: nothing cancels when p is close to 1.
    """
    state = empty_state(rows.count, want_entropy, head.dtype, target_M.device)
    width = head.weight_VD.shape[1] + (0 if head.lora_B is None else head.lora_B.shape[1])
    sums = [rows.hidden_MD.new_zeros(rows.count, width, dtype=head.dtype) for _ in range(1 + entropy_grad)]
    if rows.count and row_pass.sums(rows, head, target_M, state, sums):
        statistics = _finish(state)
        return statistics, _frozen_vectors(head, statistics, target_M, sums, vector_dtype)
    buffer, second = _Buffer(head, tiles, rows.count), _Buffer(head, tiles, rows.count if entropy_grad else 0)
    same = head.operand == head.dtype
    for columns in slices(0, head.vocab_size, tiles.tile_columns):
        operands = head.columns(columns)
        for piece in slices(0, rows.count, tiles.tile_rows):
            count = piece.stop - piece.start
            padded = -(-count // tiles.row_block) * tiles.row_block
            x_PC = buffer.tile(padded, columns)
            rows.products_(x_PC, piece.start, operands)
            x_RC = x_PC[:count]
            exp_RC = x_RC if same else torch.empty_like(x_RC, dtype=head.operand)
            weighted_RC = None
            if entropy_grad:
                weighted_RC = second.tile(count, columns) if same else torch.empty_like(x_RC, dtype=head.operand)
            change = row_pass.stats_exp(
                x_RC,
                target_M[piece],
                columns.start,
                head.transform(piece, columns),
                state.rows(piece),
                exp_RC,
                weighted_RC,
            )
            parts = [part[piece] for part in sums]
            if columns.start:
                scale = torch.exp(change)[:, None]
                if entropy_grad:
                    parts[1].addcmul_(change.clamp(min=-1e5)[:, None], parts[0]).mul_(scale)
                parts[0].mul_(scale)
            for part, weights_RC in zip(parts, (exp_RC, weighted_RC), strict=False):
                assert weights_RC is not None
                product_(part[:, : operands.weight_CD.shape[1]], weights_RC, operands.weight_CD, 1, 1)
                if operands.lora_CK is not None:
                    product_(part[:, operands.weight_CD.shape[1] :], weights_RC, operands.lora_CK, 1, 1)
    statistics = _finish(state)
    return statistics, _frozen_vectors(head, statistics, target_M, sums, vector_dtype)


def target_weight(head: Head, target_M: Tensor) -> Tensor:
    """``[M, D + K]`` in the arithmetic dtype: the target's row of the weight (and of lora_B); 0 where there is no target."""
    column = target_M.clamp(min=0)
    row = head.weight_VD.index_select(0, column).to(head.dtype)
    if head.lora_B is not None:
        row = torch.cat((row, head.lora_B.index_select(0, column).to(head.dtype)), dim=1)
    return row.mul_((target_M >= 0)[:, None])


def to_hidden(head: Head, values: Tensor) -> Tensor:
    """``[M, D + K]`` -> ``[M, D]``: the low-rank part goes through lora_A."""
    if head.lora_A is None:
        return values
    dim = head.weight_VD.shape[1]
    return torch.addmm(values[:, :dim], values[:, dim:], head.lora_A.to(values.dtype))


def _frozen_vectors(
    head: Head, statistics: Statistics, target_M: Tensor, sums: list[Tensor], dtype: torch.dtype
) -> FrozenVectors:
    state = statistics.state
    inverse = head.inverse_temperature
    late = inverse[:, None] if isinstance(inverse, Tensor) else inverse
    weight_MD = target_weight(head, target_M)
    slope_M = head.slope(state.target)
    inverse_total = state.total.reciprocal()[:, None]
    has_target = target_M >= 0
    logp = statistics.logp
    rest = torch.where(has_target, -torch.expm1(logp), 0.0) * slope_M * head.factor
    of_logp = torch.addcmul(weight_MD * rest[:, None], sums[0] * late, inverse_total, value=-head.factor)
    of_entropy = None
    if len(sums) > 1:
        assert statistics.mean is not None
        shifted = state.target - state.maximum
        target_part = torch.where(has_target, logp.exp() * (shifted - statistics.mean), 0.0) * slope_M
        others = torch.addcmul(sums[1], sums[0], statistics.mean[:, None], value=-1) * inverse_total
        of_entropy = torch.addcmul(others * late, weight_MD, target_part[:, None]).mul_(-head.factor)
        of_entropy = to_hidden(head, of_entropy).to(dtype)
    return FrozenVectors(to_hidden(head, of_logp).to(dtype), of_entropy)


def frozen_backward(
    head: Head,
    statistics: Statistics,
    vectors: FrozenVectors,
    target_M: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Gradient of hidden ``[M, D]``: a row scale of the vectors.

    The log-sum-exp's is ``sum_j p_j slope_j W_j``, the target's own row of the weight minus the vector of the log-prob.
    """
    grad_logp, grad_entropy, grad_lse = grads
    dhidden = torch.zeros(vectors.of_logp.shape, dtype=head.dtype, device=vectors.of_logp.device)
    if grad_logp is not None:
        dhidden.addcmul_(vectors.of_logp, grad_logp[:, None])
    if grad_entropy is not None:
        assert vectors.of_entropy is not None
        dhidden.addcmul_(vectors.of_entropy, grad_entropy[:, None])
    if grad_lse is not None:
        scale = head.slope(statistics.state.target) * head.factor
        own = target_weight(head, target_M) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        dhidden.addcmul_(to_hidden(head, own) - vectors.of_logp, grad_lse[:, None])
    return dhidden

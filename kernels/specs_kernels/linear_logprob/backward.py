"""The backward of ``linear_logprob``: gradients of hidden, weight, bias and the low-rank addition from tiles of dx.

Columns are the outer loop: every row of the weight's gradient is summed over the tiles of rows in one buffer of a tile's
columns and rounded once. Only the gradient of hidden is accumulated across column tiles, in the arithmetic dtype.

Letters: M targets that count, D hidden size, V vocabulary, K rank, R rows and C columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels.linear_logprob.forward import Cache
from specs_kernels.linear_logprob.head import Head, Rows, Tiling, product_, slices
from specs_kernels.linear_logprob.row_pass import RowGradients, RowPass


@dataclass(slots=True)
class Gradients:
    """What is wanted, and where it goes; each None when not wanted.

    hidden_MD: in the arithmetic dtype, one row per target. weight, bias, lora_A, lora_B: in the shape of the tensor; their
    dtype is the arithmetic one where ``accumulate`` (several calls add up), else that of the tensor.
    """

    hidden_MD: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    accumulate: bool = False


def backward_tiles(
    head: Head,
    rows: Rows,
    target_M: Tensor,
    gradients_M: RowGradients,
    into: Gradients,
    tiles: Tiling,
    row_pass: RowPass,
    cache: Cache | None = None,
    cache_rows: Tensor | None = None,
) -> None:
    """Fill ``into``. The cache has the scores of the first rows; ``cache_rows``: their places there, when rows were dropped."""
    low_grad: Tensor | None = None
    if rows.low_MK is not None and (into.hidden_MD is not None or into.lora_A is not None):
        low_grad = torch.zeros(rows.low_MK.shape, dtype=head.dtype, device=target_M.device)
    if rows.count and row_pass.gradients(rows, head, target_M, gradients_M, into, low_grad, cache, cache_rows):
        if low_grad is not None:
            _through_lora_A(head, rows, low_grad, into)
        return
    cached = 0 if cache is None else (cache.rows if cache_rows is None else cache_rows.shape[0])
    pieces = [(piece, True) for piece in slices(0, cached, tiles.tile_rows)]
    pieces += [(piece, False) for piece in slices(cached, rows.count, tiles.tile_rows)]
    device, count = target_M.device, rows.count
    size = min(tiles.tile_rows, -(-count // tiles.row_block) * tiles.row_block) * tiles.tile_columns
    products = torch.empty(size, dtype=head.dtype, device=device)
    outputs = products if head.operand == head.dtype else torch.empty(size, dtype=head.operand, device=device)
    weight_sum = _Sum(into.weight, into.accumulate, head.factor, tiles, head.dtype)
    lora_sum = _Sum(into.lora_B, into.accumulate, head.factor, tiles, head.dtype)
    bias_sum = _Sum(into.bias, into.accumulate, head.early, tiles, head.dtype)
    for tile, columns in enumerate(slices(0, head.vocab_size, tiles.tile_columns)):
        operands = head.columns(columns)
        num_columns = columns.stop - columns.start
        for piece, from_cache in pieces:
            num_rows = piece.stop - piece.start
            offset_R, scratch = None, True
            if from_cache and cache is not None:
                x_RC, offset_R, scratch = _cached(cache, cache_rows, tile, piece, columns)
            else:
                padded = -(-num_rows // tiles.row_block) * tiles.row_block
                x_PC = products[: padded * num_columns].view(padded, num_columns)
                rows.products_(x_PC, piece.start, operands)
                x_RC = x_PC[:num_rows]
            dx_RC = outputs[: num_rows * num_columns].view(num_rows, num_columns)
            row_pass.dscores(
                x_RC,
                target_M[piece],
                columns.start,
                head.transform(piece, columns),
                gradients_M.rows(piece),
                dx_RC,
                offset_R=offset_R,
                scratch=scratch,
            )
            beta = 1 if columns.start else 0
            if into.hidden_MD is not None:
                product_(into.hidden_MD[piece], dx_RC, operands.weight_CD, beta, head.factor)
            if low_grad is not None and operands.lora_CK is not None:
                product_(low_grad[piece], dx_RC, operands.lora_CK, 1, head.factor)
            weight_sum.add(columns, dx_RC, rows.hidden_MD[piece])
            if rows.low_MK is not None:
                lora_sum.add(columns, dx_RC, rows.low_MK[piece])
            bias_sum.add(columns, dx_RC, None)
        for total in (weight_sum, lora_sum, bias_sum):
            total.finish(columns)
    if low_grad is not None:
        _through_lora_A(head, rows, low_grad, into)


def _cached(
    cache: Cache, cache_rows: Tensor | None, tile: int, piece: slice, columns: slice
) -> tuple[Tensor, Tensor | None, bool]:
    """Scores, offset, and whether the scores may be overwritten."""
    offset = cache.offsets[tile]
    if cache_rows is None:
        return cache.scores[piece, columns], None if offset is None else offset[piece], False
    index = cache_rows[piece]
    return (
        cache.scores[:, columns].index_select(0, index),
        None if offset is None else offset.index_select(0, index),
        True,
    )


def _through_lora_A(head: Head, rows: Rows, low_grad_MK: Tensor, into: Gradients) -> None:
    assert head.lora_A is not None
    if into.hidden_MD is not None:
        into.hidden_MD.addmm_(low_grad_MK, head.lora_A.to(head.dtype))
    if into.lora_A is not None:
        total = torch.mm(low_grad_MK.T, rows.hidden_MD.to(head.dtype))
        if into.accumulate:
            into.lora_A.add_(total)
        else:
            into.lora_A.copy_(total)


class _Sum:
    """``factor * sum over tiles of dx.T @ operand`` (or of dx itself), one slice of columns at a time, rounded once."""

    def __init__(self, out: Tensor | None, accumulate: bool, factor: float, tiles: Tiling, dtype: torch.dtype) -> None:
        self.out, self.accumulate, self.factor = out, accumulate, factor
        self._fresh = True
        self._buffer: Tensor | None = None
        if out is not None and (out.dtype != dtype or not out.is_contiguous()):
            self._buffer = torch.empty((tiles.tile_columns, *out.shape[1:]), dtype=dtype, device=out.device)

    def add(self, columns: slice, dx_RC: Tensor, operand: Tensor | None) -> None:
        if self.out is None:
            return
        total = self.out[columns] if self._buffer is None else self._buffer[: columns.stop - columns.start]
        keep = self.accumulate and self._buffer is None
        if operand is None:
            part = dx_RC.sum(0, dtype=total.dtype).mul_(self.factor)
            total.copy_(part) if self._fresh and not keep else total.add_(part)
        else:
            product_(total, dx_RC.T, operand, 0 if self._fresh and not keep else 1, self.factor)
        self._fresh = False

    def finish(self, columns: slice) -> None:
        if self.out is None:
            return
        if self._fresh:
            if not self.accumulate:
                self.out[columns].zero_()
        elif self._buffer is not None:
            part = self._buffer[: columns.stop - columns.start]
            self.out[columns].add_(part) if self.accumulate else self.out[columns].copy_(part)
        self._fresh = True

"""The row passes of ``linear_logprob`` in C++ on CPU (``csrc/cpu/row_pass*``): one sweep over a tile between two GEMMs.

Each row of a tile is read from the shared cache once, in pieces that stay in the core's own: maximum, then exponentials and sums;
the gradient takes one read and one write. Rows are shared among PyTorch's threads. Deterministic, whatever the number of threads,
and a row's result depends on its own values only. No workspace beyond one row per thread.

``row_pass.py`` says what every pass computes. Letters: R rows and C columns of one tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import RowGradients, RowState, Transform

if TYPE_CHECKING:
    from specs_kernels.linear_logprob.backward import Gradients
    from specs_kernels.linear_logprob.forward import Cache
    from specs_kernels.linear_logprob.head import Head, Rows

_TransformArguments = tuple[Tensor | None, float, Tensor | None, float]


def _arguments(transform: Transform) -> _TransformArguments:
    """bias, softcap (0: none), inverse temperatures, inverse temperature."""
    inverse = transform.inverse_temperature
    softcap = 0.0 if transform.softcap is None else transform.softcap
    if isinstance(inverse, Tensor):
        return transform.bias_C, softcap, inverse, 1.0
    return transform.bias_C, softcap, None, inverse


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _operands(rows: Rows, head: Head, target_M: Tensor) -> tuple[object, ...]:
    """What the forward and the backward take first: factors of the products, targets, and how scores follow."""
    inverse = head.inverse_temperature
    return (
        rows.hidden_MD,
        _with_rows(head.weight_VD),
        None if rows.low_MK is None else _with_rows(rows.low_MK),
        None if head.lora_B is None else _with_rows(head.lora_B),
        target_M.contiguous(),
        head.factor,
        _dense(head.bias_V),
        0.0 if head.softcap is None else head.softcap,
        inverse.contiguous() if isinstance(inverse, Tensor) else None,
        1.0 if isinstance(inverse, Tensor) else inverse,
    )


def _with_rows(x: Tensor) -> Tensor:
    """The same matrix with the numbers of a row side by side; a copy only where they are not."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def offset_tiles(vocab_size: int) -> int:
    """Blocks of columns that have offsets of their own in a cache of half precision."""
    return -(-vocab_size // int(torch.ops.specs_kernels.linear_block()))


class NativeRowPass:
    """:class:`~specs_kernels.linear_logprob.row_pass.RowPass` in C++; nothing is overwritten but the outputs.

    Half precision goes with fp32 statistics only: a ``keep_RC`` of fp64 products must be fp64 too.
    """

    def statistics(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, cache: Cache | None) -> bool:
        offsets = None
        if cache is not None and cache.scores.dtype != head.dtype:
            offsets = head.weight_VD.new_empty(offset_tiles(head.vocab_size), cache.rows, dtype=head.dtype)
            cache.offsets[:] = [offsets]
        torch.ops.specs_kernels.linear_forward(
            *_operands(rows, head, target_M),
            state.maximum,
            state.total,
            state.weighted,
            state.target,
            None if cache is None else cache.scores,
            0 if cache is None else cache.rows,
            offsets,
            None,
            None,
        )
        return True

    def sums(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, sums: list[Tensor]) -> bool:
        torch.ops.specs_kernels.linear_forward(
            *_operands(rows, head, target_M),
            state.maximum,
            state.total,
            state.weighted,
            state.target,
            None,
            0,
            None,
            sums[0],
            sums[1] if len(sums) > 1 else None,
        )
        return True

    def gradients(
        self,
        rows: Rows,
        head: Head,
        target_M: Tensor,
        gradients_M: RowGradients,
        into: Gradients,
        low_grad_MK: Tensor | None,
        cache: Cache | None,
        cache_rows: Tensor | None,
    ) -> bool:
        cached = 0 if cache is None else (cache.rows if cache_rows is None else cache_rows.shape[0])
        outputs = (into.weight, into.lora_B, into.bias)
        weight, lora_B, bias = (_dense(x) for x in outputs)
        torch.ops.specs_kernels.linear_backward(
            *_operands(rows, head, target_M),
            _dense(gradients_M.maximum),
            _dense(gradients_M.log_total),
            _dense(gradients_M.base),
            _dense(gradients_M.entropy),
            _dense(gradients_M.target),
            None if cache is None or not cached else cache.scores,
            cached,
            None if cache_rows is None or not cached else cache_rows,
            cache.offsets[0] if cache is not None and cached and cache.scores.dtype != head.dtype else None,
            into.hidden_MD,
            low_grad_MK,
            weight,
            lora_B,
            bias,
            head.early,
            into.accumulate,
        )
        for own, made in zip(outputs, (weight, lora_B, bias), strict=True):
            if own is not None and made is not None and made is not own:
                own.copy_(made)
        return True

    def _stats(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        keep_RC: Tensor | None = None,
        exp_RC: Tensor | None = None,
        weighted_RC: Tensor | None = None,
    ) -> Tensor | None:
        offset_R = None if keep_RC is None and exp_RC is None else torch.empty_like(state.maximum)
        torch.ops.specs_kernels.row_pass_stats(
            x_RC,
            target_R,
            first,
            *_arguments(transform),
            state.maximum,
            state.total,
            state.weighted,
            state.target,
            keep_RC,
            exp_RC,
            weighted_RC,
            offset_R,
        )
        return offset_R

    def stats(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        *,
        keep_RC: Tensor | None = None,
        scratch: bool = True,
    ) -> Tensor | None:
        if keep_RC is None or keep_RC.dtype == x_RC.dtype:
            if keep_RC is not None and keep_RC.data_ptr() != x_RC.data_ptr():
                keep_RC.copy_(x_RC)
            return self._stats(x_RC, target_R, first, transform, state)
        return self._stats(x_RC, target_R, first, transform, state, keep_RC)

    def stats_exp(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        state: RowState,
        exp_RC: Tensor,
        weighted_RC: Tensor | None,
    ) -> Tensor:
        change_R = self._stats(x_RC, target_R, first, transform, state, None, exp_RC, weighted_RC)
        assert change_R is not None
        return change_R

    def dscores(
        self,
        x_RC: Tensor,
        target_R: Tensor,
        first: int,
        transform: Transform,
        gradients: RowGradients,
        dx_RC: Tensor,
        *,
        offset_R: Tensor | None = None,
        scratch: bool = True,
    ) -> None:
        torch.ops.specs_kernels.row_pass_gradients(
            x_RC,
            target_R,
            first,
            *_arguments(transform),
            gradients.maximum,
            gradients.log_total,
            gradients.base,
            gradients.entropy,
            gradients.target,
            offset_R,
            dx_RC,
        )

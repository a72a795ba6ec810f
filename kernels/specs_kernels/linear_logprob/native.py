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
    from specs_kernels.linear_logprob.head import Head, Rows

_TransformArguments = tuple[Tensor | None, float, Tensor | None, float]


def _arguments(transform: Transform) -> _TransformArguments:
    """bias, softcap (0: none), inverse temperatures, inverse temperature."""
    inverse = transform.inverse_temperature
    softcap = 0.0 if transform.softcap is None else transform.softcap
    if isinstance(inverse, Tensor):
        return transform.bias_C, softcap, inverse, 1.0
    return transform.bias_C, softcap, None, inverse


class NativeRowPass:
    """:class:`~specs_kernels.linear_logprob.row_pass.RowPass` in C++; nothing is overwritten but the outputs.

    Half precision goes with fp32 statistics only: a ``keep_RC`` of fp64 products must be fp64 too.
    """

    def statistics(self, rows: Rows, head: Head, target_M: Tensor, state: RowState) -> bool:
        return False

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

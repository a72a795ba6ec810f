"""The row passes of ``linear_logprob`` in Triton: one sweep over a tile of products between two GEMMs.

One program per row. The softmax statistics of a tile are kept per lane and in units of scores before the temperature, then
merged once into the running state of the row. Passes that write what depends on the tile's maximum (``stats`` with a
lower-precision ``keep_RC``, ``stats_exp``) go over the row twice; the second time it comes from cache.

``row_pass.py`` says what every pass computes. Deterministic, 64-bit offsets, no host synchronisation.

Letters: R rows and C columns of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import RowGradients, RowPass, RowState, Transform
from specs_kernels.linear_logprob.triton_forward import fused_statistics
from specs_kernels.linear_logprob.triton_kernels import dscores_kernel, stats_kernel
from specs_kernels.triton_common import TL_DTYPES, launch, strided

if TYPE_CHECKING:
    from specs_kernels.linear_logprob.forward import Cache
    from specs_kernels.linear_logprob.head import Head, Rows

_STATS_WARPS = 4
_STATS_SUB = 4
"""Tiles of this many 16-byte loads per thread: one extra exponential per _STATS_SUB scores."""
_WRITE_WARPS = 4


def _dense(vector: Tensor | None) -> Tensor | None:
    """Callers slice targets and biases out of strided tensors, and PyTorch expands the gradient of a sum from one number."""
    return None if vector is None else vector.contiguous()


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


class TritonRowPass(RowPass):
    """:class:`~specs_kernels.linear_logprob.row_pass.RowPass` in Triton; nothing is overwritten but the outputs.

    fused: whether the forward runs in one kernel, without scores in memory; None: for half-precision weights, since in fp32
    ``tl.dot`` has no tensor cores to use and the GEMM library's tiles are better. Which is faster is not measured.
    """

    def __init__(self, fused: bool | None = None) -> None:
        self.fused = fused

    def statistics(self, rows: Rows, head: Head, target_M: Tensor, state: RowState, cache: Cache | None) -> bool:
        """The fused forward. A low-rank addition to the head, or scores to keep, go through tiles of scores instead."""
        half = head.weight_VD.dtype in (torch.float16, torch.bfloat16)
        if cache is not None or head.lora_B is not None or not (half if self.fused is None else self.fused):
            return False
        fused_statistics(
            rows.hidden_MD,
            head.weight_VD,
            target_M,
            head.bias_V,
            head.inverse_temperature,
            head.softcap,
            head.factor,
            state,
        )
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
        num_rows, num_columns = x_RC.shape
        out = keep_RC if exp_RC is None else exp_RC
        offset_R = None if out is None else torch.empty_like(state.maximum)
        if num_rows == 0 or num_columns == 0:
            return offset_R
        inverse, stride_temperature = strided(transform.inverse_temperature, state.total.dtype, x_RC.device)
        launch(
            stats_kernel,
            num_rows,
            x_RC.device,
            num_warps=_STATS_WARPS,
            x=x_RC,
            target=_dense(target_R),
            bias=_dense(transform.bias_C),
            inverse_temperature=inverse,
            maximum=state.maximum,
            total=state.total,
            weighted=state.weighted,
            found=state.target,
            keep=keep_RC,
            offset=offset_R,
            exp_out=exp_RC,
            weighted_out=weighted_RC,
            stride_x=x_RC.stride(0),
            stride_keep=_row_stride(keep_RC),
            stride_exp=_row_stride(exp_RC),
            stride_weighted=_row_stride(weighted_RC),
            stride_temperature=stride_temperature,
            C=num_columns,
            first=first,
            SOFTCAP=transform.softcap,
            ACC=TL_DTYPES[state.total.dtype],
            BIAS=transform.bias_C is not None,
            TEMPERATURE=inverse is not None,
            ENTROPY=state.weighted is not None,
            FIRST=first == 0,
            KEEP=keep_RC is not None,
            EXP=exp_RC is not None,
            WEIGHTED=weighted_RC is not None,
            SUB=_STATS_SUB,
            LANES=_STATS_WARPS * 32 * 16 // x_RC.dtype.itemsize,
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
        if keep_RC is not None and keep_RC.dtype == x_RC.dtype:
            self._stats(x_RC, target_R, first, transform, state)
            if keep_RC.data_ptr() != x_RC.data_ptr():
                keep_RC.copy_(x_RC)
            return None
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
        rescale = self._stats(x_RC, target_R, first, transform, state, None, exp_RC, weighted_RC)
        assert rescale is not None
        return rescale

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
        num_rows, num_columns = x_RC.shape
        if num_rows == 0 or num_columns == 0:
            return
        inverse, stride_temperature = strided(transform.inverse_temperature, gradients.base.dtype, x_RC.device)
        arguments: dict[str, Any] = {
            "x": x_RC,
            "dx": dx_RC,
            "target": _dense(target_R),
            "bias": _dense(transform.bias_C),
            "inverse_temperature": inverse,
            "maximum": _dense(gradients.maximum),
            "log_total": _dense(gradients.log_total),
            "base": _dense(gradients.base),
            "grad_entropy": _dense(gradients.entropy),
            "grad_logp": _dense(gradients.target),
            "offset": _dense(offset_R),
        }
        launch(
            dscores_kernel,
            num_rows,
            x_RC.device,
            num_warps=_WRITE_WARPS,
            **arguments,
            stride_x=x_RC.stride(0),
            stride_dx=dx_RC.stride(0),
            stride_temperature=stride_temperature,
            C=num_columns,
            first=first,
            SOFTCAP=transform.softcap,
            ACC=TL_DTYPES[gradients.base.dtype],
            BIAS=transform.bias_C is not None,
            TEMPERATURE=inverse is not None,
            ENTROPY=gradients.entropy is not None,
            LOGP=gradients.target is not None,
            OFFSET=offset_R is not None,
            BLOCK=_WRITE_WARPS * 32 * 16,
        )

"""``packed_attention`` in C++ on CPU (``csrc/cpu/packed_attention*``): a flash kernel over the forest.

The row is cut into *runs* (``runs.py``). A tile of queries meets the keys of its own run and of the runs above it, in
blocks, so the cost follows the visible pairs, whatever the shape of the forest; with a window, blocks out of sight are
skipped. All query heads of one key head share a tile, and a prefix is stored once.

fp32 and fp64 run as they are; fp16 and bf16 are computed in fp32. Sums have one order, given by layout and head counts:
results do not depend on the number of threads. Between instruction sets (AVX-512, AVX2, portable) they differ by
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import checks
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.runs import forest_runs
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import without_autocast

HEAD_MULTIPLE = 16
"""Head sizes are padded to a multiple of this: zeros change neither scores nor gradients."""


def run_table(layout: PackedLayout) -> Tensor:
    """int64 ``[runs, 4]``: first token, end, run above or -1, position of the first token; depth-first, kept per layout."""
    table = layout.cache.get("packed_attention.native")
    if table is None:
        rows = [run[:4] for run in forest_runs(layout)]
        with torch.inference_mode(False):  # the first call may be a rollout's, the next one a training step's
            table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
        if type(table) is Tensor:  # not a tracer's stand-in
            layout.cache["packed_attention.native"] = table
    return table


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the accumulation dtype, D padded, D contiguous; strides of tokens and heads are free."""
    tensor = tensor.to(dtype)
    padding = -tensor.shape[2] % HEAD_MULTIPLE
    if padding:
        return F.pad(tensor, (0, padding))
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _unpadded(rows: Tensor, head_dim: int) -> Tensor:
    """Never a view: a caller may write into an output that is not saved."""
    return rows if rows.shape[2] == head_dim else rows[..., :head_dim].contiguous()


class _PackedAttention(torch.autograd.Function):
    """query ``[T, H, D]``, key and value ``[T, K, D]`` -> out ``[T, H, D]``, lse ``[T, H]``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(query.dtype)
        rows = [_rows(tensor, dtype) for tensor in (query, key, value)]
        ctx.options = (layout, scale, softcap, window)
        ctx.dtype, ctx.head_dim = query.dtype, query.shape[2]
        padded_out, lse = torch.ops.specs_kernels.packed_attention_forward(
            *rows, layout.visible_from, run_table(layout), scale, softcap or 0.0, window or 0
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows, padded_out, lse)
        return _unpadded(padded_out, query.shape[2]).to(query.dtype), lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("packed_attention")
        saved = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        grads = packed_attention_native_gradient(grad_out, grad_lse, *saved, *ctx.options)
        return *(_unpadded(grad, ctx.head_dim).to(ctx.dtype) for grad in grads), None, None, None, None


def packed_attention_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`specs_kernels.packed_attention`; returns (out, lse)."""
    out, lse = _PackedAttention.apply(query, key, value, layout, scale, softcap, window)
    return out, lse


def packed_attention_native_gradient(
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
    """Gradients of query, key and value, in their shapes and dtype, from inputs and results of :func:`packed_attention_native`.

    One upstream gradient may be None. Inputs and out may also come as the forward keeps them: padded, in the dtype of lse.
    """
    with without_autocast(query.device):
        rows = [_rows(tensor, lse.dtype) for tensor in (query, key, value, out)]
        grads = torch.ops.specs_kernels.packed_attention_backward(
            torch.zeros_like(rows[3]) if grad_out is None else _rows(grad_out, lse.dtype),
            None if grad_lse is None else grad_lse.to(lse.dtype).contiguous(),
            *rows,
            lse,
            layout.visible_from,
            run_table(layout),
            scale,
            softcap or 0.0,
            window or 0,
        )
        return tuple(_unpadded(grad, query.shape[2]).to(query.dtype) for grad in grads)

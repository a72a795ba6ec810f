"""``packed_attention`` in C++ on CPU (``csrc/cpu/packed_attention*``): a flash kernel over the forest.

The row is cut into *runs* (``native_plan.py``). A tile of queries meets the keys of its own run and of the runs above it,
in blocks, so the cost follows the visible pairs; with a window, blocks out of sight are skipped. All query heads of one key
head share a tile, and a prefix is stored once.

Backward: a tree of more than 2^18 visible pairs is cut into up to 8 parts; each after the first has sums of its own for keys
and values, so up to 7 times fp32 (fp64) ``[T, Hkv, D]`` each, and three copies of keys and values besides.

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
from specs_kernels.packed_attention.native_plan import NativePlan, native_plan, ordered, restored
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import without_autocast

HEAD_MULTIPLE = 16
"""Head sizes are padded to a multiple of this: zeros change neither scores nor gradients."""


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
        plan: NativePlan,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(query.dtype)
        rows = [_rows(tensor, dtype) for tensor in (query, key, value)]
        ctx.options = (plan, scale, softcap, window)
        ctx.dtype, ctx.head_dim = query.dtype, query.shape[2]
        padded_out, lse = torch.ops.specs_kernels.packed_attention_forward(
            *rows, plan.visible_from, plan.runs, scale, softcap or 0.0, window or 0
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
        grads = _gradients(grad_out, grad_lse, *saved, *ctx.options)
        return *(_unpadded(grad, ctx.head_dim).to(ctx.dtype) for grad in grads), None, None, None, None


def _gradients(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: NativePlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, ...]:
    """Like inputs, which may come as the forward keeps them: padded, in the dtype of lse."""
    with without_autocast(query.device):
        rows = [_rows(tensor, lse.dtype) for tensor in (query, key, value, out)]
        grads = torch.ops.specs_kernels.packed_attention_backward(
            torch.zeros_like(rows[3]) if grad_out is None else _rows(grad_out, lse.dtype),
            None if grad_lse is None else grad_lse.to(lse.dtype).contiguous(),
            *rows,
            lse,
            plan.visible_from,
            plan.runs,
            scale,
            softcap or 0.0,
            window or 0,
        )
        return tuple(_unpadded(grad, query.shape[2]).to(query.dtype) for grad in grads)


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
    plan = native_plan(layout)
    query, key, value = (ordered(plan, tensor) for tensor in (query, key, value))
    out, lse = _PackedAttention.apply(query, key, value, plan, scale, softcap, window)
    return restored(plan, out), restored(plan, lse)


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

    One upstream gradient may be None.
    """
    plan = native_plan(layout)
    grads = _gradients(
        None if grad_out is None else ordered(plan, grad_out),
        None if grad_lse is None else ordered(plan, grad_lse),
        ordered(plan, query),
        ordered(plan, key),
        ordered(plan, value),
        ordered(plan, out),
        ordered(plan, lse),
        plan,
        scale,
        softcap,
        window,
    )
    return tuple(restored(plan, grad) for grad in grads)

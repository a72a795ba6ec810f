"""``packed_attention`` from the varlen attention of torch or flash-attn (``varlen.py``): pieces merged by log-sum-exp.

Forward: every run of the forest (``runs.py``) attends to itself, causally, in one call; then, depth by depth from the roots,
the tokens below a run attend to all of its keys, every run of that depth in one call. So there are as many calls as the
longest chain of runs (2 for prompts and responses), however many trees the row holds. Two results of a token merge in fp32::

    lse = logaddexp(lse_a, lse_b)        out = out_a + sigmoid(lse_b - lse_a) (out_b - out_a)

Backward: each piece runs again with the final out and lse. Its probabilities exp(score - lse) and its delta = dout . out are
then those of the whole softmax, so the gradients of the pieces add up, exactly. Ring attention does so for slices of the keys
(zhuzilin/ring-flash-attention); here they are runs. K and V of a prefix are stored once.

What the pieces cannot do raises: a window across runs, a softcap, bidirectional spans, a scale of 0 or less (they look for the
largest score before they scale), and a gradient of lse (their delta has no term for it).

Numerics: those of ``varlen.py`` in each piece, whose results arrive rounded to the inputs' dtype; merges in fp32. dk and dv are
the rounded sum of two pieces at most, dq is summed in fp32 where there are more. The forward is deterministic, the backward
where that of ``varlen.py`` is: under ``torch.use_deterministic_algorithms(True)``. No token meets another of a sibling or of
another tree in one softmax; in the backward of a prefix, siblings meet in its dk and dv only.

Memory beyond inputs and results: up to four fp32 ``[T, H, D]`` while a depth is merged, and copies of its rows where it holds
several runs (a single run's are views).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specs_kernels import checks, varlen
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.cascade_plan import CascadePlan, Rows, cascade_plan
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import outside_graphs

_VECTOR = 8
"""The kernels load this many half-precision numbers at once: strides and offsets must be multiples of it."""


class Options(NamedTuple):
    """What a call has besides its tensors."""

    varlen: varlen.Varlen
    plan: CascadePlan
    scale: float
    window: int | None
    """Only where no path has two runs."""


def cascade_forward(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(out ``[T, H, D]``, lse ``[H, T]``)."""
    plan, forward = options.plan, options.varlen.forward
    out, lse = forward(query, key, value, plan.own, True, options.scale, options.window)
    dtype = accumulation_dtype(query.dtype)
    if len(plan.above) > 1:
        out = out.to(dtype)
    for rows, key_rows, sequences in plan.above:
        part, part_lse = forward(
            _take(query, rows), _take(key, key_rows), _take(value, key_rows), sequences, False, options.scale, None
        )
        own_lse = _take(lse, rows, 1)
        weight_NH1 = torch.sigmoid(part_lse - own_lse).t().unsqueeze(2)
        _put_(out, rows, torch.lerp(_take(out, rows).to(dtype), part.to(dtype), weight_NH1))
        _put_(lse, rows, torch.logaddexp(own_lse, part_lse), 1)
    return out.to(query.dtype), lse


def cascade_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final out and lse ``[H, T]``."""
    plan, backward = options.plan, options.varlen.backward
    tensors = (grad_out, query, key, value, out, lse)
    grad_query, grad_key, grad_value = backward(*tensors, plan.own, True, options.scale, options.window)
    if len(plan.above) > 1:
        grad_query = grad_query.to(accumulation_dtype(query.dtype))
    for rows, key_rows, sequences in plan.above:
        part_query, part_key, part_value = backward(
            _take(grad_out, rows),
            _take(query, rows),
            _take(key, key_rows),
            _take(value, key_rows),
            _take(out, rows),
            _take(lse, rows, 1).contiguous(),
            sequences,
            False,
            options.scale,
            None,
        )
        _put_(grad_query, rows, _take(grad_query, rows) + part_query)
        _put_(grad_key, key_rows, _take(grad_key, key_rows) + part_key)
        _put_(grad_value, key_rows, _take(grad_value, key_rows) + part_value)
    return grad_query.to(query.dtype), grad_key, grad_value


def _take(tensor: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """These rows: a view of a range, a copy of several."""
    if isinstance(rows, slice):
        return tensor.narrow(dim, rows.start, rows.stop - rows.start)
    return tensor.index_select(dim, rows)


def _put_(tensor: Tensor, rows: Rows, values: Tensor, dim: int = 0) -> None:
    """Write these rows, each of which is there once; values are rounded to the tensor's dtype."""
    if isinstance(rows, slice):
        tensor.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
    else:
        tensor.index_copy_(dim, rows, values.to(tensor.dtype))


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the kernels could not load its rows."""
    strides = tensor.stride()
    whole = all(stride > 0 and stride % _VECTOR == 0 for stride in strides[:2])
    if strides[2] == 1 and whole and tensor.storage_offset() % _VECTOR == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class _PackedAttention(torch.autograd.Function):
    """query ``[T, H, D]``, key and value ``[T, Hkv, D]`` -> out ``[T, H, D]``, lse ``[T, H]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        query, key, value = (_loadable(tensor) for tensor in (query, key, value))
        out, lse_HT = cascade_forward(query, key, value, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse_HT)
        ctx.options = options
        return out, lse_HT.t().clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("packed_attention")
        if grad_lse is not None:
            raise RuntimeError(
                'packed_attention: backend "cascade" has no gradient of lse, for its pieces take none; use lse.detach(), or '
                'backend "triton" or "chunked"'
            )
        if grad_out is None:
            return (None,) * 4
        query, key, value, out, lse_HT = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return *cascade_backward(_loadable(grad_out), query, key, value, out, lse_HT, ctx.options), None


def _window_of(plan: CascadePlan, window: int | None) -> int | None:
    """The window of the runs; ValueError for one that would cross them."""
    if window is None or window >= plan.longest_path:
        return None
    if plan.above:
        raise ValueError(
            f'packed_attention: backend "cascade" has no window across segments; window is {window}, the longest path has '
            f'{plan.longest_path} tokens, and a prefix is shared; use backend "triton" or "chunked"'
        )
    return window


def _refuse(layout: PackedLayout, scale: float, softcap: float | None) -> None:
    span = next(((start, end) for start, end in layout.bidirectional if end - start > 1), None)
    found = None
    if softcap is not None:
        found = f"softcap; it is {softcap}"
    elif span is not None:
        found = f"bidirectional spans; the layout has one at {span}"
    elif scale <= 0:
        found = f"scale of 0 or less; it is {scale}"
    if found is not None:
        raise ValueError(f'packed_attention: backend "cascade" has no {found}; use backend "triton" or "chunked"')


@outside_graphs("the calls of the cascade depend on the shape of the forest")
def packed_attention_cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`specs_kernels.packed_attention`; returns (out, lse)."""
    _refuse(layout, scale, softcap)
    library = varlen.choose(query.device)
    if layout.num_tokens == 0:
        varlen.check_limits(library, query, 0)
        nothing = key.sum() + value.sum()
        return query + nothing, (query.sum(2) + nothing).to(accumulation_dtype(query.dtype))
    plan = cascade_plan(layout)
    varlen.check_limits(library, query, plan.own.number)
    options = Options(library, plan, scale, _window_of(plan, window))
    out, lse = _PackedAttention.apply(query, key, value, options)
    return out, lse

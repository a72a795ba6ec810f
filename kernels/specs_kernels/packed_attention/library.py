"""``specs_kernels::packed_attention`` and its gradient as PyTorch operators: what ``torch.compile``, fake and meta tensors see.

Eager calls on plain tensors go to the backends themselves, without the dispatcher's share of the cost. An operator takes
tensors and numbers, and a graph must not be made again for each layout: so a layout comes as ``PackedLayout.description``,
one tensor on the host, from which the operator makes the layout again when it runs. The last few are kept with the plans of
their backends, so all layers of a model and their backwards share one.

The backward is that of the backend, from inputs, out and lse. In half precision its ``delta_i = dout_i . out_i - dlse_i``
reads the rounded out (the C++ kernel in eager mode: the sums before rounding).

Letters: T tokens, H query heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention import chunked, native
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import without_autocast

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor layout"
_OPTIONS = "float scale, float? softcap, SymInt? window, str backend"
_LAYOUTS = 8
"""Layouts kept with their plans: a step works on few at a time."""

LIBRARY = torch.library.Library("specs_kernels", "FRAGMENT")
LIBRARY.define(f"packed_attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    f"packed_attention_gradient(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)"
)


@lru_cache(_LAYOUTS)
def _described(description: tuple[int, ...], device: torch.device) -> PackedLayout:
    segments, ranges = description[:2]
    lengths, parents = description[2 : 2 + segments], description[2 + segments : 2 + 2 * segments]
    bounds = description[2 + 2 * segments :]
    spans = list(zip(bounds[:ranges], bounds[ranges:], strict=True))
    return PackedLayout.from_segments(lengths, parents, bidirectional=spans, device=device)


def _prepare(
    query: Tensor, description: Tensor, window: int | None, backend: str
) -> tuple[PackedLayout, int | None, str]:
    """The layout, the window unless no path is that long, the backend's name."""
    layout = _described(tuple(description.tolist()), query.device)
    name = choose("packed_attention", backend, query.device).backend
    return layout, None if window is None or window >= layout.num_tokens else window, name


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout, window, name = _prepare(query, description, window, backend)
    with without_autocast(query.device):
        if name == "native":
            return native.packed_attention_native(query, key, value, layout, scale, softcap, window)
        if name == "chunked":
            return chunked.packed_attention_chunked(query, key, value, layout, scale, softcap, window)
        if name == "triton":
            from specs_kernels.packed_attention.triton import packed_attention_triton

            out, lse = packed_attention_triton(query, key, value, layout, scale, softcap, window)
            return out.contiguous(), lse
    raise RuntimeError(
        f'packed_attention: backend "{name}" cannot be traced; leave this call out of the graph, or use "native", "chunked" or '
        '"triton"'
    )


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype)),
    )


def _gradient(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The backend's own gradient; empty where not wanted."""
    layout, window, name = _prepare(query, description, window, backend)
    kept = (grad_out, grad_lse, query, key, value, out, lse)
    grads: tuple[Tensor | None, ...]
    with torch.no_grad(), without_autocast(query.device):
        if name == "native":
            grads = native.packed_attention_native_gradient(*kept, layout, scale, softcap, window)
        elif name == "chunked":
            grads = chunked.packed_attention_chunked_gradient(*kept, layout, scale, softcap, window)
        else:
            from specs_kernels.packed_attention.triton import Options, packed_attention_triton_gradient

            which = (wanted[0], wanted[1], wanted[2])
            grads = packed_attention_triton_gradient(*kept, Options(layout, scale, softcap, window), which)
    return tuple(
        query.new_empty(0) if grad is None or not want else grad.contiguous()
        for grad, want in zip(grads, wanted, strict=True)
    )


def _gradient_fake(grad_out: Tensor | None, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, wanted = args[:3], args[-1]
    return tuple(tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(inputs, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    checks.refuse_second_derivative("packed_attention")
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.specs_kernels.packed_attention_gradient(
        grad_out, grad_lse, *ctx.saved_tensors, *ctx.options, wanted
    )
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 5)


LIBRARY.impl("packed_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("packed_attention_gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("specs_kernels::packed_attention", _forward_fake, lib=LIBRARY)
torch.library.register_fake("specs_kernels::packed_attention_gradient", _gradient_fake, lib=LIBRARY)
torch.library.register_autograd("specs_kernels::packed_attention", _autograd, setup_context=_setup, lib=LIBRARY)
OPERATOR = torch.ops.specs_kernels.packed_attention.default

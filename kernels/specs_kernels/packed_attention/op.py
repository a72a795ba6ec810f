"""The public ``packed_attention``: what it accepts, and which backend it calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.cascade import packed_attention_cascade
from specs_kernels.packed_attention.chunked import packed_attention_chunked
from specs_kernels.packed_attention.library import OPERATOR
from specs_kernels.packed_attention.native import packed_attention_native
from specs_kernels.packed_attention.reference import packed_attention_reference
from specs_kernels.softmax import accumulation_dtype
from specs_kernels.tracing import traced, without_autocast

_Run = Callable[[Tensor, Tensor, Tensor, PackedLayout, float, float | None, int | None], tuple[Tensor, Tensor]]


def _backend(name: str) -> _Run:
    """The function of a backend; Triton is imported when first asked for."""
    if name == "triton":
        from specs_kernels.packed_attention.triton import packed_attention_triton

        return packed_attention_triton
    return {
        "reference": packed_attention_reference,
        "cascade": packed_attention_cascade,
        "chunked": packed_attention_chunked,
        "native": packed_attention_native,
    }[name]


@overload
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention where each token sees its own segment causally and all ancestors of its segment.

    For query token i and key token j visible to it (``layout.visible_from[j] <= i < layout.visible_until[j]``, and with
    a window W also ``position_ids[i] - position_ids[j] < W``)::

        score_ij = scale * q_i . k_j              or   softcap * tanh(scale * q_i . k_j / softcap)
        lse_i    = log sum_j exp score_ij         out_i = sum_j exp(score_ij - lse_i) v_j

    query: ``[T, H, Dh]``; key, value: ``[T, Hkv, Dh]`` with H a multiple of Hkv (query heads h*H/Hkv to (h+1)*H/Hkv - 1
        use key head h, as in transformers); fp16, bf16, fp32 or fp64, any strides. T = 0 is legal.
    scale: None is 1/sqrt(Dh). softcap: a number above 0 or None. window: an int >= 1, counting the token itself.
    backend: "auto", "native" (C++, CPU), "triton" (GPU; fp16 and bf16 with heads of at most 256, fp32 of at most 128), "cascade"
        (GPU, fp16 and bf16, heads of at most 256 in multiples of 8: the varlen attention of torch or flash-attn in pieces; no
        softcap, no bidirectional spans, no scale of 0 or less, a window only where no prefix is shared: ValueError; no gradient
        of lse: RuntimeError), "chunked" or "reference". "auto" takes neither "triton" nor "cascade".

    Returns out ``[T, H, Dh]`` in the query's dtype, and with ``return_lse`` also lse ``[T, H]``, fp32 (fp64 for fp64
    inputs). Gradients flow to query, key and value from both outputs; differentiable once: under
    ``create_graph=True`` the backward raises RuntimeError.
    Numerics: fp32 (fp64) throughout, one rounding of each result ("triton" and "cascade" also round probabilities and their
    gradients to the inputs' dtype before they are multiplied, "cascade" the result of each piece too); deterministic ("cascade"
    backward: under ``torch.use_deterministic_algorithms(True)``). A segment's result does not depend,
    bit for bit, on what its siblings' tokens hold.

    Raises ValueError for wrong shapes, dtypes or devices, and for scale, softcap or window out of range; RuntimeError under
    transforms of ``torch.func``, which only "reference" goes through.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_float(name, tensor, 3)
    if not isinstance(layout, PackedLayout):
        raise ValueError(f"layout must be a PackedLayout; got {type(layout).__name__}")
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens != layout.num_tokens:
        raise ValueError(f"query has {num_tokens} tokens but the layout has {layout.num_tokens}")
    num_kv_heads = key.shape[1]
    checks.check_shape("key", key, (num_tokens, num_kv_heads, head_dim))
    checks.check_shape("value", value, (num_tokens, num_kv_heads, head_dim))
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads or head_dim == 0:
        raise ValueError(
            f"query has {num_heads} heads of {head_dim} and key {num_kv_heads}; need Dh >= 1, Hkv >= 1, "
            "and H a multiple of Hkv"
        )
    checks.check_same_dtype(query=query, key=key, value=value)
    checks.check_same_device(query=query, key=key, value=value, layout=layout.segment_ids)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    checks.check_finite("scale", scale)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an int of at least 1 (it counts the token itself) or None; got {window!r}")
    limits = torch.finfo(accumulation_dtype(query.dtype))
    if abs(scale) > limits.max or (softcap is not None and not limits.tiny <= softcap <= limits.max):
        raise ValueError(
            f"scale is {scale} and softcap {softcap}: the sums are {limits.dtype}, which needs |scale| <= {limits.max:.4g} "
            f"and softcap from {limits.tiny:.4g} to {limits.max:.4g}"
        )
    in_graph = traced(query, key, value)
    if not in_graph and backend != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            'packed_attention: transforms of torch.func (vmap, grad, jvp) go through backend="reference" alone; several rows '
            "make one packed row, and torch.autograd gives gradients"
        )
    if in_graph and backend not in ("reference", "cascade"):
        out, lse = OPERATOR(query, key, value, layout.description, float(scale), softcap, window, backend)
        return (out, lse) if return_lse else out
    if not in_graph and window is not None and window >= num_tokens:
        window = None  # no path is longer than the row
    # Which backends can run here is looked up inside the operator: a tracer cannot follow it. The reference is traced as it is,
    # the cascade breaks the graph.
    run = _backend(backend if in_graph else choose("packed_attention", backend, query.device).backend)
    with without_autocast(query.device):
        out, lse = run(query, key, value, layout, float(scale), softcap, window)
    return (out, lse) if return_lse else out

"""The definition of ``packed_attention``: dense scores and a ``[T, T]`` mask, any dtype up to fp64.

Letters: T tokens, H query heads, K key/value heads, G = H / K, Dh head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels.layout import PackedLayout
from specs_kernels.softmax import accumulation_dtype


def packed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`specs_kernels.packed_attention`; returns (out, lse)."""
    dtype = accumulation_dtype(query.dtype)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query_TKGD = query.to(dtype).reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = scale * torch.einsum("ikgd,jkd->kgij", query_TKGD, key.to(dtype))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.dense_mask(window), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("kgij,jkd->ikgd", torch.exp(scores - lse[..., None]), value.to(dtype))
    return out.reshape(query.shape).to(query.dtype), lse.permute(2, 0, 1).reshape(num_tokens, num_heads)

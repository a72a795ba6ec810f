"""The contract of ``varlen.py`` in plain PyTorch: for tests, and for ``specs-kernels verify`` on a CPU.

One sequence after the other, dense. Sums in fp32 (fp64 for fp64 inputs), one rounding of each result.

Letters: Q, L queries and keys of a sequence, K key heads, G query heads of one key head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specs_kernels.softmax import accumulation_dtype


def stand_in_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Any, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out ``[Tq, H, D]``, lse ``[H, Tq]``)."""
    dtype = accumulation_dtype(query.dtype)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=dtype, device=query.device)
    for queries, keys in _slices(sequences):
        scores_KGQL = _scores(query[queries].to(dtype), key[keys].to(dtype), causal, scale, window)
        lse_KGQ = scores_KGQL.logsumexp(-1)
        probs_KGQL = (scores_KGQL - lse_KGQ[..., None]).exp()
        out[queries] = torch.einsum("kgql,lkd->qkgd", probs_KGQL, value[keys].to(dtype)).flatten(1, 2).to(out.dtype)
        lse[:, queries] = lse_KGQ.flatten(0, 1)
    return out, lse


def stand_in_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Any,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the softmax that ``out`` and ``lse`` belong to, through the keys of this call."""
    dtype, heads = accumulation_dtype(query.dtype), (key.shape[1], query.shape[1] // key.shape[1])
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    for queries, keys in _slices(sequences):
        q, k, v, upstream = (
            x.to(dtype) for x in (query[queries], key[keys], value[keys], grad_out[queries].unflatten(1, heads))
        )
        probs_KGQL = (_scores(q, k, causal, scale, window) - lse[:, queries].unflatten(0, heads)[..., None]).exp()
        delta_QKG = (upstream * out[queries].unflatten(1, heads).to(dtype)).sum(-1)
        dprobs_KGQL = torch.einsum("qkgd,lkd->kgql", upstream, v)
        dscores_KGQL = scale * probs_KGQL * (dprobs_KGQL - delta_QKG.permute(1, 2, 0)[..., None])
        grad_query[queries] = torch.einsum("kgql,lkd->qkgd", dscores_KGQL, k).flatten(1, 2).to(query.dtype)
        grad_key[keys] = torch.einsum("kgql,qkgd->lkd", dscores_KGQL, q.unflatten(1, heads)).to(key.dtype)
        grad_value[keys] = torch.einsum("kgql,qkgd->lkd", probs_KGQL, upstream).to(value.dtype)
    return grad_query, grad_key, grad_value


def _slices(sequences: Any) -> Iterator[tuple[slice, slice]]:
    query_starts, key_starts = sequences.query_starts.tolist(), sequences.key_starts.tolist()
    for s in range(len(query_starts) - 1):
        yield slice(query_starts[s], query_starts[s + 1]), slice(key_starts[s], key_starts[s + 1])


def _scores(query_QHD: Tensor, key_LKD: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """``[K, G, Q, L]``, -inf where a query does not see a key."""
    num_kv_heads = key_LKD.shape[1]
    query_QKGD = query_QHD.unflatten(1, (num_kv_heads, query_QHD.shape[1] // num_kv_heads))
    scores = scale * torch.einsum("qkgd,lkd->kgql", query_QKGD, key_LKD)
    if not causal:
        return scores
    distance = torch.arange(scores.shape[2], device=scores.device)[:, None] - torch.arange(
        scores.shape[3], device=scores.device
    )
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return scores.masked_fill(unseen, -torch.inf)

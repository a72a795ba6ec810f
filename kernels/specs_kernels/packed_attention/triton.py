"""``packed_attention`` in Triton, for NVIDIA and AMD GPUs: one flash kernel forward, three kernels backward.

For query i and visible key j of one head, with z = score in base 2 (:func:`specs_kernels.packed_attention` has the scores)::

    m_i = max_j z_ij        s_i = sum_j 2^(z_ij - m_i)        out_i = sum_j 2^(z_ij - m_i) v_j / s_i
    lse_i = (m_i + log2 s_i) ln 2

and with upstream gradients dout and dlse, and f' the slope of the softcap (1 without)::

    p_ij = 2^(z_ij - lse_i log2 e)     delta_i = dout_i . out_i - dlse_i     ds_ij = p_ij (dout_i . v_j - delta_i) f'_ij
    dq_i = scale sum_j ds_ij k_j       dk_j = scale sum_i ds_ij q_i          dv_j = sum_i p_ij dout_i

(FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691; dQ and dK/dV apart, so that no sum is shared.)

query ``[T, H, D]``, key and value ``[T, Hkv, D]``, D <= 256 (computed as the next power of 2), any strides; out ``[T, H, D]``
in their dtype, lse ``[T, H]`` fp32. fp16, bf16 and fp32; fp64 raises ValueError.

Work: blocks of queries by blocks of keys, those without a visible pair skipped by two integers (``triton_blocks.py``),
longest first: queries by the length of their path, keys by the number of queries that see them. No host synchronisation and
no table of blocks: beyond results, memory is a few integers per block and fp32 ``[T, H]``.
Numerics: products of half-precision inputs on tensor cores with fp32 sums, fp32 inputs without TF32; p and ds rounded to the
inputs' dtype as operands, statistics and sums in fp32. Deterministic: no atomics. A token's results do not depend, bit for
bit, on tokens that it does not see; a non-finite entry makes NaN of the rows that see it, at least, and of no others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from specs_kernels import checks
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.triton_blocks import block_bounds
from specs_kernels.packed_attention.triton_kernels import attention_forward_kernel, attention_sound_kernel
from specs_kernels.packed_attention.triton_key_grad import attention_key_kernel
from specs_kernels.packed_attention.triton_query_grad import attention_delta_kernel, attention_query_kernel
from specs_kernels.triton_common import architecture, launch

MAX_HEAD_DIM = 256
_SCAN = 128
"""Blocks classified at once."""
_ROWS = 16
"""Rows of the kernels that read every token once."""


class Tile(NamedTuple):
    """Queries and keys of a block, warps, and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile_for(kernel: str, arch: str, dtype: torch.dtype, block_d: int) -> Tile:
    """The largest block of "forward", "query" or "key" that the compile gate finds without spills."""
    if arch == "interpreter":
        return Tile(16, 32, 4, 1) if kernel == "key" else Tile(32, 16, 4, 1)
    return Tile(64, 64, 4, 2)


def _block_d(head_dim: int) -> int:
    """tl.dot multiplies at least 16 deep."""
    return max(16, triton.next_power_of_2(head_dim))


class _Options(NamedTuple):
    layout: PackedLayout
    scale: float
    softcap: float | None
    window: int | None


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"stride_{name}_{axis}": tensor.stride(dim)
        for name, tensor in tensors.items()
        for dim, axis in enumerate("thd")
    }


def _shared_arguments(query: Tensor, key: Tensor, value: Tensor, options: _Options, tile: Tile) -> dict[str, Any]:
    """What the three kernels over blocks have in common."""
    layout, num_heads, head_dim = options.layout, query.shape[1], query.shape[2]
    return {
        "query": query,
        "key": key,
        "value": value,
        "visible_from": layout.visible_from,
        "visible_until": layout.visible_until,
        "position_ids": layout.position_ids,
        "query_bounds": block_bounds(layout, tile.queries),
        "key_bounds": block_bounds(layout, tile.keys),
        "scale": options.scale,
        **_strides(query=query, key=key, value=value),
        "T": layout.num_tokens,
        "window": options.window or 0,
        "heads": num_heads,
        "group": num_heads // key.shape[1],
        "SOFTCAP": options.softcap,
        "WINDOW": options.window is not None,
        "D": head_dim,
        "BLOCK_Q": tile.queries,
        "BLOCK_K": tile.keys,
        "BLOCK_D": _block_d(head_dim),
        "SCAN": _SCAN,
    }


def attention_forward(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, int8 ``[T, Hkv]``: which key tokens are finite)."""
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=query.device)
    sound = torch.empty(key.shape[:2], dtype=torch.int8, device=key.device)
    if num_tokens:
        launch(
            attention_sound_kernel,
            triton.cdiv(sound.numel(), _ROWS),
            query.device,
            num_warps=4,
            key=key,
            value=value,
            sound=sound,
            **_strides(key=key, value=value),
            T=num_tokens,
            heads=key.shape[1],
            D=head_dim,
            BLOCK=_ROWS,
            BLOCK_D=_block_d(head_dim),
        )
        tile = tile_for("forward", architecture(query.device), query.dtype, _block_d(head_dim))
        launch(
            attention_forward_kernel,
            triton.cdiv(num_tokens, tile.queries) * num_heads,
            query.device,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **_shared_arguments(query, key, value, options, tile),
            sound=sound,
            out=out,
            lse=lse,
            stride_out_t=out.stride(0),
            stride_out_h=out.stride(1),
        )
    return out, lse, sound


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sound: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    options: _Options,
    *,
    of_query: bool = True,
    of_keys: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, contiguous; None where not asked for (of_keys: key and value)."""
    num_tokens, num_heads, head_dim = query.shape
    device, block_d = query.device, _block_d(head_dim)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device) if of_query else None
    grad_key, grad_value = (
        (torch.empty(x.shape, dtype=x.dtype, device=device) if of_keys else None) for x in (key, value)
    )
    if num_tokens == 0:
        return grad_query, grad_key, grad_value
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel,
        triton.cdiv(num_tokens * num_heads, _ROWS),
        device,
        num_warps=4,
        grad_out=grad_out,
        out=out,
        grad_lse=None if grad_lse is None else grad_lse.to(lse.dtype).contiguous(),
        delta=delta,
        **_strides(grad=grad_out),
        stride_out_t=out.stride(0),
        stride_out_h=out.stride(1),
        T=num_tokens,
        heads=num_heads,
        LSE=grad_lse is not None,
        D=head_dim,
        BLOCK=_ROWS,
        BLOCK_D=block_d,
    )
    upstream = {"grad_out": grad_out, "lse": lse, "delta": delta, **_strides(grad=grad_out)}
    if grad_query is not None:
        tile = tile_for("query", architecture(device), query.dtype, block_d)
        launch(
            attention_query_kernel,
            triton.cdiv(num_tokens, tile.queries) * num_heads,
            device,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **_shared_arguments(query, key, value, options, tile),
            **upstream,
            sound=sound,
            grad_query=grad_query,
            stride_to_t=grad_query.stride(0),
            stride_to_h=grad_query.stride(1),
        )
    if grad_key is not None:
        tile = tile_for("key", architecture(device), query.dtype, block_d)
        launch(
            attention_key_kernel,
            triton.cdiv(num_tokens, tile.keys) * key.shape[1],
            device,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **_shared_arguments(query, key, value, options, tile),
            **upstream,
            grad_key=grad_key,
            grad_value=grad_value,
            stride_to_t=grad_key.stride(0),
            stride_to_h=grad_key.stride(1),
        )
    return grad_query, grad_key, grad_value


class _PackedAttention(torch.autograd.Function):
    """query ``[T, H, D]``, key and value ``[T, Hkv, D]`` -> out ``[T, H, D]``, lse ``[T, H]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        out, lse, sound = attention_forward(query, key, value, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, sound, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("packed_attention")
        query, key, value, sound, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 4
        if grad_out is None:
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        of_query, of_key, of_value, _ = ctx.needs_input_grad
        grads = attention_backward(
            query,
            key,
            value,
            sound,
            out,
            lse,
            grad_out,
            grad_lse,
            ctx.options,
            of_query=of_query,
            of_keys=of_key or of_value,
        )
        return *grads, None


def packed_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`specs_kernels.packed_attention`; returns (out, lse)."""
    if query.dtype == torch.float64:
        raise ValueError(
            'packed_attention: backend "triton" takes fp16, bf16 or fp32; got torch.float64; cast, or use backend "chunked"'
        )
    if query.shape[2] > MAX_HEAD_DIM:
        raise ValueError(
            f'packed_attention: backend "triton" takes heads of at most {MAX_HEAD_DIM}; query has {query.shape[2]}; '
            'use backend "chunked"'
        )
    out, lse = _PackedAttention.apply(query, key, value, _Options(layout, scale, softcap, window))
    return out, lse

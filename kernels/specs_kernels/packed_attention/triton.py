"""``packed_attention`` in Triton, for NVIDIA and AMD GPUs: one flash kernel forward, three kernels backward.

For query i and visible key j of one head, with z = score in base 2 (:func:`specs_kernels.packed_attention` has the scores)::

    m_i = max_j z_ij        s_i = sum_j 2^(z_ij - m_i)        out_i = sum_j 2^(z_ij - m_i) v_j / s_i
    lse_i = (m_i + log2 s_i) ln 2

and with upstream gradients dout and dlse, and f' the slope of the softcap (1 without)::

    p_ij = 2^(z_ij - lse_i log2 e)     delta_i = dout_i . out_i - dlse_i     ds_ij = p_ij (dout_i . v_j - delta_i) f'_ij
    dq_i = scale sum_j ds_ij k_j       dk_j = scale sum_i ds_ij q_i          dv_j = sum_i p_ij dout_i

(FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691; dQ and dK/dV apart, so that no sum is shared.)

query ``[T, H, D]``, key and value ``[T, Hkv, D]``, any strides; D <= 256, in fp32 D <= 128, computed as the next power of 2
(fp32 in padded copies). out ``[T, H, D]`` in their dtype, lse ``[T, H]`` fp32. fp16, bf16 and fp32; fp64 raises ValueError.

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
import torch.nn.functional as F
import triton
from torch import Tensor

from specs_kernels import checks
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.triton_blocks import block_bounds
from specs_kernels.packed_attention.triton_kernels import attention_forward_kernel, attention_sound_kernel
from specs_kernels.packed_attention.triton_key_grad import attention_key_kernel
from specs_kernels.packed_attention.triton_query_grad import attention_delta_kernel, attention_query_kernel
from specs_kernels.triton_common import architecture, launch

MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
"""fp32 blocks of wider heads do not fit the registers."""
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


_TILES: dict[str, dict[str, dict[str, Tile]]] = {
    "plain": {
        "sm80": {"forward": Tile(64, 64, 8, 2), "query": Tile(64, 32, 8, 2), "key": Tile(32, 64, 8, 2)},
        "sm90": {"forward": Tile(128, 64, 8, 3), "query": Tile(128, 64, 8, 2), "key": Tile(64, 64, 8, 2)},
        "sm100": {"forward": Tile(128, 32, 8, 2), "query": Tile(128, 32, 8, 2), "key": Tile(32, 64, 8, 2)},
        "gfx942": {"forward": Tile(64, 64, 4, 1), "query": Tile(64, 32, 4, 1), "key": Tile(32, 64, 4, 1)},
    },
    "tight": {
        "sm80": {"forward": Tile(64, 64, 8, 2), "query": Tile(64, 32, 8, 2), "key": Tile(32, 64, 8, 2)},
        "sm90": {"forward": Tile(128, 64, 8, 3), "query": Tile(128, 32, 8, 2), "key": Tile(16, 64, 8, 2)},
        "sm100": {"forward": Tile(128, 32, 8, 2), "query": Tile(128, 32, 8, 2), "key": Tile(32, 64, 8, 2)},
        "gfx942": {"forward": Tile(64, 64, 4, 1), "query": Tile(64, 32, 4, 1), "key": Tile(32, 64, 4, 1)},
    },
    "wide": {
        "sm80": {
            "forward": Tile(64, 32, 8, 1),
            "query": Tile(32, 32, 8, 1),
            "key": Tile(16, 64, 8, 1),
            "value": Tile(16, 64, 8, 1),
        },
        "sm90": {
            "forward": Tile(64, 64, 8, 2),
            "query": Tile(128, 16, 8, 2),
            "key": Tile(16, 64, 8, 2),
            "value": Tile(16, 64, 8, 1),
        },
        "sm100": {
            "forward": Tile(64, 16, 8, 2),
            "query": Tile(64, 16, 8, 1),
            "key": Tile(16, 64, 8, 1),
            "value": Tile(16, 64, 8, 2),
        },
        "gfx942": {
            "forward": Tile(64, 16, 8, 1),
            "query": Tile(32, 16, 8, 1),
            "key": Tile(16, 64, 8, 1),
            "value": Tile(16, 64, 8, 1),
        },
    },
    "fp32": {
        "sm80": {"forward": Tile(32, 32, 8, 2), "query": Tile(32, 16, 8, 2), "key": Tile(16, 32, 8, 2)},
        "sm90": {"forward": Tile(64, 32, 8, 2), "query": Tile(32, 32, 8, 2), "key": Tile(16, 32, 8, 2)},
        # Fewer than 64 rows: with more, sm_100 multiplies fp32 in TF32 whatever input_precision says.
        "sm100": {"forward": Tile(32, 32, 8, 2), "query": Tile(32, 32, 8, 2), "key": Tile(16, 32, 8, 2)},
        "gfx942": {"forward": Tile(32, 16, 8, 1), "query": Tile(32, 16, 8, 1), "key": Tile(16, 32, 8, 1)},
    },
}
"""Half precision: "tight" with a softcap or a mask over D, "wide" beyond heads of 128, where dK and dV are made apart."""


def tile_for(kernel: str, arch: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> Tile:
    """The block of "forward", "query", "key" (dK, with or without dV) or "value" (dV alone)."""
    if arch == "interpreter":
        return Tile(64, 32, 4, 1) if kernel in ("forward", "query") else Tile(32, 64, 4, 1)
    if dtype == torch.float32:
        kind = "fp32"
    elif head_dim > 128:
        kind = "wide"
    else:
        kind = "tight" if softcap or head_dim != _block_d(head_dim) else "plain"
    tiles = _TILES[kind][arch]
    return tiles.get(kernel, tiles["key"])


def _key_launches(block_d: int, of_key: bool, of_value: bool) -> list[tuple[bool, bool]]:
    """Which of dK and dV each launch makes. Two sums of wide heads do not fit the registers: they go one after the other."""
    if of_key and of_value and block_d > 128:
        return [(True, False), (False, True)]
    return [(of_key, of_value)] if of_key or of_value else []


def _block_d(head_dim: int) -> int:
    """tl.dot multiplies at least 16 deep."""
    return max(16, triton.next_power_of_2(head_dim))


class Options(NamedTuple):
    """What a call has besides its tensors, checked by the public op."""

    layout: PackedLayout
    scale: float
    softcap: float | None
    window: int | None


def _tile(kernel: str, query: Tensor, options: Options) -> Tile:
    return tile_for(kernel, architecture(query.device), query.dtype, query.shape[2], options.softcap is not None)


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"stride_{name}_{axis}": tensor.stride(dim)
        for name, tensor in tensors.items()
        for dim, axis in enumerate("thd")
    }


def _shared_arguments(query: Tensor, key: Tensor, value: Tensor, options: Options, tile: Tile) -> dict[str, Any]:
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


def _sound(key: Tensor, value: Tensor) -> Tensor:
    """int8 ``[T, Hkv]``: which key tokens are finite."""
    sound = torch.empty(key.shape[:2], dtype=torch.int8, device=key.device)
    if sound.numel():
        launch(
            attention_sound_kernel,
            triton.cdiv(sound.numel(), _ROWS),
            key.device,
            num_warps=4,
            key=key,
            value=value,
            sound=sound,
            **_strides(key=key, value=value),
            T=key.shape[0],
            heads=key.shape[1],
            D=key.shape[2],
            BLOCK=_ROWS,
            BLOCK_D=_block_d(key.shape[2]),
        )
    return sound


def attention_forward(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, int8 ``[T, Hkv]``: which key tokens are finite)."""
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=query.device)
    sound = _sound(key, value)
    if num_tokens:
        tile = _tile("forward", query, options)
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
    options: Options,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, contiguous; None where not wanted."""
    num_tokens, num_heads, head_dim = query.shape
    device, block_d = query.device, _block_d(head_dim)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=device) if want else None
        for x, want in zip((query, key, value), wanted, strict=True)
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
        tile = _tile("query", query, options)
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
    for of_key, of_value in _key_launches(block_d, grad_key is not None, grad_value is not None):
        tile = _tile("key" if of_key else "value", query, options)
        launch(
            attention_key_kernel,
            triton.cdiv(num_tokens, tile.keys) * key.shape[1],
            device,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **_shared_arguments(query, key, value, options, tile),
            **upstream,
            grad_key=grad_key if of_key else None,
            grad_value=grad_value if of_value else None,
            stride_to_t=key.shape[1] * head_dim,
            stride_to_h=head_dim,
            OF_KEY=of_key,
            OF_VALUE=of_value,
        )
    return grad_query, grad_key, grad_value


class _PackedAttention(torch.autograd.Function):
    """query ``[T, H, D]``, key and value ``[T, Hkv, D]`` -> out ``[T, H, D]``, lse ``[T, H]``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
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
        grads = attention_backward(
            query, key, value, sound, out, lse, grad_out, grad_lse, ctx.options, tuple(ctx.needs_input_grad[:3])
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
    if query.dtype not in MAX_HEAD_DIM:
        raise ValueError(
            f'packed_attention: backend "triton" takes fp16, bf16 or fp32; got {query.dtype}; cast, or use backend "chunked"'
        )
    if query.shape[2] > MAX_HEAD_DIM[query.dtype]:
        raise ValueError(
            f'packed_attention: backend "triton" takes heads of at most {MAX_HEAD_DIM[query.dtype]} in {query.dtype}; '
            f"query has {query.shape[2]}; "
            'use backend "chunked"'
        )
    padded = (_padded(tensor) for tensor in (query, key, value))
    out, lse = _PackedAttention.apply(*padded, Options(layout, scale, softcap, window))
    return out[..., : query.shape[2]], lse


def packed_attention_triton_gradient(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The backward of :func:`packed_attention_triton` from its inputs and results."""
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    head_dim = query.shape[2]
    query, key, value, out, grad_out = (_padded(tensor) for tensor in (query, key, value, out, grad_out))
    sound = _sound(key, value)
    grads = attention_backward(query, key, value, sound, out, lse, grad_out, grad_lse, options, wanted)
    return tuple(None if grad is None else grad[..., :head_dim] for grad in grads)


def _padded(tensor: Tensor) -> Tensor:
    """fp32 with D a power of 2: a mask over D takes the registers that fp32 products need."""
    padding = _block_d(tensor.shape[2]) - tensor.shape[2]
    return F.pad(tensor, (0, padding)) if padding and tensor.dtype == torch.float32 else tensor

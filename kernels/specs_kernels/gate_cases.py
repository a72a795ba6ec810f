"""What the compile gate compiles: the library's own host functions, called with meta tensors, so that every launch is the one
that ships. A case is one way to call an op; ``first`` marks the one per kernel that ``make test`` compiles.

Also here: the limits, and the exceptions to "no spills".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels.layout import PackedLayout
from specs_kernels.linear_logprob.row_pass import RowGradients, RowState, Transform
from specs_kernels.linear_logprob.triton import TritonRowPass
from specs_kernels.linear_logprob.triton_forward import fused_statistics
from specs_kernels.packed_attention import triton as attention
from specs_kernels.selective_logprob import triton as selective

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory per program. The sm80 column also serves consumer GPUs of later generations, which have 99 KiB."""


@dataclass(frozen=True)
class Spill:
    """An accepted spill: at most ``bytes`` of stack in ``kernel`` (as the table names it) on ``target``, and why."""

    kernel: str
    case: str
    target: str
    bytes: int
    why: str


EXCEPTIONS: tuple[Spill, ...] = (
    Spill(
        "attention_key_kernel",
        "bf16, heads of 192, window, softcap",
        "sm90",
        96,
        "The smallest block that WGMMA takes, with one sum of the two, for heads beyond 128.",
    ),
    Spill(
        "attention_key_kernel",
        "fp32, heads of 128, window, softcap",
        "sm80",
        32,
        "ptxas settles on 128 of 255 registers; smaller blocks spill as much.",
    ),
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """name: options and dtype. run: makes the launches. first: what make test compiles."""

    name: str
    run: Callable[[], object]
    first: bool = False


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    """Every shipped configuration: dtypes by the options that change a kernel's code."""
    for name, dtype in DTYPES.items():
        acc = torch.promote_types(dtype, torch.float32)
        yield from _selective(name, dtype, acc)
        yield from _fused(name, dtype, acc)
        yield from _row_passes(name, dtype, acc)
    yield from _attention()


def _selective(name: str, dtype: torch.dtype, acc: torch.dtype) -> Iterator[Case]:
    rows, vocab = 4096, 151936
    target, vector = _empty(rows, dtype=torch.int64), _empty(rows, dtype=acc)
    statistics = selective.Statistics(vector, vector, vector)

    def run(stride: int, temperature: float | Tensor, entropy: bool) -> None:
        logits = _empty(rows, vocab, dtype=dtype) if stride == 1 else _empty(vocab, rows, dtype=dtype).T
        selective.forward(logits, target, temperature, -100, entropy)
        grad_entropy = vector if entropy else None
        selective.backward(logits, target, temperature, -100, statistics, vector, grad_entropy, vector)

    yield Case(f"{name}, all options", lambda: run(1, vector, True), first=name == "bf16")
    yield Case(f"{name}", lambda: run(1, 1.0, False))
    yield Case(f"{name}, transposed logits", lambda: run(vocab, vector, True))


def _fused(name: str, dtype: torch.dtype, acc: torch.dtype) -> Iterator[Case]:
    rows, vocab, dim = 4096, 151936, 3584
    target, vector = _empty(rows, dtype=torch.int64), _empty(rows, dtype=acc)
    full = (_empty(vocab, dtype=acc), vector, 30.0, 0.125)
    plain = (None, 1.0, None, 1.0)

    def run(dim: int, options: tuple[Tensor | None, float | Tensor, float | None, float], entropy: bool) -> None:
        hidden, weight = _empty(rows, dim, dtype=dtype), _empty(vocab, dim, dtype=dtype)
        state = RowState(vector, vector, vector if entropy else None, vector)
        fused_statistics(hidden, weight, target, *options, state)

    yield Case(f"{name}, entropy", lambda: run(dim, plain, True), first=name == "bf16")
    yield Case(f"{name}", lambda: run(dim, plain, False))
    yield Case(f"{name}, all options", lambda: run(dim, full, True))
    yield Case(f"{name}, all options, ragged D", lambda: run(dim - 1, full, True))


def _row_passes(name: str, dtype: torch.dtype, acc: torch.dtype) -> Iterator[Case]:
    """Products are in the accumulation dtype; ``dtype`` is what the passes leave behind for the next GEMM."""
    rows, columns, vocab = 2048, 8192, 151936
    passes, products = TritonRowPass(), "fp64" if dtype == torch.float64 else "fp32"
    target, vector = _empty(rows, dtype=torch.int64), _empty(rows, dtype=acc)
    x, out = _empty(rows, columns, dtype=acc), _empty(rows, columns, dtype=dtype)
    plain = Transform(None, None, 1.0, False)
    full = Transform(_empty(columns, dtype=acc), 30.0, vector, True)

    def stats(first: int, transform: Transform, state: RowState, keep: Tensor | None) -> None:
        passes.stats(x, target, first, transform, state, keep_RC=keep)

    def stats_exp(first: int, transform: Transform, state: RowState, weighted: Tensor | None) -> None:
        passes.stats_exp(x, target, first, transform, state, out, weighted)

    entropy, no_entropy = RowState(vector, vector, vector, vector), RowState(vector, vector, None, vector)
    both = RowGradients(vector, vector, vector, vector, vector)
    logp = RowGradients(vector, vector, vector, None, vector)
    if dtype in (torch.float32, torch.float64):
        yield Case(f"{name} products, first tile", lambda: stats(0, plain, no_entropy, None))
        yield Case(f"{name} products, all options", lambda: stats(columns, full, entropy, None), first=name == "fp32")
        kept = None
    else:
        yield Case(f"fp32 products, kept in {name}", lambda: stats(columns, full, entropy, out))
        kept = vector
    yield Case(f"{products} products to {name} weights, first tile", lambda: stats_exp(0, plain, no_entropy, None))
    yield Case(f"{products} products to {name} weights, all options", lambda: stats_exp(columns, full, entropy, out))
    yield Case(f"{name} gradient", lambda: passes.dscores(x, target, vocab // 2, plain, logp, out))
    yield Case(
        f"{name} gradient, all options",
        lambda: passes.dscores(x, target, vocab // 2, full, both, out),
        first=name == "bf16",
    )
    if kept is not None:
        yield Case(
            f"{name} gradient from kept scores, all options",
            lambda: passes.dscores(out, target, vocab // 2, full, both, out, offset_R=kept),
        )


def _attention() -> Iterator[Case]:
    """Block sizes follow dtype and padded head size: each of them with what takes most registers, a mask over D included."""
    layout = PackedLayout.from_segments([8192], [-1]).to("meta")
    heads, kv_heads, tokens = 28, 4, layout.num_tokens

    def run(
        dtype: torch.dtype, head_dim: int, softcap: float | None, window: int | None, wanted: tuple[bool, bool, bool]
    ) -> None:
        query, key = (_empty(tokens, h, head_dim, dtype=dtype) for h in (heads, kv_heads))
        options = attention.Options(layout, 0.1, softcap, window)
        if wanted[0]:
            attention.attention_forward(query, key, key, options)
        lse, sound = _empty(tokens, heads, dtype=torch.float32), _empty(tokens, kv_heads, dtype=torch.int8)
        attention.attention_backward(query, key, key, sound, query, lse, query, lse, options, wanted)

    everything, value_only = (True, True, True), (False, False, True)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield Case("bf16, heads of 128", lambda: run(bf16, 128, None, None, everything), first=True)
    yield Case("fp16, heads of 80, window, softcap", lambda: run(fp16, 80, 30.0, 4096, everything))
    yield Case("bf16, heads of 192, window, softcap", lambda: run(bf16, 192, 30.0, 4096, (True, True, False)))
    yield Case("bf16, heads of 192, window, softcap, dV", lambda: run(bf16, 192, 30.0, 4096, value_only))
    yield Case("fp32, heads of 128, window, softcap", lambda: run(fp32, 128, 30.0, 4096, everything))

"""Arms of ``bench.packed_attention`` that are not ours: what trainers do without sharing a prefix, and FlexAttention.

Rows are what a batch without sharing holds: prompt and response per response, or a whole flat sequence. Their inputs are laid
out before anything is timed, and what they return is brought back to the packed order after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.packed_problem import Problem
from bench.section import Arm, importable, library, missing

NEEDS_GPU = "its kernels need a GPU"
RowsAttend = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers(problem: Problem) -> list[Arm]:
    """Every arm that is not ours."""
    return [padded(problem), *replicated(problem), *varlen(problem), *flex(problem)]


def padded(problem: Problem) -> Arm:
    """Right-padded rows through causal SDPA without a mask: padding is on the right, so causality hides it."""
    rows = problem.forest.rows(problem.query.device)
    longest = max(map(len, rows))
    place = torch.cat([torch.arange(len(row), device=row.device) + i * longest for i, row in enumerate(rows)])
    size = len(rows) * longest

    def spread(flat: Tensor) -> Tensor:
        wide = flat.new_zeros(size, *flat.shape[1:]).index_copy(0, place, flat)
        return wide.view(len(rows), longest, *flat.shape[1:]).transpose(1, 2)

    def gather(wide: Tensor) -> Tensor:
        return wide.transpose(1, 2).flatten(0, 1)[place]

    attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    note = "inputs laid out in padded rows beforehand"
    return of_rows(problem, "padded SDPA", library("torch"), attend, spread, gather, note)


def varlen(problem: Problem) -> list[Arm]:
    """Rows without padding, one after the other, with cumulative lengths: packing without sharing."""
    names = {"torch varlen": "torch", "flash-attn varlen": "flash-attn"}
    if problem.query.device.type == "cpu":
        return [Arm.absent(name, library(lib), NEEDS_GPU) for name, lib in names.items()]
    lengths = torch.tensor([len(row) for row in problem.forest.rows(problem.query.device)])
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(problem.query.device, torch.int32)
    longest = int(lengths.max())
    note = "prompts repeated per response, inputs laid out beforehand"
    arms = []
    if importable("torch.nn.attention.varlen"):
        arms.append(of_rows(problem, "torch varlen", library("torch"), _torch_varlen(starts, longest), note=note))
    else:
        arms.append(Arm.absent("torch varlen", library("torch"), "this torch has no torch.nn.attention.varlen"))
    if not importable("flash_attn"):
        return [*arms, Arm.absent("flash-attn varlen", "flash-attn", missing("flash-attn"))]
    from flash_attn import flash_attn_varlen_func

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = flash_attn_varlen_func(query, key, value, starts, starts, longest, longest, causal=True)
        return result

    return [*arms, of_rows(problem, "flash-attn varlen", library("flash-attn"), flash, note=note)]


def _torch_varlen(starts: Tensor, longest: int) -> RowsAttend:
    """Its keyword for causality changed between releases; before key heads could be shared, they are repeated."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    shares_heads = "enable_gqa" in parameters
    if shares_heads:
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not shares_heads:
            fold = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(fold, 1), value.repeat_interleave(fold, 1)
        result: Tensor = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
        return result

    return attend


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def of_rows(
    problem: Problem,
    name: str,
    lib: str,
    attend: RowsAttend,
    spread: Callable[[Tensor], Tensor] = _as_is,
    gather: Callable[[Tensor], Tensor] = _as_is,
    note: str = "",
) -> Arm:
    """An arm over rows. spread: lays the rows' tokens ``[sum of lengths, heads, D]`` out for ``attend``; gather: back."""
    source = torch.cat(problem.forest.rows(problem.query.device))
    counts = problem.counts(source)
    laid = [
        spread(x.detach()[source]).requires_grad_(problem.training) for x in (problem.query, problem.key, problem.value)
    ]
    upstream = spread((problem.upstream / counts.to(problem.upstream.dtype)[:, None, None])[source])

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(problem.training):
            out = attend(*laid)
            grads = torch.autograd.grad(out, laid, upstream) if problem.training else ()
        return dict(zip(("out", "d query", "d key", "d value"), (out.detach(), *grads), strict=False))

    def check(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed over the copies of a token; of its outputs, which are equal, the mean."""
        result = {}
        for key, wide in outputs.items():
            rows = gather(wide)
            total = rows.new_zeros(problem.forest.num_tokens, *rows.shape[1:]).index_add(0, source, rows)
            result[key] = total / counts[:, None, None].to(total.dtype) if key == "out" else total
        return result

    return Arm(name, lib, run, note=note, check=check)


def replicated(problem: Problem) -> list[Arm]:
    """Prompt by itself, then every response over its own copy of the prompt's keys and values, as PrefixGrouper and others do;
    only where all trees have equal shapes, so that one batched call serves each part."""
    shapes = set(problem.forest.trees)
    if len(shapes) > 1 or not problem.forest.trees[0][1] or len(set(problem.forest.trees[0][1])) > 1:
        return []
    (prompt, responses), trees = problem.forest.trees[0], len(problem.forest.trees)
    group, length = len(responses), responses[0]
    sees = torch.ones(length, prompt + length, dtype=torch.bool, device=problem.query.device).tril(prompt)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
            packed = tensor.view(trees, prompt + group * length, *tensor.shape[1:])
            head, tail = packed[:, :prompt].transpose(1, 2), packed[:, prompt:]
            return head, tail.reshape(trees * group, length, *tensor.shape[1:]).transpose(1, 2)

        (q_head, q_tail), (k_head, k_tail), (v_head, v_tail) = parts(query), parts(key), parts(value)
        first = F.scaled_dot_product_attention(q_head, k_head, v_head, is_causal=True, enable_gqa=True)
        keys, values = (
            torch.cat([head.repeat_interleave(group, 0), tail], 2)
            for head, tail in ((k_head, k_tail), (v_head, v_tail))
        )
        if query.is_cuda:  # with fewer key heads and a mask it would take its unfused path
            fold = problem.heads.query // problem.heads.key
            keys, values = (tensor.repeat_interleave(fold, 1) for tensor in (keys, values))
        second = F.scaled_dot_product_attention(q_tail, keys, values, attn_mask=sees, enable_gqa=True)
        second = second.transpose(1, 2).reshape(trees, group * length, *query.shape[1:])
        return torch.cat([first.transpose(1, 2), second], 1).flatten(0, 1)

    return [Arm("replicated prefix SDPA", library("torch"), partial(problem.run, attend))]


def flex(problem: Problem) -> list[Arm]:
    """FlexAttention with the same visibility rule as a mask function; its CPU form has no backward."""
    name, lib, device = "FlexAttention", library("torch"), problem.query.device
    if problem.training and device.type == "cpu":
        return [Arm.absent(name, lib, "its CPU form has no backward")]
    starts, ends, tokens = problem.layout.visible_from, problem.layout.visible_until, problem.layout.num_tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[key] <= query) & (query < ends[key])

    state: dict[str, Any] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        if not state:  # a layout serves all layers of a model, so its mask is made once
            from torch.compiler import config
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            begun = time.perf_counter()
            state["mask"] = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
            state["call"] = torch.compile(flex_attention, dynamic=False)
            with config.patch(force_disable_caches=True):  # type: ignore[attr-defined]  # what an earlier run compiled
                state["call"](*heads, block_mask=state["mask"], enable_gqa=True)
            state["seconds"] = time.perf_counter() - begun
        return state["call"](*heads, block_mask=state["mask"], enable_gqa=True)[0].transpose(0, 1)

    def note() -> str:
        return f"{state['seconds']:.1f} s for the mask and the first call, compiling included, outside what is timed"

    return [Arm(name, lib, partial(problem.run, attend), note=note)]

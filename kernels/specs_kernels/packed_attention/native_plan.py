"""The order in which the C++ kernel takes the tokens of a forest, and its runs in that order.

The kernel multiplies blocks of keys of one run. Prompts and responses are long, and a run is a run of the forest (``runs.py``).
But where many short runs lie above a token, as in a tree of single tokens, its keys would come one by one. So a short run goes on
into the largest child that has children itself, and the tokens of such a chain are moved next to each other; the other children
see the chain up to where they branch off. On the way up from a token, chains that were cut short at least double what lies below,
so there are few. A forest of prompts and responses is never moved.

Letters: T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.runs import Run, forest_runs

SHORT = 64
"""Tokens of a block of keys in the kernel: longer runs fill blocks of their own."""


class NativePlan(NamedTuple):
    """runs: int64 ``[runs, 4]``: first place, end, run above or -1, position of the first token; above before below.

    A run sees that above it up to its own position. visible_from: int32 ``[T]``, in places.
    order: int64 ``[T]``, the token in each place; places: int64 ``[T]``, the place of each token. None where nothing moves.
    """

    runs: Tensor
    visible_from: Tensor
    order: Tensor | None
    places: Tensor | None


def native_plan(layout: PackedLayout) -> NativePlan:
    """The plan of a layout, from its cache after the first call."""
    plan: NativePlan | None = layout.cache.get("packed_attention.native")
    if plan is None:
        with torch.inference_mode(False):  # the first call may be a rollout's, the next one a training step's
            plan = _make(layout)
        if type(plan.runs) is Tensor:  # not a tracer's stand-in
            layout.cache["packed_attention.native"] = plan
    return plan


def ordered(plan: NativePlan, tensor: Tensor) -> Tensor:
    """Rows by place."""
    return tensor if plan.order is None else tensor.index_select(0, plan.order)


def restored(plan: NativePlan, tensor: Tensor) -> Tensor:
    """Rows by token."""
    return tensor if plan.places is None else tensor.index_select(0, plan.places)


def _make(layout: PackedLayout) -> NativePlan:
    runs = forest_runs(layout)
    chains = _chains(runs)
    rows: list[tuple[int, int, int, int]] = []
    chain_of: dict[int, int] = {}
    start = 0
    for chain in chains:
        first = runs[chain[0]]
        end = start + sum(runs[n].end - runs[n].start for n in chain)
        rows.append((start, end, chain_of.get(first.above, -1), first.position))
        chain_of.update(dict.fromkeys(chain, len(rows) - 1))
        start = end
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)
    if len(chains) == len(runs):
        return NativePlan(table, layout.visible_from, None, None)
    tokens = [token for chain in chains for n in chain for token in range(runs[n].start, runs[n].end)]
    order = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    places = torch.empty_like(order)
    places[order] = torch.arange(len(tokens), device="cpu")
    visible_from = places[layout.visible_from[order].long()].to(torch.int32)
    return NativePlan(table, visible_from, order, places)


def _chains(runs: list[Run]) -> list[list[int]]:
    """Every run in one chain, chains above before those below, trees together; depth-first where every chain is one run."""
    below: list[list[int]] = [[] for _ in runs]
    for n, run in enumerate(runs):
        if run.above >= 0:
            below[run.above].append(n)
    chains: list[list[int]] = []
    waiting = [n for n, run in enumerate(runs) if run.above < 0][::-1]
    while waiting:
        chain = [waiting.pop()]
        while (child := _continuation(runs, below, chain[-1])) is not None:
            chain.append(child)
        chains.append(chain)
        inside = set(chain)
        waiting.extend(child for n in reversed(chain) for child in reversed(below[n]) if child not in inside)
    return chains


def _continuation(runs: list[Run], below: list[list[int]], n: int) -> int | None:
    """The child in whose run a short run goes on: that with most tokens below it, the first of equals."""
    inner = [child for child in below[n] if below[child]]
    if runs[n].end - runs[n].start >= SHORT or not inner:
        return None
    return max(inner, key=lambda child: runs[child].subtree_end - runs[child].start)

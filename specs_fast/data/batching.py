"""Which trees go through the model together, how values follow them there and back, and the order of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specs_fast.data.planner import Part, Plan, plan
from specs_fast.data.types import Tree


def plan_trees(trees: Sequence[Tree], max_tokens: int, *, packing: str, keep_whole: bool = False) -> Plan:
    """Micro-batches of these trees under a token budget; see `planner.plan`."""
    if max_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {max_tokens}")
    return plan(
        [len(tree.prompt) for tree in trees],
        [len(tree.responses) for tree in trees],
        [int(response.shape[0]) for tree in trees for response in tree.responses],
        max_tokens,
        packing=packing,
        keep_whole=keep_whole,
    )


def cut(trees: Sequence[Tree], parts: Sequence[Part]) -> list[Tree]:
    """The trees of a micro-batch: each part's prompt with its responses."""
    pieces = []
    for part in parts:
        tree = trees[part.tree]
        whole = len(part.responses) == len(tree.responses)
        pieces.append(tree if whole else Tree(tree.prompt, tuple(tree.responses[r] for r in part.responses)))
    return pieces


def gather(per_tree: Sequence[Tensor], trees: Sequence[Tree], parts: Sequence[Part]) -> Tensor:
    """Values per response token of a micro-batch, in the order of its scores, from values per tree ``[N_i]``."""
    pieces = [per_tree[0][:0]]  # a part may have no response
    for part in parts:
        by_response = per_tree[part.tree].split([int(response.shape[0]) for response in trees[part.tree].responses])
        pieces += [by_response[r] for r in part.responses]
    return torch.cat(pieces)


def scatter(values: Tensor, trees: Sequence[Tree], parts: Sequence[Part], into: Sequence[Tensor]) -> None:
    """The inverse of `gather`: writes a micro-batch's values ``[N]`` to their places in ``into``, ``[N_i]`` per tree."""
    start = 0
    for part in parts:
        places = into[part.tree].split([int(response.shape[0]) for response in trees[part.tree].responses])
        for r in part.responses:
            places[r].copy_(values[start : start + places[r].shape[0]])
            start += places[r].shape[0]


def epochs(count: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """Endless steps of ``per_step`` indices below ``count``: every index once per epoch, reshuffled each time.

    An epoch's last step is completed from the next epoch, so no row is dropped and every step is full.
    """
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < per_step:
            queue.extend(torch.randperm(count, generator=generator).tolist())
        yield queue[:per_step]
        queue = queue[per_step:]

"""Which trees go through the model together: micro-batches under a token budget, and the order of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from specs_fast.data.types import Tree


def micro_batches(trees: Sequence[Tree], max_tokens: int, *, packing: str) -> list[list[int]]:
    """Indices of trees per micro-batch, in order, each under ``max_tokens``; a larger tree is a micro-batch of its own.

    A tree counts as its packed tokens with ``packing="shared"``, as its padded rows with ``"none"``.
    """
    if max_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    filled = 0
    for index, tree in enumerate(trees):
        size = tree.num_tokens if packing == "shared" else _padded_tokens(tree)
        if not batches or filled + size > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += size
    return batches


def _padded_tokens(tree: Tree) -> int:
    longest = max((int(response.shape[0]) for response in tree.responses), default=0)
    return len(tree.responses) * (len(tree.prompt) + longest)


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

"""Which targets go through the workspace together: whole groups, as many as fit.

Letters: N targets, M targets that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Targets ``[start, stop)`` of M. fits: whether their scores fit the workspace; if not, the chunk is one group."""

    start: int
    stop: int
    fits: bool


def group_sizes(group_ids: Tensor, kept_M: Tensor | None) -> list[int]:
    """Targets that count per group, in order. Raises ValueError when a group is not contiguous. Reads sizes on the host."""
    runs = torch.unique_consecutive(group_ids)
    if int(torch.unique(runs).shape[0]) < runs.shape[0]:
        values, counts = torch.unique(runs, return_counts=True)
        broken = int(values[counts > 1][0])
        raise ValueError(f"group_ids must be contiguous per group; group {broken} comes back after another group")
    ids_M = group_ids if kept_M is None else group_ids.index_select(0, kept_M)
    sizes: list[int] = torch.unique_consecutive(ids_M, return_counts=True)[1].tolist()
    return sizes


def plan_chunks(num_targets: int, sizes: list[int] | None, capacity: int, row_block: int) -> Iterator[Chunk]:
    """Chunks of at most ``capacity`` targets; without groups of nearly equal size, multiples of ``row_block``."""
    if sizes is None:
        pieces = max(1, -(-num_targets // capacity))
        size = -(-num_targets // (pieces * row_block)) * row_block
        for start in range(0, num_targets, max(1, size)):
            yield Chunk(start, min(start + size, num_targets), True)
        return
    start = stop = 0
    for size in sizes:
        if stop > start and stop - start + size > capacity:
            yield Chunk(start, stop, True)
            start = stop
        stop += size
        if size > capacity:
            yield Chunk(start, stop, False)
            start = stop
    if stop > start:
        yield Chunk(start, stop, True)

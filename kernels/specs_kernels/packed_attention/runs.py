"""Runs of a forest: a segment, or a chain of segments without branches, in which every token sees all earlier ones."""

from __future__ import annotations

from typing import NamedTuple

from specs_kernels.layout import PackedLayout


class Run(NamedTuple):
    """Tokens ``start : end``; what lies below them is ``end : subtree_end``."""

    start: int
    end: int
    above: int
    """The run whose tokens come before on the path, or -1."""
    position: int
    """Of the first token, along its path."""
    subtree_end: int


def forest_runs(layout: PackedLayout) -> list[Run]:
    """The runs depth-first, none of them empty; a few steps per segment, on the host.

    A segment continues the run of its parent when nothing lies between them and nothing of the parent's subtree comes
    after its own.
    """
    runs: list[Run] = []
    run_of: list[int] = []
    start = 0
    for length, parent, subtree_end in zip(layout.lengths, layout.parents, layout.subtree_ends, strict=True):
        index = run_of[parent] if parent >= 0 else -1
        above = runs[index] if index >= 0 else None
        if length and above is not None and above.end == start and above.subtree_end == subtree_end:
            runs[index] = above._replace(end=start + length)
        elif length:
            position = above.position + above.end - above.start if above is not None else 0
            runs.append(Run(start, start + length, index, position, subtree_end))
            index = len(runs) - 1
        run_of.append(index)  # of an empty segment: its children see what its parent's would
        start += length
    return runs

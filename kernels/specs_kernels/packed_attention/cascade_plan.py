"""What the cascade calls: a causal call over the runs of a forest, and one over each depth of runs with something below.

Per layout, a few host steps per run and a few small tensors, made once and kept in ``layout.cache``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention.runs import Run, forest_runs
from specs_kernels.varlen import Sequences

Rows = slice | Tensor
"""Rows of a packed tensor: one range, or int64 indices of several."""


class Prefixes(NamedTuple):
    """One depth: every token below a run, as queries, against all keys of that run."""

    query_rows: Rows
    key_rows: Rows
    sequences: Sequences


class CascadePlan(NamedTuple):
    own: Sequences
    """Every run with itself, causal; the rows are the whole tensors."""
    above: tuple[Prefixes, ...]
    """From the roots down. A key is in one of them at most, a query in as many as there are runs above it."""
    longest_path: int


def cascade_plan(layout: PackedLayout) -> CascadePlan:
    """The plan of a layout with tokens."""
    plan: CascadePlan | None = layout.cache.get("packed_attention.cascade")
    if plan is None:
        with torch.inference_mode(False):  # the first call may be a rollout's, the next one a training step's
            plan = _make(forest_runs(layout), layout.device)
        if type(plan.own.query_starts) is Tensor:  # not a tracer's stand-in
            layout.cache["packed_attention.cascade"] = plan
    return plan


def _make(runs: list[Run], device: torch.device) -> CascadePlan:
    parents: list[list[Run]] = []  # by depth: runs with something below
    depths: list[int] = []
    for run in runs:
        depth = depths[run.above] + 1 if run.above >= 0 else 0
        depths.append(depth)
        if run.subtree_end > run.end:
            while len(parents) <= depth:
                parents.append([])
            parents[depth].append(run)
    own = [run.end - run.start for run in runs]
    return CascadePlan(
        _sequences(own, own, device),
        tuple(_prefixes(level, device) for level in parents),
        max(run.position + run.end - run.start for run in runs),
    )


def _prefixes(runs: list[Run], device: torch.device) -> Prefixes:
    below = [(run.end, run.subtree_end) for run in runs]
    keys = [(run.start, run.end) for run in runs]
    sequences = _sequences([end - start for start, end in below], [end - start for start, end in keys], device)
    return Prefixes(_rows(below, device), _rows(keys, device), sequences)


def _sequences(query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> Sequences:
    starts = [list(accumulate(lengths, initial=0)) for lengths in (query_lengths, key_lengths)]
    query_starts, key_starts = torch.tensor(starts, dtype=torch.int32, device=device).unbind()
    return Sequences(query_starts, key_starts, max(query_lengths), max(key_lengths))


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Rows:
    """A slice needs no copy; the indices of several ranges are made on the device."""
    if len(ranges) == 1:
        return slice(*ranges[0])
    lengths = [end - start for start, end in ranges]
    before = accumulate(lengths, initial=0)
    shifts = [start - count for (start, _), count in zip(ranges, before, strict=False)]
    total = sum(lengths)
    shift_R, length_R = torch.tensor([shifts, lengths], device=device).unbind()
    return torch.arange(total, device=device) + torch.repeat_interleave(shift_R, length_R, output_size=total)

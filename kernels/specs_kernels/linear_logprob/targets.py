"""Which targets count, and what is wrong with them: checked with an error, or masked without asking the device.

Letters: N targets, M targets that are worked on (those that count when checked, all N when masked), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.linear_logprob.row_pass import NO_TARGET, SKIP_ROW


@dataclass(frozen=True, slots=True)
class Targets:
    """target_M: int64, or NO_TARGET, or SKIP_ROW. temperature: a number or ``[M]``. source_M: row of hidden, None for 0..M-1.

    kept_M: place of each in N, None for all. good_N: with masks, False where the row does not count or is bad; bad_N: where a
    value is out of range. Both None when checked.
    """

    target_M: Tensor
    temperature: float | Tensor
    source_M: Tensor | None
    kept_M: Tensor | None
    good_N: Tensor | None
    bad_N: Tensor | None

    def hidden(self, hidden: Tensor) -> Tensor:
        """``[M, D]``; rows that do not count are 0, so that what they hold reaches nothing."""
        if self.source_M is None:
            picked = hidden
        elif hidden.shape[0]:
            picked = hidden.index_select(0, self.source_M)
        else:  # no row to pick: none of the targets counts
            picked = hidden.sum(0).expand(self.source_M.shape[0], -1)
        return picked if self.good_N is None else torch.where(self.good_N[:, None], picked, 0)

    def spread(self, values_M: Tensor, num_targets: int) -> Tensor:
        """``[M]`` -> ``[N]``: 0 where the target does not count, NaN where a value is bad."""
        if self.good_N is not None and self.bad_N is not None:
            return torch.where(self.good_N, values_M, 0.0).masked_fill(self.bad_N, torch.nan)
        if self.kept_M is None:
            return values_M
        return torch.zeros(num_targets, dtype=values_M.dtype, device=values_M.device).index_copy(
            0, self.kept_M, values_M
        )

    def pick(self, values_N: Tensor | None) -> Tensor | None:
        """``[N]`` -> ``[M]``: an upstream gradient, 0 where the target does not count or is bad."""
        if values_N is None:
            return None
        if self.good_N is not None:
            return torch.where(self.good_N, values_N, 0.0)
        return values_N if self.kept_M is None else values_N.index_select(0, self.kept_M)

    def scatter_hidden(self, dhidden_MD: Tensor, hidden: Tensor) -> Tensor:
        """Sum the gradients of targets that share a hidden row, in target order, and round once."""
        return scatter_rows(dhidden_MD, self.source_M, hidden)


def scatter_rows(dhidden_MD: Tensor, source_M: Tensor | None, hidden: Tensor) -> Tensor:
    if source_M is None:
        return dhidden_MD.to(hidden.dtype)
    if hidden.shape[0] == 0:
        return torch.zeros_like(hidden)
    grad = torch.zeros(hidden.shape, dtype=dhidden_MD.dtype, device=hidden.device)
    if hidden.device.type == "cpu":
        grad.index_add_(0, source_M, dhidden_MD)  # sequential over the index on CPU
    else:
        grad.index_put_((source_M,), dhidden_MD, accumulate=True)  # sorted by index on CUDA; index_add_ uses atomics
    return grad.to(hidden.dtype)


def find_targets(
    target: Tensor,
    rows: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    num_rows: int,
    vocab_size: int,
    validate: bool,
    partial: bool = False,
) -> Targets:
    """validate: raise ValueError for bad values and drop ignored targets (reads a count on the host); else mask them.

    partial: targets outside ``[0, V)`` are those of another slice of the vocabulary, not errors.
    """
    if validate:
        return _checked(target, rows, temperature, ignore_index, num_rows, vocab_size, partial)
    return _masked(target, rows, temperature, ignore_index, num_rows, vocab_size, partial)


def _checked(
    target: Tensor,
    rows: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    num_rows: int,
    vocab_size: int,
    partial: bool,
) -> Targets:
    kept = checks.kept_targets(target, ignore_index, None if partial else vocab_size)
    checks.check_temperature(temperature, target.shape[0], kept)
    if rows is not None:
        checks.check_rows(rows, kept, num_rows)
    target_M = (target if kept is None else target.index_select(0, kept)).long()
    if partial:
        target_M = torch.where((target_M >= 0) & (target_M < vocab_size), target_M, NO_TARGET)
    if isinstance(temperature, Tensor) and kept is not None:
        temperature = temperature.index_select(0, kept)
    if rows is None:
        source = kept
    else:
        source = (rows if kept is None else rows.index_select(0, kept)).long()
    return Targets(target_M, temperature, source, kept, None, None)


def _masked(
    target: Tensor,
    rows: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    num_rows: int,
    vocab_size: int,
    partial: bool,
) -> Targets:
    target = target.long()
    counts = target != ignore_index
    inside = (target >= 0) & (target < vocab_size)
    good = counts if partial else counts & inside
    source = None
    if rows is not None:
        source = rows.long().clamp(0, max(0, num_rows - 1))
        good = good & (source == rows) & (rows < num_rows)
    if isinstance(temperature, Tensor):
        good = good & (temperature > 0) & torch.isfinite(temperature)
        temperature = torch.where(good, temperature, 1.0)
    target_M = torch.where(good, torch.where(inside, target, NO_TARGET), SKIP_ROW)
    return Targets(target_M, temperature, source, None, good, counts & ~good)

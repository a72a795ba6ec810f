"""Log-probs over a vocabulary that is split across callers: what one slice knows, and the exact merge.

Letters: N targets, D hidden size, V columns of this slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from specs_kernels import checks
from specs_kernels.linear_logprob.op import call
from specs_kernels.results import TokenLogprobs


class Partials(NamedTuple):
    """Sums over one slice of the vocabulary, each ``[N]``; all but ``shift`` and ``found`` pass gradients.

    shift: the number c by which the sums are scaled (here the slice's log-sum-exp; any number near the maximum serves).
    total: ``sum_j exp(z_j - c)``. weighted: ``sum_j exp(z_j - c) (z_j - c)``, None when the entropy is not wanted.
    target: z of the target, 0 where another slice has it. found: 1 where this slice has the target, 0 elsewhere, in the dtype of
    the others. Rows whose target is ``ignore_index`` hold total 1 and 0 elsewhere.
    """

    shift: Tensor
    total: Tensor
    weighted: Tensor | None
    target: Tensor
    found: Tensor


def linear_logprob_partials(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    first_column: int = 0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    **options: Any,
) -> Partials:
    """:func:`linear_logprob` over the columns ``[first_column, first_column + V)`` of a larger vocabulary.

    weight: this slice's ``[V, D]``; ``bias`` and ``lora``'s B are slices as well. target: places in the whole vocabulary.
    The other arguments are those of ``linear_logprob``, in every mode. The gradients of hidden are this slice's share: where
    the slices are on several ranks, the caller sums them over the ranks, as for any column-parallel layer.

    Raises ValueError as ``linear_logprob`` does; a target that no slice has is seen by :func:`merge_partials`.
    """
    if isinstance(first_column, bool) or not isinstance(first_column, int) or first_column < 0:
        raise ValueError(f"first_column must be an int of at least 0; got {first_column!r}")
    checks.check_flag("return_entropy", return_entropy)
    checks.check_float("weight", weight, 2)
    checks.check_tensor("target", target)
    checks.check_integer("target", target, (target.numel(),))
    checks.check_ignore_index(ignore_index, target.dtype)
    local = target.long() - first_column
    mine = (local >= 0) & (local < weight.shape[0]) & (target != ignore_index)
    local = torch.where(mine, local, torch.where(target == ignore_index, -100, -1))
    bias, forbidden = options.pop("bias", None), None
    if bias is not None:
        checks.check_float("bias", bias, 1)
        bias, forbidden = _finite_slice(bias)
    logp, entropy, lse = call(
        hidden, weight, local, bias=bias, ignore_index=-100, return_entropy=return_entropy, partial=True, **options
    )
    shift = lse.detach()
    total = torch.exp(lse - shift)
    weighted = None if entropy is None else total * (lse - shift - entropy)
    score = torch.where(mine, logp + lse, 0.0)
    if forbidden is not None:
        score = torch.where(mine & forbidden, -torch.inf, score)
    return Partials(shift, total, weighted, score, mine.to(shift.dtype))


def _finite_slice(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias that is -inf everywhere, as in a slice of padding, made finite but so low that the merge drops the slice.

    Such a slice has no largest score to shift by. Also returned: whether it was one, 0-d.
    """
    forbidden = (bias == -torch.inf).all()
    return torch.where(forbidden, -16384.0 if bias.dtype == torch.float16 else -1e30, bias), forbidden


def merge_partials(
    parts: Partials | Sequence[Partials], target: Tensor, *, ignore_index: int = -100, group: Any = None
) -> TokenLogprobs:
    """Log-prob, entropy and log-sum-exp over all slices.

    With m the largest shift, ``s = sum_k total_k exp(c_k - m)`` and t alike from ``weighted_k + (c_k - m) total_k``::

        lse = m + log s      logp = target - lse      entropy = log s - t / s

    parts: the partials of all slices, or those of this rank with ``group``, a process group over which maxima and sums are
    taken (every rank then computes the same loss, so its backward passes gradients through unchanged).
    target: as given to the slices; ignored targets give 0 in all outputs. A target that none or several of the slices have raises
        ValueError on CPU, and has the log-prob NaN, with no gradient, elsewhere and under ``torch.compile``.

    Raises ValueError for parts of different lengths, of which only some have an entropy, or that are no :class:`Partials`.
    """
    own = [parts] if isinstance(parts, Partials) else list(parts)
    _check_parts(own, target, ignore_index)
    shift = torch.stack([part.shift for part in own]).amax(0)
    if group is not None:
        torch.distributed.all_reduce(shift, torch.distributed.ReduceOp.MAX, group=group)
    sums = []
    for part in own:
        change = part.shift - shift
        scale = torch.exp(change)
        rows = [part.target, part.total * scale, part.found]
        if part.weighted is not None:
            rows.append((part.weighted + change * part.total) * scale)
        sums.append(torch.stack(rows))
    merged = torch.stack(sums).sum(0)
    if group is not None:
        merged = _SumOverRanks.apply(merged, group)
    log_total = merged[1].log()
    counts = target != ignore_index
    lost = counts & (merged[2] != 1)
    if not torch.compiler.is_compiling() and target.device.type == "cpu" and bool(lost.any()):
        n = int(lost.nonzero()[0])
        raise ValueError(
            f"target[{n}] is {int(target[n])}, a column of {int(merged[2, n])} of the slices; allowed: of one"
        )
    lse = shift + log_total
    entropy = torch.where(counts, log_total - merged[3] / merged[1], 0.0) if len(merged) > 3 else None
    logp = torch.where(counts, (merged[0] - shift) - log_total, 0.0).masked_fill(lost, torch.nan)
    return TokenLogprobs(logp, entropy, torch.where(counts, lse, 0.0))


def _check_parts(parts: list[Partials], target: Tensor, ignore_index: int) -> None:
    if not parts:
        raise ValueError("parts is empty; there must be at least one slice")
    for place, part in enumerate(parts):
        if not isinstance(part, Partials):
            raise ValueError(f"parts[{place}] must be a Partials; got {type(part).__name__}")
        if part.shift.shape != parts[0].shift.shape:
            counts = f"parts[0] has {parts[0].shift.shape[0]}, parts[{place}] has {part.shift.shape[0]}"
            raise ValueError(f"parts must be of the same targets; {counts}")
        if (part.weighted is None) != (parts[0].weighted is None):
            raise ValueError("some parts have weighted sums and some do not; pass return_entropy alike to all slices")
    checks.check_integer("target", target, tuple(parts[0].shift.shape))
    checks.check_ignore_index(ignore_index, target.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is the identity: every rank has the whole loss, so its gradient is whole already."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

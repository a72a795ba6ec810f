"""Softmax statistics of score rows that arrive in pieces, and the gradient of log-prob, entropy and log-sum-exp.

With z the scores of one row, m a running maximum, s = sum_j exp(z_j - m) and t = sum_j exp(z_j - m) (z_j - m)::

    lse = m + log s      entropy = log s - t / s      E = sum_j p_j z_j = m + t / s

Entropy from shifted scores loses nothing when all scores are far from 0. For upstream gradients g (log-prob),
q (entropy) and r (log-sum-exp)::

    dz_j = p_j [(r - g) - q (z_j - E)] + g 1[j = target]

Letters: R rows, C columns of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = -1e5
"""Stands in for z - m = -inf where it meets a factor exp(z - m) = 0: their product is 0, not NaN."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RunningSoftmax:
    """Statistics (m, s, t) of R rows, updated tile by tile in a fixed order."""

    def __init__(self, want_entropy: bool) -> None:
        self.want_entropy = want_entropy
        self.maximum: Tensor | None = None
        self.total: Tensor
        self.weighted: Tensor | None = None

    def update_(self, z_RC: Tensor, maybe_minus_inf: bool = False) -> Tensor:
        """Take in a tile; the tile is overwritten with z - m of this tile, which is also returned.

        maybe_minus_inf: some scores may be -inf (a masked logit, a bias of -inf).
        """
        maximum = z_RC.amax(1)
        if maybe_minus_inf:
            maximum.clamp_(min=torch.finfo(maximum.dtype).min)
        shifted = z_RC.sub_(maximum[:, None])
        exp = torch.exp(shifted)
        total = exp.sum(1)
        weighted = None
        if self.want_entropy:
            factor = shifted.clamp(min=_FLOOR) if maybe_minus_inf else shifted
            weighted = exp.mul_(factor).sum(1)
        self._merge(maximum, total, weighted)
        return shifted

    def _merge(self, maximum: Tensor, total: Tensor, weighted: Tensor | None) -> None:
        if self.maximum is None:
            self.maximum, self.total, self.weighted = maximum, total, weighted
            return
        new = torch.maximum(self.maximum, maximum)
        old_shift, tile_shift = self.maximum - new, maximum - new
        old_scale, tile_scale = torch.exp(old_shift), torch.exp(tile_shift)
        if weighted is not None and self.weighted is not None:
            old_part = old_scale * (self.weighted + old_shift.clamp(min=_FLOOR) * self.total)
            self.weighted = old_part + tile_scale * (weighted + tile_shift.clamp(min=_FLOOR) * total)
        self.total = old_scale * self.total + tile_scale * total
        self.maximum = new

    def finish(self) -> tuple[Tensor, ...]:
        """(m, log s, t / s), each ``[R]``; t / s only when the entropy was asked for."""
        assert self.maximum is not None
        if self.weighted is None:
            return self.maximum, self.total.log()
        return self.maximum, self.total.log(), self.weighted / self.total


def dscores_(
    shifted_RC: Tensor,
    log_total_R: Tensor,
    mean_R: Tensor | None,
    target_R: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    maybe_minus_inf: bool = False,
) -> Tensor:
    """Gradient of the scores of one tile, from z - m (left intact), log s and t / s of the whole rows.

    target_R: column of the target inside this tile; values outside ``[0, C)`` mean "in another tile".
    The gradient of the target column is formed in the accumulation dtype, before any rounding.
    """
    grad = torch.sub(shifted_RC, log_total_R[:, None]).exp_()
    if grad_entropy is not None and mean_R is not None:
        base = grad_entropy * mean_R
        if grad_lse is not None:
            base = base + grad_lse
        if grad_logp is not None:
            base = base - grad_logp
        factor = shifted_RC.clamp(min=_FLOOR) if maybe_minus_inf else shifted_RC
        grad.mul_(torch.addcmul(base[:, None], factor, grad_entropy[:, None], value=-1))
    elif grad_lse is not None and grad_logp is not None:
        grad.mul_((grad_lse - grad_logp)[:, None])
    elif grad_lse is not None:
        grad.mul_(grad_lse[:, None])
    elif grad_logp is not None:
        grad.mul_(grad_logp.neg()[:, None])
    else:
        return grad.zero_()
    if grad_logp is not None:
        inside = (target_R >= 0) & (target_R < grad.shape[1])
        column = torch.where(inside, target_R, 0)
        grad.scatter_add_(1, column[:, None], torch.where(inside, grad_logp, 0.0)[:, None])
    return grad

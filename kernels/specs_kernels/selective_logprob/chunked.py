"""``selective_logprob`` in plain PyTorch: rows in tiles of at most ``TILE_BYTES``, fp32 (fp64) statistics.

The backward forms the gradient of the logits tile by tile from the saved logits and three numbers per row; nothing else
of size ``[N, V]`` is allocated. Deterministic; a row's result does not depend on the other rows. Values are in range here:
``autograd.py`` checks them or sets bad rows aside as ignored ones.

Letters: N targets, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from specs_kernels.softmax import RunningSoftmax, accumulation_dtype, dscores_

TILE_BYTES = 2 << 20


class Statistics(NamedTuple):
    """Per target ``[N]``, for the backward: m, log s and t / s (``softmax.py``)."""

    maximum: Tensor
    log_total: Tensor
    mean: Tensor | None


class _Plan:
    """Which rows are worked on. On CPU those that count; elsewhere all, with zeros for the others."""

    def __init__(
        self, logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int, dtype: torch.dtype
    ) -> None:
        self.logits, self.dtype = logits, dtype
        self.good = target != ignore_index
        self.target = torch.where(self.good, target, 0).long()
        self.temperature = (
            torch.where(self.good, temperature, 1.0).to(dtype) if isinstance(temperature, Tensor) else temperature
        )
        self.index: Tensor | None = None
        if logits.device.type == "cpu" and not bool(self.good.all()):
            self.index = self.good.nonzero().squeeze(1)
        self.masked = logits.device.type != "cpu"

    @property
    def count(self) -> int:
        return self.logits.shape[0] if self.index is None else self.index.shape[0]

    def tiles(self) -> Iterator[slice]:
        size = max(1, TILE_BYTES // (self.logits.shape[1] * self.dtype.itemsize))
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def places(self, rows: slice) -> slice | Tensor:
        """Where the rows of a tile are in N."""
        return rows if self.index is None else self.index[rows]

    def scores(self, places: slice | Tensor) -> Tensor:
        """A fresh tile of ``logits / temperature``."""
        z_RV = self.logits[places]
        if self.masked:
            z_RV = torch.where(self.good[places, None], z_RV, 0)
        z_RV = z_RV.to(self.dtype, copy=True)
        if isinstance(self.temperature, Tensor):
            return z_RV.div_(self.temperature[places, None])
        return z_RV if self.temperature == 1.0 else z_RV.div_(self.temperature)

    def outputs(self, values: Tensor) -> Tensor:
        return torch.where(self.good, values, 0.0)


def forward(
    logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Statistics]:
    """(logp, entropy, lse, statistics for :func:`backward`), all ``[N]``."""
    dtype = accumulation_dtype(logits.dtype)
    plan = _Plan(logits, target, temperature, ignore_index, dtype)
    score, maximum, log_total = (torch.zeros(logits.shape[0], dtype=dtype, device=logits.device) for _ in range(3))
    mean = torch.zeros_like(score) if return_entropy else None
    parts = [maximum, log_total] if mean is None else [maximum, log_total, mean]
    for rows in plan.tiles():
        places = plan.places(rows)
        z_RV = plan.scores(places)
        score[places] = z_RV.gather(1, plan.target[places, None]).squeeze(1)
        running = RunningSoftmax(return_entropy)
        running.update_(z_RV, maybe_minus_inf=True)
        for part, values in zip(parts, running.finish(), strict=True):
            part[places] = values
    logp = plan.outputs((score - maximum) - log_total)
    entropy = None if mean is None else plan.outputs(log_total - mean)
    return logp, entropy, plan.outputs(maximum + log_total), Statistics(maximum, log_total, mean)


def backward(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    statistics: Statistics,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, in ``out`` if given, which may be the logits themselves."""
    plan = _Plan(logits, target, temperature, ignore_index, statistics.maximum.dtype)
    divisor = plan.temperature
    # Dividing the upstream gradients by the temperature is the temperature's whole part in the chain rule.
    upstream = [
        None if grad is None else torch.where(plan.good, grad.to(plan.dtype), 0.0) / divisor
        for grad in (grad_logp, grad_entropy, grad_lse)
    ]
    grad_logits = torch.empty_like(logits) if out is None else out
    if plan.index is not None:
        if out is None:
            grad_logits.zero_()
        else:
            grad_logits[~plan.good] = 0.0
    mean = statistics.mean
    for rows in plan.tiles():
        places = plan.places(rows)
        z_RV = plan.scores(places).sub_(statistics.maximum[places, None])
        grad_g, grad_q, grad_r = (None if grad is None else grad[places] for grad in upstream)
        mean_R = None if mean is None else mean[places]
        log_total_R, target_R = statistics.log_total[places], plan.target[places]
        dz_RV = dscores_(z_RV, log_total_R, mean_R, target_R, grad_g, grad_q, grad_r, maybe_minus_inf=True)
        if isinstance(places, slice):
            grad_logits[places] = dz_RV
        else:
            grad_logits.index_copy_(0, places, dz_RV.to(logits.dtype))
    return grad_logits

"""``selective_logprob`` in C++ on CPU (``csrc/cpu/row_pass*``).

The forward reads the logits once, the backward reads them once and writes the gradient once, which may be the logits
themselves; nothing else of size ``[N, V]`` is allocated. Any strides. Deterministic; a row's result depends on its own
values only.

Letters: N targets, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import NO_TARGET, SKIP_ROW
from specs_kernels.softmax import accumulation_dtype


class Statistics(NamedTuple):
    """Per target, for the backward: m, log s and t / s, all in units of the scores ``logits / temperature``."""

    maximum: Tensor
    log_total: Tensor
    mean: Tensor | None


def _inverse(temperature: float | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).reciprocal(), 1.0
    return None, 1.0 / temperature


def _columns(target: Tensor, ignore_index: int) -> Tensor:
    """Targets as the sweeps want them: int64, SKIP_ROW where they do not count, NO_TARGET where out of range."""
    target = target.long()
    return torch.where(target == ignore_index, SKIP_ROW, target.clamp(min=NO_TARGET))


def forward(
    logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Statistics]:
    """(logp, entropy, lse, statistics for :func:`backward`), all ``[N]``, from logits ``[N, V]`` of any strides.

    Rows whose target is ``ignore_index`` are not read and give 0; a target out of range gives a log-prob of NaN.
    """
    num_targets, vocab_size = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    inverse_N, inverse = _inverse(temperature, dtype)
    maximum, total, weighted, score = torch.empty(4, num_targets, dtype=dtype, device=logits.device).unbind()
    column = _columns(target, ignore_index)
    score.fill_(torch.nan)
    torch.ops.specs_kernels.row_pass_stats(
        logits,
        column,
        inverse_N,
        inverse,
        maximum,
        total,
        weighted if return_entropy else None,
        score,
    )
    log_total = total.log()
    mean = weighted / total if return_entropy else None
    logp = (score - maximum) - log_total
    entropy = None if mean is None else log_total - mean
    return logp, entropy, maximum + log_total, Statistics(maximum, log_total, mean)


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
    """Gradient of the logits, in ``out`` if given, which may be the logits themselves.

    ValueError when ``grad_entropy`` is given with the statistics of a forward without entropy.
    """
    dtype = accumulation_dtype(logits.dtype)
    grad_logits = torch.empty_like(logits) if out is None else out
    if grad_logp is None and grad_entropy is None and grad_lse is None:
        return grad_logits.zero_()
    if grad_entropy is not None and statistics.mean is None:
        raise ValueError("grad_entropy needs the statistics of a forward with return_entropy=True")
    grad_logp, grad_entropy, grad_lse = (
        None if grad is None else grad.to(dtype) for grad in (grad_logp, grad_entropy, grad_lse)
    )
    base = torch.zeros_like(statistics.log_total) if grad_lse is None else grad_lse
    if grad_logp is not None:
        base = base - grad_logp
    if grad_entropy is not None and statistics.mean is not None:
        base = torch.addcmul(base, grad_entropy, statistics.mean)
    inverse_N, inverse = _inverse(temperature, dtype)
    torch.ops.specs_kernels.row_pass_gradients(
        logits,
        _columns(target, ignore_index),
        inverse_N,
        inverse,
        statistics.maximum,
        statistics.log_total,
        base,
        grad_entropy,
        grad_logp,
        grad_logits,
    )
    return grad_logits

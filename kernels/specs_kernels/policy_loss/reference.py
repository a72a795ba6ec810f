"""The definition of ``policy_loss``. Differentiable by autograd, any dtype up to fp64.

Letters: N tokens that count, S segments with tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels.segments import TokenRuns

KINDS = ("grpo",)
AGGREGATIONS = ("dapo", "bnpo", "grpo", "dr_grpo")
MAX_LOG_RATIO = 80.0
"""exp of more than 88 is inf in fp32, and a token whose inf is clipped away would still pass 0 * inf = NaN backward."""


def aggregate(values_N: Tensor, runs: TokenRuns, aggregation: str, denominator: float | None) -> Tensor:
    """One number from per-token values; the loss and every metric go through here.

    "dapo", "dr_grpo": token sum / denominator. "bnpo": token sum / local tokens.
    "grpo": sum of per-sequence token means / denominator. A denominator of None is the local count.
    """
    if aggregation == "grpo":
        return runs.mean(values_N).sum() / (max(runs.ids.shape[0], 1) if denominator is None else denominator)
    return values_N.sum() / (max(values_N.shape[0], 1) if denominator is None else denominator)


def policy_loss_reference(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    segment_ids_N: Tensor,
    ref_logp_N: Tensor | None,
    kind: str,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    aggregation: str,
    denominator: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`specs_kernels.policy_loss`. The vectors hold the tokens that count, in the accumulation dtype."""
    runs = TokenRuns.of(segment_ids_N)
    ratio = torch.exp((logp_N - old_logp_N).clamp(max=MAX_LOG_RATIO))
    if kind == "grpo":
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        loss_N = -torch.minimum(ratio * advantage_N, clipped * advantage_N)
    else:
        raise ValueError(f"kind {kind!r}")
    with torch.no_grad():
        low = ((ratio < 1 - epsilon) & (advantage_N < 0)).to(ratio.dtype)
        high = ((ratio > 1 + epsilon_high) & (advantage_N > 0)).to(ratio.dtype)
        per_token = {
            "ratio/mean": ratio.detach(),
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,
        }
    if ref_logp_N is not None:
        log_ratio = ref_logp_N - logp_N
        kl_N = torch.expm1(log_ratio) - log_ratio
        per_token["kl"] = kl_N.detach()
        if beta:
            loss_N = loss_N + beta * kl_N
    loss = aggregate(loss_N, runs, aggregation, denominator)
    with torch.no_grad():
        metrics = {name: aggregate(values, runs, aggregation, denominator) for name, values in per_token.items()}
    return loss, metrics

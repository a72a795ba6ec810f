"""Metrics of samples: unbiased pass@k, standard errors over prompts, Generalization Factor, rollout branching factor.

Letters: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    n samples of which c are correct. ValueError unless 0 <= c <= n and 1 <= k <= n. Source: Chen et al., arXiv 2107.03374,
    equation 1.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"{num_correct} correct of {num_samples} samples; it must lie between 0 and the number of samples"
        )
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples; k must lie between 1 and the number of samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def generalization_factor(in_distribution: float, out_of_distribution: float, beta: float = 2.0) -> float:
    """SPECS' Γ = (1 + β²) G_ID G_OOD / (β² G_ID + G_OOD): F_β of the two, β = 2 weighing OOD more; 0 where both are 0.

    The arguments are on one scale of any unit, and so is the result. Secondary sources call them gains over the base
    model; the published curve comes out with raw percentages. ValueError for a negative argument (no mean of this kind
    is defined for losses) or a beta that is not positive. Source: Metis-SPECS, arXiv 2510.25801, through notes.
    """
    if not (in_distribution >= 0 and out_of_distribution >= 0 and beta > 0):
        raise ValueError(
            f"generalization_factor({in_distribution}, {out_of_distribution}, beta={beta}): the two values must be 0 or "
            "more and beta above 0"
        )
    denominator = beta**2 * in_distribution + out_of_distribution
    return (1 + beta**2) * in_distribution * out_of_distribution / denominator if denominator else 0.0


def rollout_branching_factor(logits_NV: Tensor, top_p: float = 0.95) -> float:
    """Mean size of the nucleus: the smallest set of next tokens whose probability reaches ``top_p``, over N positions.

    The definition of arXiv 2508.07534, through notes. SPECS reports a factor of this name; that it uses the same
    definition and p = 0.95 is not confirmed. logits: any float dtype, computed in fp32 or wider.
    ValueError for no positions or top_p outside (0, 1].
    """
    if logits_NV.ndim != 2 or logits_NV.shape[0] == 0:
        raise ValueError(f"logits must be [N, V] with N >= 1, got {list(logits_NV.shape)}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    probability_NV = logits_NV.to(wide).softmax(-1).sort(dim=-1, descending=True).values
    before_NV = probability_NV.cumsum(-1) - probability_NV
    # A token belongs to the set while those before it have not reached p; rounding of the sums must not add one.
    tolerance = 8 * torch.finfo(wide).eps
    kept_N = (before_NV < top_p - tolerance).sum(-1).clamp(min=1)
    return float(kept_N.double().mean())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; ValueError for none."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    return math.fsum(values) / len(values)


def standard_error(prompt_means: Sequence[float]) -> float:
    """Standard error of a mean over prompts: the sample standard deviation of per-prompt means over sqrt(prompts).

    Samples of one prompt are not independent, so they enter as one value. NaN for fewer than two prompts.
    """
    count = len(prompt_means)
    if count < 2:
        return math.nan
    centre = mean(prompt_means)
    variance = math.fsum((value - centre) ** 2 for value in prompt_means) / (count - 1)
    return math.sqrt(variance / count)

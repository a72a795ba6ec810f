"""Drawing a token per row from log-probs, with randomness that belongs to the row and not to its batch.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """top_k keeps the k most likely tokens (0: all); then top_p keeps the smallest set of them whose probability, renormalised,
    reaches top_p (1: all), as transformers does."""

    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (no limit) or positive")


def row_uniforms(seed: int, rows: list[tuple[int, int]], steps: int) -> Tensor:
    """One stream of uniforms in [0, 1) per row, fp64 ``[R, steps]``, on the CPU.

    A row is (prompt index, sample index), and its stream depends on these and the seed alone: neither on how rows are batched nor
    on how many samples its prompt gets.
    """
    generator = torch.Generator()
    uniforms = torch.empty(len(rows), steps, dtype=torch.float64)
    for row, (prompt, sample) in enumerate(rows):
        digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        uniforms[row] = torch.rand(steps, generator=generator, dtype=torch.float64)
    return uniforms


def draw(logp_RV: Tensor, uniform_R: Tensor, truncation: Truncation) -> Tensor:
    """Inverse-CDF draw: int64 ``[R]``. logp may hold -inf (never drawn) and need not be normalised; a row with NaN gives some
    valid index."""
    probability_RV = _truncated(logp_RV, truncation).double().softmax(-1)
    cdf_RV = probability_RV.cumsum(-1)
    # A token is the first whose CDF exceeds u * total: one of probability 0 does not move the CDF, so it is never first. The
    # product can round up to the total itself, hence the step below it.
    total_R = cdf_RV[:, -1]
    point_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    return torch.searchsorted(cdf_RV, point_R.unsqueeze(1), right=True).squeeze(1).clamp_(max=logp_RV.shape[1] - 1)


def _truncated(logp_RV: Tensor, truncation: Truncation) -> Tensor:
    if 0 < truncation.top_k < logp_RV.shape[1]:
        kth_R1 = logp_RV.topk(truncation.top_k, dim=-1).values[:, -1:]
        logp_RV = logp_RV.masked_fill(logp_RV < kth_R1, -torch.inf)
    if truncation.top_p < 1.0:
        ordered_RV, index_RV = logp_RV.sort(dim=-1, descending=True, stable=True)
        probability_RV = ordered_RV.double().softmax(-1)
        before_RV = probability_RV.cumsum(-1) - probability_RV
        drop_RV = torch.zeros_like(logp_RV, dtype=torch.bool).scatter(1, index_RV, before_RV >= truncation.top_p)
        logp_RV = logp_RV.masked_fill(drop_RV, -torch.inf)
    return logp_RV

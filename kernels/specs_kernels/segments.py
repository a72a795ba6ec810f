"""Sums over the segments of a packed vector, shared by the losses.

Letters: N tokens, S segments present.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRuns:
    """Which run of equal segment ids each token belongs to.

    ids: int64 ``[S]``, the segment id of each run, in token order. run_of_token: int64 ``[N]``. lengths: int64 ``[S]``.
    """

    ids: Tensor
    run_of_token: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, segment_ids: Tensor) -> TokenRuns:
        """Segment ids may come in any order, each in one contiguous piece; a split segment raises ValueError."""
        ids, run_of_token, lengths = torch.unique_consecutive(segment_ids, return_inverse=True, return_counts=True)
        ordered = ids.sort().values
        repeated = ordered[1:] == ordered[:-1]
        if bool(repeated.any()):
            raise ValueError(
                f"segment id {int(ordered[1:][repeated][0])} appears in several places; "
                "the tokens of a segment must be contiguous"
            )
        return cls(ids.long(), run_of_token, lengths)

    def sum(self, values: Tensor) -> Tensor:
        """Sum per run ``[S]`` of ``values [N]``, in token order (deterministic)."""
        zeros = torch.zeros(self.ids.shape[0], dtype=values.dtype, device=values.device)
        if values.device.type == "cpu":
            return zeros.index_add(0, self.run_of_token, values)
        return zeros.index_put((self.run_of_token,), values, accumulate=True)

    def mean(self, values: Tensor) -> Tensor:
        """Mean per run ``[S]``. A run has at least one token by construction."""
        return self.sum(values) / self.lengths.to(values.dtype)

    def locate(self, segment_ids: Tensor) -> Tensor:
        """Run of each given segment id, any shape; S for a segment that has no token."""
        if self.ids.shape[0] == 0:
            return torch.zeros_like(segment_ids)
        ordered, order = self.ids.sort()
        place = torch.searchsorted(ordered, segment_ids.contiguous()).clamp_(max=ordered.shape[0] - 1)
        return torch.where(ordered[place] == segment_ids, order[place], self.ids.shape[0])


def kept_tokens(mask: Tensor | None) -> Tensor | None:
    """Indices of the tokens whose mask is True; None for all."""
    return None if mask is None else mask.nonzero().squeeze(1)

"""Return types shared by the log-prob ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Per-target results of ``linear_logprob`` and ``selective_logprob``, fp32 ``[N]`` (fp64 for fp64 inputs).

    logp: log-prob of the target. entropy: of the whole distribution in nats, None unless asked for.
    lse: log-sum-exp of the logits. All three are 0 where the target is ``ignore_index``.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor

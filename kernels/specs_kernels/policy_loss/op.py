"""The public ``policy_loss``: what it accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.policy_loss.reference import AGGREGATIONS, KINDS, policy_loss_reference
from specs_kernels.segments import kept_tokens
from specs_kernels.softmax import accumulation_dtype


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    segment_ids: Tensor,
    *,
    mask: Tensor | None = None,
    kind: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    aggregation: str = "dapo",
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO on packed token log-probs: a clipped ratio per token, an optional KL term, four ways to aggregate.

    Per token, with ratio = exp(logp - old_logp) and d = ref_logp - logp::

        loss = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * (exp(d) - d - 1)

    (arXiv 2402.03300; asymmetric clip: DAPO, arXiv 2503.14476; the KL term is the k3 estimator, added after clipping.)
    A log-ratio counts as at most 80, where exp still is finite: one token far off-policy cannot turn a gradient into NaN.
    ``kind`` names ratio and trust region only; how tokens become one number is ``aggregation``:

    - "dapo": token sum / denominator; pass the token count over all micro-batches and ranks (arXiv 2503.14476).
    - "bnpo": token sum / local token count; takes no denominator, and does not add over micro-batches.
    - "grpo": sum over sequences of the mean over their tokens / denominator, the sequence count (arXiv 2402.03300).
    - "dr_grpo": token sum / denominator, which is required: sequences x maximum length (arXiv 2503.20783).

    logp: floating ``[N]``, the only input with a gradient. old_logp: ``[N]``, or None for ``logp.detach()`` (ratio 1).
    advantage: floating ``[N]``, one per token. segment_ids: int64 or int32 ``[N]``, in any order, each contiguous.
    mask: bool ``[N]``; where False nothing is read (values may be NaN) or counted in a length.
    epsilon_high: None means ``epsilon``. ref_logp: ``[N]``, required when beta > 0; with beta = 0 it only gives ``kl``.
    denominator: a number or 0-d tensor above 0; None is the local count of tokens, or for "grpo" of sequences that have
        a counted token (an empty completion has none: count it in the denominator you pass).

    Returns ``(loss, metrics)``, fp32 (fp64 for fp64 inputs). Metrics are 0-d, detached and aggregated exactly as the
    loss (same denominator, so they add over micro-batches and ranks): TRL's ``clip_ratio/low_mean`` (ratio too low
    where A < 0), ``clip_ratio/high_mean`` (too high where A > 0), ``clip_ratio/region_mean`` (either), ``kl`` (with
    ref_logp), and ``ratio/mean``, the ratio before clipping.

    Raises ValueError for wrong shapes or dtypes, an unknown kind or aggregation, a split segment, values out of range,
    beta > 0 without ref_logp, "dr_grpo" without a denominator, and "bnpo" with one.
    """
    checks.check_float("logp", logp, 1)
    num_tokens = logp.shape[0]
    checks.check_float("advantage", advantage, 1)
    checks.check_shape("advantage", advantage, (num_tokens,))
    for name, vector in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if vector is not None:
            checks.check_float(name, vector, 1)
            checks.check_shape(name, vector, (num_tokens,))
    checks.check_integer("segment_ids", segment_ids, (num_tokens,))
    checks.check_mask(mask, num_tokens)
    checks.check_same_device(
        logp=logp, old_logp=old_logp, advantage=advantage, segment_ids=segment_ids, ref_logp=ref_logp, mask=mask
    )
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(map(repr, KINDS))}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r} is not known; allowed: {', '.join(map(repr, AGGREGATIONS))}")
    checks.check_not_negative("epsilon", epsilon)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    checks.check_not_negative("epsilon_high", epsilon_high)
    checks.check_not_negative("beta", beta)
    if beta > 0 and ref_logp is None:
        raise ValueError(f"beta is {beta}: the KL term needs ref_logp [N]; pass it, or set beta=0")
    count = checks.check_count("denominator", denominator)
    if aggregation == "dr_grpo" and count is None:
        raise ValueError('aggregation "dr_grpo" needs denominator= (sequences x maximum completion length)')
    if aggregation == "bnpo" and count is not None:
        raise ValueError('aggregation "bnpo" divides by the local token count; drop denominator= or use "dapo"')
    choose("policy_loss", backend)

    dtype = accumulation_dtype(logp.dtype)
    kept = kept_tokens(mask)

    def counted(values: Tensor) -> Tensor:
        return (values if kept is None else values[kept]).to(dtype)

    logp_N = counted(logp)
    with torch.autocast(logp.device.type, enabled=False):
        return policy_loss_reference(
            logp_N,
            logp_N.detach() if old_logp is None else counted(old_logp.detach()),
            counted(advantage.detach()),
            segment_ids if kept is None else segment_ids[kept],
            None if ref_logp is None else counted(ref_logp.detach()),
            kind,
            epsilon,
            epsilon_high,
            beta,
            aggregation,
            count,
        )

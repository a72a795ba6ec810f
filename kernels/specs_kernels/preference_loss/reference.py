"""The definition of ``preference_loss``. Differentiable by autograd, any dtype up to fp64.

Letters: N tokens that count, S segments with tokens, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels.segments import TokenRuns

KINDS = ("sigmoid",)
NLL_MODES = ("sequence", "token")


def pair_loss(margin_P: Tensor, kind: str, beta: float, label_smoothing: float) -> Tensor:
    """Loss per pair from ``margin = s(chosen) - s(rejected)``, s the summed log-ratio to the reference policy.

    "sigmoid": ``-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)``; e = 0 is DPO (arXiv 2305.18290),
    e > 0 conservative DPO (ericmitchell.ai/cdpo.pdf).
    """
    if kind == "sigmoid":
        scaled = beta * margin_P
        return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)
    raise ValueError(f"kind {kind!r}")


def preference_loss_reference(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    segment_ids_N: Tensor,
    pairs_P2: Tensor,
    kind: str,
    beta: float,
    label_smoothing: float,
    nll_weight: float,
    nll_mode: str,
    num_pairs: float | None,
    num_chosen_tokens: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`specs_kernels.preference_loss`. The vectors hold the tokens that count, in the accumulation dtype."""
    runs = TokenRuns.of(segment_ids_N)
    run_P2 = runs.locate(pairs_P2)
    none = logp_N.new_zeros(1)  # the sums of a segment without tokens

    def per_pair(values_S: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([values_S, none.to(values_S.dtype)])[run_P2]
        return both[:, 0], both[:, 1]

    chosen_logp, rejected_logp = per_pair(runs.sum(logp_N))
    chosen_ratio, rejected_ratio = per_pair(runs.sum(logp_N - ref_logp_N))
    chosen_length = per_pair(runs.lengths.to(logp_N.dtype))[0]
    pair_count = float(num_pairs) if num_pairs is not None else float(max(pairs_P2.shape[0], 1))

    preference = pair_loss(chosen_ratio - rejected_ratio, kind, beta, label_smoothing).sum() / pair_count
    if nll_mode == "sequence":
        nll = -(chosen_logp / chosen_length.clamp(min=1)).sum() / pair_count
    else:
        tokens = chosen_length.sum().clamp(min=1) if num_chosen_tokens is None else num_chosen_tokens
        nll = -chosen_logp.sum() / tokens
    loss = preference + nll_weight * nll if nll_weight else preference

    with torch.no_grad():
        chosen_reward, rejected_reward = beta * chosen_ratio.detach(), beta * rejected_ratio.detach()
        sums = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).to(logp_N.dtype),
            "logps/chosen": chosen_logp.detach(),
            "logps/rejected": rejected_logp.detach(),
        }
        metrics = {name: values.sum() / pair_count for name, values in sums.items()}
        metrics["preference_loss"] = preference.detach()
        metrics["nll_loss"] = nll.detach()
    return loss, metrics

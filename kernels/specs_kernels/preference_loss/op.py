"""The public ``preference_loss``: what it accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.preference_loss.reference import KINDS, NLL_MODES, preference_loss_reference
from specs_kernels.segments import kept_tokens
from specs_kernels.softmax import accumulation_dtype


def preference_loss(
    logp: Tensor,
    ref_logp: Tensor,
    segment_ids: Tensor,
    pairs: Tensor,
    *,
    mask: Tensor | None = None,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    nll_mode: str = "sequence",
    num_pairs: float | Tensor | None = None,
    num_chosen_tokens: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO on packed token log-probs, with label smoothing and a supervised (NLL) term on the chosen side.

    With s(y) = sum over the tokens of y of (logp - ref_logp) and margin = s(chosen) - s(rejected)::

        preference = sum_pairs [-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)] / num_pairs
        nll        = sum_pairs [-sum logp(chosen) / len(chosen)] / num_pairs          nll_mode "sequence"
                   = -sum over all chosen tokens of logp / num_chosen_tokens          nll_mode "token"
        loss       = preference + nll_weight * nll

    logp, ref_logp: floating ``[N]``; gradients flow to logp only. segment_ids: int64 or int32 ``[N]``, in any order,
        each segment contiguous. pairs: int64 or int32 ``[P, 2]`` of (chosen, rejected) segment ids; a segment may be in
        several pairs, and an id without tokens is an empty completion (sums and NLL 0).
    mask: bool ``[N]``; where False nothing is read (values may be NaN) or counted in a length.
    kind: "sigmoid" (arXiv 2305.18290; with ``label_smoothing`` e > 0 conservative DPO).
    nll_mode: "sequence" is SPECS' lambda and LLaMA-Factory's ``pref_ftx``: a mean of per-sequence token means;
        "token" is TRL's: one mean over the tokens. A chosen completion in several pairs counts once per pair.
    num_pairs, num_chosen_tokens: the counts over all micro-batches and ranks (numbers or 0-d tensors above 0), so that
        losses and metrics add up; None is the local count.

    Returns ``(loss, metrics)``, fp32 (fp64 for fp64 inputs). Metrics are 0-d, detached, under TRL's names, divided by
    ``num_pairs``: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``,
    ``logps/chosen``, ``logps/rejected``, and the parts ``preference_loss`` and ``nll_loss`` of the loss.

    Raises ValueError for wrong shapes or dtypes, an unknown kind or mode, a split segment, values out of range, and
    ``num_chosen_tokens`` with ``nll_mode="sequence"``, which has no use for it.
    """
    checks.check_float("logp", logp, 1)
    num_tokens = logp.shape[0]
    checks.check_float("ref_logp", ref_logp, 1)
    checks.check_shape("ref_logp", ref_logp, (num_tokens,))
    checks.check_integer("segment_ids", segment_ids, (num_tokens,))
    if not isinstance(pairs, Tensor) or pairs.dim() != 2:
        raise ValueError("pairs must be an integer tensor [P, 2] of (chosen, rejected) segment ids")
    checks.check_integer("pairs", pairs, (pairs.shape[0], 2))
    checks.check_mask(mask, num_tokens)
    checks.check_same_device(logp=logp, ref_logp=ref_logp, segment_ids=segment_ids, pairs=pairs, mask=mask)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(map(repr, KINDS))}")
    if nll_mode not in NLL_MODES:
        raise ValueError(f"nll_mode {nll_mode!r} is not known; allowed: {', '.join(map(repr, NLL_MODES))}")
    checks.check_positive("beta", beta)
    checks.check_not_negative("nll_weight", nll_weight)
    if isinstance(label_smoothing, bool) or not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5; got {label_smoothing!r}")
    pair_count = checks.check_count("num_pairs", num_pairs)
    token_count = checks.check_count("num_chosen_tokens", num_chosen_tokens)
    if token_count is not None and nll_mode == "sequence":
        raise ValueError('num_chosen_tokens has no use with nll_mode="sequence"; drop it or set nll_mode="token"')
    choose("preference_loss", backend)

    dtype = accumulation_dtype(logp.dtype)
    kept = kept_tokens(mask)
    logp, ref_logp, segment_ids = (
        values if kept is None else values[kept] for values in (logp, ref_logp.detach(), segment_ids)
    )
    with torch.autocast(logp.device.type, enabled=False):
        return preference_loss_reference(
            logp.to(dtype),
            ref_logp.to(dtype),
            segment_ids,
            pairs.long(),
            kind,
            beta,
            label_smoothing,
            nll_weight,
            nll_mode,
            pair_count,
            token_count,
        )

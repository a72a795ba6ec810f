"""The definition of ``linear_loss``: dense log-probs, one call of the loss function, autograd."""

from __future__ import annotations

from torch import Tensor

from specs_kernels.linear_logprob.autograd import Inputs
from specs_kernels.linear_logprob.reference import linear_logprob_reference
from specs_kernels.linear_loss.call import LossFunction, Metrics, call_loss
from specs_kernels.results import TokenLogprobs


def linear_loss_reference(
    inputs: Inputs,
    loss_fn: LossFunction,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, TokenLogprobs, Metrics]:
    """See :func:`specs_kernels.linear_loss`. Sums over groups are what ``loss_fn`` makes of all groups at once."""
    result = linear_logprob_reference(inputs, temperature, softcap, logit_scale, ignore_index, return_entropy, True)
    index = (inputs.target != ignore_index).nonzero().squeeze(1)
    detached = TokenLogprobs(*(None if values is None else values.detach() for values in result))  # type: ignore[arg-type]
    if index.shape[0] == 0:
        return result.logp.sum(), detached, {"recomputed_targets": 0}
    logp, entropy, lse = (None if values is None else values.index_select(0, index) for values in result)
    assert logp is not None and lse is not None
    loss, metrics = call_loss(loss_fn, logp, entropy, lse, index)
    return loss, detached, {**metrics, "recomputed_targets": 0}

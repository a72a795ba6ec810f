"""The definition of ``linear_logprob``: dense, differentiable by autograd, any dtype up to fp64.

Letters: N targets, M targets that count, T rows of hidden, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels.results import TokenLogprobs
from specs_kernels.softmax import accumulation_dtype


def head_scores(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """``softcap(logit_scale * hidden @ weight.T + bias) / temperature``, with softcap(x) = cap * tanh(x / cap)."""
    z_MV = logit_scale * (hidden_MD @ weight_VD.T)
    if bias_V is not None:
        z_MV = z_MV + bias_V
    if softcap is not None:
        z_MV = softcap * torch.tanh(z_MV / softcap)
    return z_MV / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def token_statistics(z_MV: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp = z_target - lse, entropy = lse - sum_j p_j z_j, lse = log sum_j exp z_j."""
    log_p = torch.log_softmax(z_MV, dim=1)
    logp_M = log_p.gather(1, target_M[:, None]).squeeze(1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
    entropy_M = -(log_p.exp() * finite).sum(1)
    return logp_M, entropy_M, torch.logsumexp(z_MV, dim=1)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    return_entropy: bool,
    rows: Tensor | None,
    kept: Tensor | None,
) -> TokenLogprobs:
    """See :func:`specs_kernels.linear_logprob`. ``kept``: indices of the targets that count, None for all."""
    dtype = accumulation_dtype(hidden.dtype)
    num_targets = target.shape[0]
    index = torch.arange(num_targets, device=target.device) if kept is None else kept
    source = index if rows is None else rows[index]
    z_MV = head_scores(
        hidden[source].to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        temperature[index].to(dtype) if isinstance(temperature, Tensor) else temperature,
        softcap,
        logit_scale,
    )
    logp_M, entropy_M, lse_M = token_statistics(z_MV, target[index].long())
    zeros = torch.zeros(num_targets, dtype=dtype, device=hidden.device)
    logp, entropy, lse = (zeros.index_copy(0, index, values) for values in (logp_M, entropy_M, lse_M))
    return TokenLogprobs(logp, entropy if return_entropy else None, lse)

"""The definition of ``linear_logprob``: dense, differentiable by autograd, any dtype up to fp64.

Letters: N targets, M targets that count, T rows of hidden, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.linear_logprob.autograd import Inputs
from specs_kernels.linear_logprob.targets import find_targets
from specs_kernels.results import TokenLogprobs
from specs_kernels.softmax import accumulation_dtype


def head_scores(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    lora: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``softcap(logit_scale * (hidden @ weight.T + (hidden @ A.T) @ B.T) + bias) / temperature``."""
    z_MV = hidden_MD @ weight_VD.T
    if lora is not None:
        z_MV = z_MV + (hidden_MD @ lora[0].T) @ lora[1].T
    z_MV = logit_scale * z_MV
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
    inputs: Inputs,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool | str,
    validate: bool,
    partial: bool = False,
) -> TokenLogprobs:
    """See :func:`specs_kernels.linear_logprob`. partial: a target outside ``[0, V)`` has the score 0."""
    hidden, weight, bias, lora_A, lora_B, target, temperatures, rows = inputs
    if validate:
        checks.check_bias_under_softcap(bias, softcap)
    dtype = accumulation_dtype(hidden.dtype)
    num_targets = target.shape[0]
    scale = temperature if temperatures is None else temperatures.to(dtype)
    targets = find_targets(target, rows, scale, ignore_index, hidden.shape[0], weight.shape[0], validate, partial)
    z_MV = head_scores(
        targets.hidden(hidden).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        targets.temperature,
        softcap,
        logit_scale,
        None if lora_A is None or lora_B is None else (lora_A.to(dtype), lora_B.to(dtype)),
    )
    logp, entropy, lse = (
        targets.spread(values_M, num_targets) for values_M in token_statistics(z_MV, targets.target_M.clamp(min=0))
    )
    if partial:
        mine = (target >= 0) & (target < weight.shape[0])
        logp = torch.where(mine | (target == ignore_index), logp, -lse)
    if return_entropy == "detached":
        entropy = entropy.detach()
    return TokenLogprobs(logp, entropy if return_entropy else None, lse)

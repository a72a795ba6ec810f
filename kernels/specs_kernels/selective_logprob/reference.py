"""The definition of ``selective_logprob``: dense, differentiable by autograd, any dtype up to fp64.

Letters: N targets, M targets that count, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels.linear_logprob.reference import token_statistics
from specs_kernels.results import TokenLogprobs
from specs_kernels.softmax import accumulation_dtype


def selective_logprob_reference(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    return_entropy: bool,
    kept: Tensor | None,
) -> TokenLogprobs:
    """See :func:`specs_kernels.selective_logprob`. ``kept``: indices of the targets that count, None for all."""
    dtype = accumulation_dtype(logits.dtype)
    index = torch.arange(target.shape[0], device=target.device) if kept is None else kept
    z_MV = logits[index].to(dtype)
    z_MV = z_MV / (temperature[index, None].to(dtype) if isinstance(temperature, Tensor) else temperature)
    logp_M, entropy_M, lse_M = token_statistics(z_MV, target[index].long())
    zeros = torch.zeros(target.shape[0], dtype=dtype, device=logits.device)
    logp, entropy, lse = (zeros.index_copy(0, index, values) for values in (logp_M, entropy_M, lse_M))
    return TokenLogprobs(logp, entropy if return_entropy else None, lse)

"""Two numbers that trainers log about logits and ``linear_logprob`` does not return: their mean, and whether the target wins.

Letters: N tokens, R tokens looked up, D hidden size, V vocabulary, C columns of a slice of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE_ELEMENTS = 1 << 23
_LOG_HALF = -0.6931


@torch.no_grad()
def mean_and_top1(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    logp_N: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean over V of ``z = softcap(logit_scale * hidden @ weight.T + bias)``, and ``target == argmax z``; both ``[N]``.

    logp: the target's log-prob under softmax(z / temperature), at any temperature. A target of probability above 1/2 is the
    argmax whatever the others are, so only the other rows are multiplied with the head (all of them under a soft cap, whose mean
    needs every z): 2 R V D FLOP in slices of 32 MiB. Of equal scores the first is the argmax.

    mean: fp32; top1: bool, False for a token whose scores are NaN. Products in the inputs' dtype, sums in fp32. No gradient.
    Reads the number R on the host.
    """
    everywhere = softcap is not None
    rows_R = (torch.ones_like(logp_N, dtype=torch.bool) if everywhere else ~(logp_N > _LOG_HALF)).nonzero().squeeze(1)
    hidden_RD, num_rows = hidden_ND.index_select(0, rows_R), len(rows_R)
    total_N = torch.zeros(len(target_N), dtype=torch.float32, device=hidden_ND.device)
    best_R = torch.full((num_rows,), -torch.inf, device=hidden_ND.device)
    argmax_R = torch.full_like(rows_R, -1)
    size = max(1, _SLICE_ELEMENTS // max(1, num_rows))
    for start in range(0, weight_VD.shape[0], size):
        weight_CD = weight_VD[start : start + size]
        bias_C = None if bias_V is None else bias_V[start : start + size].float()
        z_RC = (hidden_RD @ weight_CD.T).float().mul_(logit_scale)
        if bias_C is not None:
            z_RC += bias_C
        if softcap is not None:
            total_N += z_RC.div_(softcap).tanh_().mul_(softcap).sum(1)
        else:
            total_N += hidden_ND.float() @ weight_CD.float().sum(0) * logit_scale
            if bias_C is not None:
                total_N += bias_C.sum()
        value_R, column_R = z_RC.max(1)
        argmax_R = torch.where(value_R > best_R, column_R + start, argmax_R)
        best_R = torch.maximum(best_R, value_R)
    top1_N = torch.ones(len(target_N), dtype=torch.bool, device=target_N.device)
    top1_N[rows_R] = argmax_R == target_N[rows_R]
    return total_N / weight_VD.shape[0], top1_N

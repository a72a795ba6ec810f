"""``selective_logprob`` in plain PyTorch: rows in tiles of at most ``TILE_BYTES``, fp32 (fp64) statistics.

The backward forms the gradient of the logits tile by tile from the saved logits and three numbers per row; nothing else
of size ``[N, V]`` is allocated. Deterministic; a row's result does not depend on the other rows.

Letters: N targets, M targets that count, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.results import TokenLogprobs
from specs_kernels.softmax import RunningSoftmax, accumulation_dtype, dscores_

TILE_BYTES = 16 << 20


def _tiles(num_kept: int, vocab_size: int, dtype: torch.dtype) -> list[slice]:
    size = max(1, TILE_BYTES // (vocab_size * dtype.itemsize))
    return [slice(start, min(start + size, num_kept)) for start in range(0, num_kept, size)]


def _scores(
    logits: Tensor,
    rows: slice,
    kept: Tensor | None,
    temperature_M: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """A fresh tile of ``logits / temperature``."""
    z_RV = logits[rows] if kept is None else logits.index_select(0, kept[rows])
    z_RV = z_RV.to(dtype, copy=True)
    if temperature_M is not None:
        z_RV.div_(temperature_M[rows, None])
    elif temperature != 1.0:
        z_RV.div_(temperature)
    return z_RV


class _SelectiveLogprob(torch.autograd.Function):
    """logits ``[N, V]`` -> logp, entropy, lse ``[N]``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        temperature_M: Tensor | None,
        temperature: float,
        return_entropy: bool,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        dtype = accumulation_dtype(logits.dtype)
        target_M = (target if kept is None else target.index_select(0, kept)).long()
        num_kept = target_M.shape[0]
        parts = [torch.empty(num_kept, dtype=dtype, device=logits.device) for _ in range(3 + return_entropy)]
        for rows in _tiles(num_kept, logits.shape[1], dtype):
            z_RV = _scores(logits, rows, kept, temperature_M, temperature, dtype)
            parts[0][rows] = z_RV.gather(1, target_M[rows, None]).squeeze(1)
            running = RunningSoftmax(return_entropy)
            running.update_(z_RV, maybe_minus_inf=True)
            for part, values in zip(parts[1:], running.finish(), strict=True):
                part[rows] = values
        z_target_M, maximum_M, log_total_M = parts[:3]
        zeros = torch.zeros(target.shape[0], dtype=dtype, device=logits.device)

        def spread(values_M: Tensor) -> Tensor:
            return values_M if kept is None else zeros.index_copy(0, kept, values_M)

        logp = spread((z_target_M - maximum_M) - log_total_M)
        entropy = spread(log_total_M - parts[3]) if return_entropy else None
        lse = spread(maximum_M + log_total_M)
        ctx.set_materialize_grads(False)
        mean_M = parts[3] if return_entropy else None
        ctx.save_for_backward(logits, target_M, temperature_M, kept, maximum_M, log_total_M, mean_M)
        ctx.temperature = temperature
        return logp, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("selective_logprob")
        logits, target_M, temperature_M, kept, maximum_M, log_total_M, mean_M = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 6
        dtype = maximum_M.dtype
        divisor = ctx.temperature if temperature_M is None else temperature_M
        # Dividing the upstream gradients by the temperature is the temperature's whole part in the chain rule.
        upstream = [None if g is None else (g if kept is None else g.index_select(0, kept)) / divisor for g in grads]
        grad_logits = torch.empty_like(logits) if kept is None else torch.zeros_like(logits)
        for rows in _tiles(target_M.shape[0], logits.shape[1], dtype):
            z_RV = _scores(logits, rows, kept, temperature_M, ctx.temperature, dtype).sub_(maximum_M[rows, None])
            grad_logp, grad_entropy, grad_lse = (None if g is None else g[rows] for g in upstream)
            dz_RV = dscores_(
                z_RV,
                log_total_M[rows],
                None if mean_M is None else mean_M[rows],
                target_M[rows],
                grad_logp,
                grad_entropy,
                grad_lse,
                maybe_minus_inf=True,
            )
            if kept is None:
                grad_logits[rows] = dz_RV
            else:
                grad_logits.index_copy_(0, kept[rows], dz_RV.to(logits.dtype))
        return (grad_logits,) + (None,) * 5


def selective_logprob_chunked(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    return_entropy: bool,
    kept: Tensor | None,
) -> TokenLogprobs:
    """See :func:`specs_kernels.selective_logprob`. ``kept``: indices of the targets that count, None for all."""
    temperature_M: Tensor | None = None
    if isinstance(temperature, Tensor):
        temperature_M = temperature.detach().to(accumulation_dtype(logits.dtype))
        temperature_M = temperature_M if kept is None else temperature_M.index_select(0, kept)
        temperature = 1.0
    return TokenLogprobs(
        *_SelectiveLogprob.apply(logits, target, temperature_M, float(temperature), return_entropy, kept)
    )

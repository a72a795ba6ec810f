"""The public ``selective_logprob``: what it accepts, and which backend it calls."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.results import TokenLogprobs
from specs_kernels.selective_logprob.chunked import selective_logprob_chunked
from specs_kernels.selective_logprob.native import selective_logprob_native
from specs_kernels.selective_logprob.reference import selective_logprob_reference


def selective_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-prob, entropy and log-sum-exp of targets from logits that exist already.

    With z = logits[n] / temperature[n]::

        lse = log sum_j exp z_j      logp = z[target[n]] - lse      entropy = lse - sum_j softmax(z)_j z_j

    logits: ``[N, V]``, fp16, bf16, fp32 or fp64, any strides; -inf forbids a column. target: int64 or int32 ``[N]``.
    temperature: a number above 0, or a floating tensor ``[N]``, one per target; it gets no gradient.
    ignore_index: rows whose target has this value are not read (they may hold inf or NaN), give 0 in all outputs and
        get a zero gradient.
    backend: "auto", "native" (C++, CPU), "chunked", "triton" or "reference".

    Returns ``(logp, entropy, lse)``, fp32 ``[N]`` (fp64 for fp64 inputs), entropy None unless asked for. All three pass
    gradients to logits, rounded once to their dtype. Differentiable once: under
    ``create_graph=True`` the backward raises RuntimeError. Numerics: statistics in fp32 (fp64), entropy
    from shifted scores; deterministic. On an accelerator the count of kept targets is read on the host.

    Where the logits need not exist, ``linear_logprob`` is the cheaper op.

    Raises ValueError for wrong shapes, dtypes, devices, and for values out of range (target, temperature).
    """
    checks.check_float("logits", logits, 2)
    num_targets, vocab_size = logits.shape
    if vocab_size == 0:
        raise ValueError("logits have 0 columns; the vocabulary must have at least one entry")
    checks.check_integer("target", target, (num_targets,))
    tensor_temperature = temperature if isinstance(temperature, Tensor) else None
    checks.check_same_device(logits=logits, target=target, temperature=tensor_temperature)
    kept = checks.kept_targets(target, ignore_index, vocab_size)
    checks.check_temperature(temperature, num_targets, kept)
    chosen = choose("selective_logprob", backend, logits.device).backend
    run = selective_logprob_reference if chosen == "reference" else selective_logprob_chunked
    with torch.autocast(logits.device.type, enabled=False):
        if chosen == "native":
            return selective_logprob_native(logits, target, temperature, ignore_index, return_entropy)
        if chosen == "triton":
            from specs_kernels.selective_logprob.triton import selective_logprob_triton

            return selective_logprob_triton(logits, target, temperature, ignore_index, return_entropy)
        return run(logits, target, temperature, return_entropy, kept)

"""The public ``linear_logprob``: what it accepts, and which backend it calls."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.linear_logprob.chunked import linear_logprob_chunked
from specs_kernels.linear_logprob.reference import linear_logprob_reference
from specs_kernels.results import TokenLogprobs


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-prob, entropy and log-sum-exp of targets from hidden states, without holding the logits ``[N, V]``.

    For target n with hidden row h (row n, or row ``rows[n]``)::

        z = softcap(logit_scale * h @ weight.T + bias) / temperature[n]      softcap(x) = cap * tanh(x / cap)
        lse = log sum_j exp z_j      logp = z[target[n]] - lse      entropy = lse - sum_j softmax(z)_j z_j

    hidden: ``[N, D]``, or ``[T, D]`` with ``rows``; fp16, bf16, fp32 or fp64. weight: ``[V, D]``, same dtype.
    target: int64 or int32 ``[N]``. bias: ``[V]``, same dtype; may hold -inf to forbid a column.
    temperature: a number above 0, or a floating tensor ``[N]``, one per target; it gets no gradient.
    softcap: a number above 0 or None. logit_scale: a finite number.
    ignore_index: targets with this value give 0 in all outputs and pass no gradient; their hidden state (which may hold
        inf or NaN), temperature and ``rows`` entry (which may be -1) are not read.
    rows: int64 or int32 ``[N]`` into hidden; several targets may use one row and their gradients are summed in target
        order. ``rows=layout.predictor_index`` scores every token of a packed row.
    backend: "auto", "chunked" or "reference".

    Returns ``(logp, entropy, lse)``, fp32 ``[N]`` (fp64 for fp64 inputs), entropy None unless asked for. All three pass
    gradients to hidden, weight and bias: with upstream g, q, r and E = sum_j p_j z_j,
    ``dz_j = p_j [(r - g) - q (z_j - E)] + g 1[j = target]``. Differentiable once: under
    ``create_graph=True`` the backward raises RuntimeError.
    Numerics: products and statistics in fp32 (fp64), entropy from shifted scores; deterministic. On an accelerator the
    count of kept targets is read on the host.

    Raises ValueError for wrong shapes, dtypes, devices, and for values out of range (target, rows, temperature, softcap).
    """
    checks.check_float("hidden", hidden, 2)
    checks.check_float("weight", weight, 2)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {checks.shape_of(hidden)} and weight {checks.shape_of(weight)} must share their last dimension"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has 0 rows; the vocabulary must have at least one entry")
    if not isinstance(target, Tensor) or target.dim() != 1:
        raise ValueError("target must be a 1-d integer tensor [N]")
    num_targets = target.shape[0]
    checks.check_integer("target", target, (num_targets,))
    if bias is not None:
        checks.check_float("bias", bias, 1)
        checks.check_shape("bias", bias, (weight.shape[0],))
    if rows is not None:
        checks.check_integer("rows", rows, (num_targets,))
    elif hidden.shape[0] != num_targets:
        raise ValueError(
            f"hidden has {hidden.shape[0]} rows but there are {num_targets} targets; pass rows= to say which row "
            "predicts each target"
        )
    checks.check_same_dtype(hidden=hidden, weight=weight, bias=bias)
    tensor_temperature = temperature if isinstance(temperature, Tensor) else None
    checks.check_same_device(
        hidden=hidden, weight=weight, target=target, bias=bias, rows=rows, temperature=tensor_temperature
    )
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    checks.check_finite("logit_scale", logit_scale)
    kept = checks.kept_targets(target, ignore_index, weight.shape[0])
    checks.check_temperature(temperature, num_targets, kept)
    if rows is not None:
        _check_rows(rows, kept, hidden.shape[0])
    run = (
        linear_logprob_reference if choose("linear_logprob", backend).backend == "reference" else linear_logprob_chunked
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return run(hidden, weight, target, bias, temperature, softcap, logit_scale, return_entropy, rows, kept)


def _check_rows(rows: Tensor, kept: Tensor | None, num_rows: int) -> None:
    seen = rows if kept is None else rows.index_select(0, kept)
    bad = (seen < 0) | (seen >= num_rows)
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        target = n if kept is None else int(kept[n])
        raise ValueError(
            f"rows[{target}] is {int(seen[n])}; hidden has rows 0 to {num_rows - 1} "
            "(a target without a predictor must be ignore_index)"
        )

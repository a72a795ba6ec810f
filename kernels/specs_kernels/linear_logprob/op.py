"""The public ``linear_logprob``: what it accepts, and which backend it calls."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.linear_logprob.autograd import Inputs, LinearLogprob, Options
from specs_kernels.linear_logprob.head import kept_dtype, row_block
from specs_kernels.linear_logprob.library import OPERATOR, arguments
from specs_kernels.linear_logprob.modes import Mode, choose_mode
from specs_kernels.linear_logprob.reference import linear_logprob_reference
from specs_kernels.results import TokenLogprobs
from specs_kernels.tracing import autocast_on, traced, without_autocast


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
    return_entropy: bool | Literal["detached"] = False,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    mode: str = "auto",
    logit_cache_bytes: int = 0,
    compact: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-prob, entropy and log-sum-exp of targets from hidden states, without holding the logits ``[N, V]``.

    For target n with hidden row h (row n, or row ``rows[n]``)::

        x = logit_scale * (h @ weight.T + (h @ A.T) @ B.T) + bias       z = softcap(x) / temperature[n]
        lse = log sum_j exp z_j      logp = z[target[n]] - lse      entropy = lse - sum_j softmax(z)_j z_j

    with softcap(x) = cap * tanh(x / cap), and the low-rank term only with ``lora``.

    hidden: ``[N, D]``, or ``[T, D]`` with ``rows``; fp16, bf16, fp32 or fp64. weight: ``[V, D]``, same dtype.
    target: int64 or int32 ``[N]``. bias: ``[V]``, same dtype; may hold -inf to forbid a column, except with a softcap.
    temperature: a number above 0, or a floating tensor ``[N]``, one per target; it gets no gradient.
    softcap: a number above 0 or None. logit_scale: a finite number.
    ignore_index: targets with this value give 0 in all outputs and pass no gradient; their hidden state (which may hold
        inf or NaN), temperature and ``rows`` entry (which may be -1) are not used.
    return_entropy: "detached" returns it without a gradient, which a frozen head thanks with 2 NDV FLOP.
    rows: int64 or int32 ``[N]`` into hidden; several targets may use one row and their gradients are summed in target
        order. ``rows=layout.predictor_index`` scores every token of a packed row.
    lora: ``(A [K, D], B [V, K])`` on the head, same dtype, any scale folded into B.
    mode: what is kept for the backward and what is computed again (FLOP: forward and backward, a frozen head needs no dW);
        :func:`choose_mode` says what "auto" takes.

        * "forward": 2 NDV, no gradient. * "recompute": 8 NDV (6 with a frozen head), scores are formed twice.
        * "cache": down to 6 NDV (4), scores of as many targets as fit ``logit_cache_bytes`` are kept, in the input's dtype
          (fp32 under a soft cap: the slope of a saturated score is lost when it is rounded).
        * "frozen": 4 NDV (6 when the entropy has a gradient), only hidden gets a gradient, which is formed in the forward.

        Scores of 64 MiB or less are kept by "auto" in any case.
    compact: in the backward, drop targets whose upstream gradients are all 0. Waits for the device once; raises while a CUDA
        graph is captured and under ``torch.compile(fullgraph=True)``.
    validate: whether values (target, rows, temperature) are checked, which on CUDA waits for the device. None: on CPU only.
        Unchecked, a bad value gives NaN for its target, no gradient, and touches no other target.
    backend: "auto" or a name from ``specs_kernels.dispatch``.

    Returns ``(logp, entropy, lse)``, fp32 ``[N]`` (fp64 for fp64 inputs), entropy None unless asked for. All three pass
    gradients to hidden, weight, bias, A and B: with upstream g, q, r and E = sum_j p_j z_j,
    ``dz_j = p_j [(r - g) - q (z_j - E)] + g 1[j = target]``. Differentiable once: under
    ``create_graph=True`` the backward raises RuntimeError.
    Under autocast, fp32 tensors are cast to the autocast dtype first, as the head's linear layer would do.
    Numerics: statistics in fp32 (fp64), entropy from shifted scores, target column's gradient summed before rounding, each row
    of the weight's gradient rounded once; deterministic, and a target's results do not depend on the other targets.

    Raises ValueError for wrong shapes, dtypes, devices, for values out of range, and for modes that do not combine.
    """
    return call(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        rows=rows,
        lora=lora,
        mode=mode,
        logit_cache_bytes=logit_cache_bytes,
        compact=compact,
        validate=validate,
        backend=backend,
    )


def call(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool | Literal["detached"] = False,
    rows: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    mode: str = "auto",
    logit_cache_bytes: int = 0,
    compact: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
    partial: bool = False,
) -> TokenLogprobs:
    """:func:`linear_logprob`. partial: targets outside ``[0, V)`` are in another slice of the vocabulary and score 0."""
    checks.check_entropy_choice(return_entropy)
    checks.check_flag("compact", compact)
    if validate is not None:
        checks.check_flag("validate", validate)
    inputs = head_inputs(hidden, weight, target, bias, temperature, softcap, logit_scale, rows, lora)
    checks.check_ignore_index(ignore_index, target.dtype)
    through_operator = traced(*inputs)
    # Which backends can run here is looked up inside the operator: a tracer cannot follow it.
    chosen = backend if through_operator else choose("linear_logprob", backend, hidden.device).backend
    validate = hidden.device.type == "cpu" if validate is None else validate
    entropy_grad = return_entropy is True
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    if chosen == "reference":
        if mode != "auto" or logit_cache_bytes or compact:
            raise ValueError("backend='reference' has one mode; drop mode, logit_cache_bytes and compact")
        with without_autocast(hidden.device):
            return linear_logprob_reference(
                inputs, scalar, softcap, logit_scale, ignore_index, return_entropy, validate, partial
            )
    picked = _mode(inputs, entropy_grad, mode, logit_cache_bytes, compact, softcap)
    if compact:
        _refuse_capture(hidden.device, through_operator)
    options = Options(
        scalar,
        softcap,
        float(logit_scale),
        ignore_index,
        bool(return_entropy),
        entropy_grad,
        picked.name,
        picked.cached_rows,
        picked.full_precision,
        compact,
        validate,
        partial,
        chosen,
    )
    if through_operator:
        logp, entropy, lse = OPERATOR(*arguments(inputs, options))[:3]
        return TokenLogprobs(logp, entropy if return_entropy else None, lse)
    with without_autocast(hidden.device):
        return TokenLogprobs(*LinearLogprob.apply(options, *inputs))


def _mode(
    inputs: Inputs, entropy_grad: bool, mode: str, logit_cache_bytes: int, compact: bool, softcap: float | None
) -> Mode:
    enabled = torch.is_grad_enabled()
    others = (inputs.bias, inputs.lora_A, inputs.lora_B)
    dtype = inputs.hidden.dtype
    return choose_mode(
        inputs.target.shape[0],
        inputs.weight.shape[0],
        hidden_grad=enabled and inputs.hidden.requires_grad,
        weight_grad=enabled and inputs.weight.requires_grad,
        other_grad=enabled and any(tensor is not None and tensor.requires_grad for tensor in others),
        entropy_grad=entropy_grad,
        mode=mode,
        logit_cache_bytes=logit_cache_bytes,
        compact=compact,
        score_bytes=8 if dtype == torch.float64 else 4,
        kept_bytes=kept_dtype(dtype, softcap).itemsize,
        row_block=row_block(inputs.hidden.device),
    )


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    rows: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
) -> Inputs:
    """The tensors of a call with shapes, dtypes and devices checked, cast to the autocast dtype where autocast is on."""
    checks.check_float("hidden", hidden, 2)
    checks.check_float("weight", weight, 2)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {checks.shape_of(hidden)} and weight {checks.shape_of(weight)} must share their last dimension"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has 0 rows; the vocabulary must have at least one entry")
    if not isinstance(target, Tensor) or target.dim() != 1:
        found = f"shape {checks.shape_of(target)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target must be a 1-d integer tensor [N]; got {found}")
    num_targets = target.shape[0]
    checks.check_integer("target", target, (num_targets,))
    if bias is not None:
        checks.check_float("bias", bias, 1)
        checks.check_shape("bias", bias, (weight.shape[0],))
    lora_A, lora_B = _check_lora(lora, weight)
    if rows is not None:
        checks.check_integer("rows", rows, (num_targets,))
    elif hidden.shape[0] != num_targets:
        raise ValueError(
            f"hidden has {hidden.shape[0]} rows but there are {num_targets} targets; pass rows= to say which row "
            "predicts each target"
        )
    temperatures = temperature if isinstance(temperature, Tensor) else None
    if temperatures is None:
        checks.check_positive("temperature", temperature)  # type: ignore[arg-type]
    else:
        checks.check_temperature_tensor(temperatures, num_targets)
        temperatures = temperatures.detach()
    if autocast_on(hidden.device):
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias, lora_A, lora_B = (None if t is None else _autocast(t) for t in (bias, lora_A, lora_B))
    checks.check_same_dtype(hidden=hidden, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
    checks.check_same_device(
        hidden=hidden,
        weight=weight,
        target=target,
        bias=bias,
        rows=rows,
        temperature=temperatures,
        lora_A=lora_A,
        lora_B=lora_B,
    )
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    checks.check_finite("logit_scale", logit_scale)
    return Inputs(hidden, weight, bias, lora_A, lora_B, target, temperatures, rows)


def _autocast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if tensor.dtype == torch.float32 else tensor


def _check_lora(lora: tuple[Tensor, Tensor] | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if lora is None:
        return None, None
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise ValueError(f"lora must be a pair (A [K, D], B [V, K]); got {type(lora).__name__}")
    lora_A, lora_B = lora
    checks.check_float("lora[0]", lora_A, 2)
    checks.check_float("lora[1]", lora_B, 2)
    checks.check_shape("lora[0]", lora_A, (lora_A.shape[0], weight.shape[1]))
    checks.check_shape("lora[1]", lora_B, (weight.shape[0], lora_A.shape[0]))
    return lora_A, lora_B


def _refuse_capture(device: torch.device, through_operator: bool) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "compact=True waits for the device and cannot be traced; drop it or leave this call out of the graph"
        )
    if through_operator:
        raise RuntimeError(
            "compact=True waits for the device; tensor subclasses go without it: drop it or pass plain tensors"
        )
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("compact=True waits for the device and cannot be captured in a CUDA graph; drop it")

"""The public ``selective_logprob``: what it accepts, and which backend it calls."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.results import TokenLogprobs
from specs_kernels.selective_logprob.autograd import OPERATOR, SelectiveLogprob, set_aside, validate_values
from specs_kernels.selective_logprob.reference import selective_logprob_reference
from specs_kernels.tracing import traced, without_autocast


def selective_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    in_place: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-prob, entropy and log-sum-exp of targets from logits that exist already.

    With z = logits[n] / temperature[n]::

        lse = log sum_j exp z_j      logp = z[target[n]] - lse      entropy = lse - sum_j softmax(z)_j z_j

    logits: ``[N, V]``, fp16, bf16, fp32 or fp64, any strides; -inf forbids a column. target: int64 or int32 ``[N]``.
    temperature: a number above 0, or a floating tensor ``[N]``, one per target; it gets no gradient.
    ignore_index: rows whose target has this value are not read (they may hold inf or NaN), give 0 in all outputs and
        get a zero gradient.
    in_place: the backward overwrites the logits with their gradient and needs no second ``[N, V]``. Nobody else may need
        their values afterwards (autograd raises where another saved them); a second backward raises RuntimeError. Refused
        for a leaf, for memory that several entries share, and under ``torch.compile``.
    validate: whether values (target, temperature) are checked, which on CUDA waits for the device. None: on CPU only.
        Unchecked, a bad value gives NaN for its target, a gradient of 0, and touches no other target.
    backend: "auto" or a name from ``specs_kernels.dispatch``.

    Returns ``(logp, entropy, lse)``, fp32 ``[N]`` (fp64 for fp64 inputs), entropy None unless asked for. All three pass
    gradients to logits, rounded once to their dtype. Differentiable once: under
    ``create_graph=True`` the backward raises RuntimeError. Numerics: statistics in fp32 (fp64), entropy
    from shifted scores; deterministic, and a target's results do not depend on the other targets.

    Where the logits need not exist, ``linear_logprob`` is the cheaper op.

    Raises ValueError for wrong shapes, dtypes, devices, and for values out of range (target, temperature).
    """
    checks.check_float("logits", logits, 2)
    num_targets, vocab_size = logits.shape
    if vocab_size == 0:
        raise ValueError("logits have 0 columns; the vocabulary must have at least one entry")
    checks.check_integer("target", target, (num_targets,))
    checks.check_ignore_index(ignore_index, target.dtype)
    checks.check_flag("return_entropy", return_entropy)
    checks.check_flag("in_place", in_place)
    if validate is not None:
        checks.check_flag("validate", validate)
    if isinstance(temperature, Tensor):
        checks.check_temperature_tensor(temperature, num_targets)
        temperature = temperature.detach()
        checks.check_same_device(logits=logits, target=target, temperature=temperature)
    else:
        checks.check_positive("temperature", temperature)
        checks.check_same_device(logits=logits, target=target)
        temperature = float(temperature)
    validate = logits.device.type == "cpu" if validate is None else validate
    if traced(logits, target):
        if in_place:
            raise RuntimeError(
                "in_place=True overwrites its input and cannot be traced; drop it or leave this call out"
            )
        per_target = temperature if isinstance(temperature, Tensor) else None
        scalar = 1.0 if isinstance(temperature, Tensor) else temperature
        logp, entropy, lse = OPERATOR(
            logits, target, per_target, scalar, ignore_index, return_entropy, validate, backend
        )[:3]
        return TokenLogprobs(logp, entropy if return_entropy else None, lse)
    chosen = choose("selective_logprob", backend, logits.device).backend
    if in_place:
        _check_in_place(logits, chosen)
    with without_autocast(logits.device):
        if chosen == "reference":
            return _reference(logits, target, temperature, ignore_index, return_entropy, validate)
        if validate:
            validate_values(logits, target, temperature, ignore_index)
        return TokenLogprobs(
            *SelectiveLogprob.apply(
                logits, target, temperature, ignore_index, return_entropy, in_place, validate, chosen
            )
        )


def _reference(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    return_entropy: bool,
    validate: bool,
) -> TokenLogprobs:
    bad = None
    if validate:
        validate_values(logits, target, temperature, ignore_index)
    else:
        target, temperature, bad = set_aside(logits, target, temperature, ignore_index)
    kept = checks.kept_targets(target, ignore_index, None)
    logp, entropy, lse = selective_logprob_reference(logits, target, temperature, return_entropy, kept)
    if bad is not None:
        logp, lse = logp.masked_fill(bad, torch.nan), lse.masked_fill(bad, torch.nan)
        entropy = None if entropy is None else entropy.masked_fill(bad, torch.nan)
    return TokenLogprobs(logp, entropy, lse)


def _check_in_place(logits: Tensor, backend: str) -> None:
    if backend == "reference":
        raise ValueError("backend='reference' differentiates by autograd; drop in_place=True")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("in_place=True would overwrite a leaf that requires a gradient; drop it")
    sizes = sorted((stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1)
    reach = 1
    for stride, size in sizes:
        if stride < reach:
            raise ValueError(f"in_place=True needs logits without shared memory; got strides {tuple(logits.stride())}")
        reach = stride * (size - 1) + 1

"""``selective_logprob`` with gradients: the autograd function of eager calls, and ``specs_kernels::selective_logprob``.

A backend is a module with ``forward`` and ``backward``, as in ``chunked.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.selective_logprob import chunked, native
from specs_kernels.softmax import accumulation_dtype


def backend_module(name: str) -> Any:
    """The module of a backend, imported when first asked for."""
    if name == "triton":
        from specs_kernels.selective_logprob import triton

        return triton
    return native if name == "native" else chunked


def validate_values(logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int) -> None:
    """ValueError for a target outside ``[0, V)`` and a temperature that is not above 0; reads flags on the host."""
    kept = checks.kept_targets(target, ignore_index, logits.shape[1])
    checks.check_temperature(temperature, target.shape[0], kept)


def set_aside(
    logits: Tensor, target: Tensor, temperature: float | Tensor, ignore_index: int
) -> tuple[Tensor, float | Tensor, Tensor]:
    """Target and temperature in which bad rows are ignored ones, and which rows are bad; waits for nothing."""
    bad = (target != ignore_index) & ((target < 0) | (target >= logits.shape[1]))
    if isinstance(temperature, Tensor):
        bad = bad | ((target != ignore_index) & ~((temperature > 0) & torch.isfinite(temperature)))
        temperature = torch.where(bad, 1.0, temperature)
    return torch.where(bad, ignore_index, target), temperature, bad


def _forward_values(
    module: Any,
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    entropy: bool,
    bad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Any]:
    logp, entropies, lse, statistics = module.forward(logits, target, temperature, ignore_index, entropy)
    if bad is not None:
        logp, lse = logp.masked_fill(bad, torch.nan), lse.masked_fill(bad, torch.nan)
        entropies = None if entropies is None else entropies.masked_fill(bad, torch.nan)
    return logp, entropies, lse, statistics


class SelectiveLogprob(torch.autograd.Function):
    """logits ``[N, V]`` -> logp, entropy, lse ``[N]``. in_place: the backward overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        temperature: float | Tensor,
        ignore_index: int,
        return_entropy: bool,
        in_place: bool,
        validated: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        module, bad = backend_module(backend), None
        if not validated:
            target, temperature, bad = set_aside(logits, target, temperature, ignore_index)
        logp, entropy, lse, statistics = _forward_values(
            module, logits, target, temperature, ignore_index, return_entropy, bad
        )
        ctx.set_materialize_grads(False)
        per_target = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, target, per_target, *statistics)
        ctx.arguments = (module, None if per_target is not None else temperature, ignore_index)
        ctx.in_place, ctx.spent = in_place, False
        return logp, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("selective_logprob")
        if ctx.spent:
            raise RuntimeError(
                "selective_logprob(in_place=True) has overwritten its logits; a second backward needs in_place=False"
            )
        logits, target, per_target, *statistics = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 8
        module, temperature, ignore_index = ctx.arguments
        temperature = temperature if per_target is None else per_target
        ctx.spent = ctx.in_place
        out = logits.detach() if ctx.in_place else None
        grad = module.backward(
            logits.detach(), target, temperature, ignore_index, module.Statistics(*statistics), *grads, out=out
        )
        if out is not None:
            torch.autograd.graph.increment_version(out)  # so that autograd sees it whatever wrote it
        return (grad,) + (None,) * 7


_INPUTS = "Tensor logits, Tensor target, Tensor? temperatures"
_OPTIONS = "float temperature, int ignore_index, bool entropy, bool validate, str backend"
LIBRARY = torch.library.Library("specs_kernels", "FRAGMENT")
LIBRARY.define(
    f"selective_logprob({_INPUTS}, {_OPTIONS}) -> "
    "(Tensor logp, Tensor entropy, Tensor lse, Tensor maximum, Tensor log_total, Tensor mean)"
)
LIBRARY.define(
    f"selective_logprob_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, {_INPUTS}, {_OPTIONS}, "
    "Tensor maximum, Tensor log_total, Tensor mean) -> Tensor"
)


def _forward(
    logits: Tensor,
    target: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    scale: float | Tensor = temperature if temperatures is None else temperatures
    bad = None
    if validate:
        validate_values(logits, target, scale, ignore_index)
    else:
        target, scale, bad = set_aside(logits, target, scale, ignore_index)
    module = backend_module(choose("selective_logprob", backend, logits.device).backend)
    logp, entropies, lse, statistics = _forward_values(module, logits, target, scale, ignore_index, entropy, bad)
    maximum, log_total, mean = statistics
    nothing = logp.new_empty(0)
    return (
        logp,
        nothing if entropies is None else entropies,
        lse,
        maximum,
        log_total,
        torch.empty_like(nothing) if mean is None else mean,
    )


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    count, dtype = logits.shape[0], accumulation_dtype(logits.dtype)
    sizes = (count, count if entropy else 0, count, count, count, count if entropy else 0)
    return tuple(logits.new_empty(size, dtype=dtype) for size in sizes)


def _backward(*arguments: Any) -> Tensor:
    grads, (logits, target, temperatures, temperature, ignore_index, entropy, validate, backend) = (
        arguments[:3],
        arguments[3:11],
    )
    maximum, log_total, mean = arguments[11:]
    module = backend_module(choose("selective_logprob", backend, logits.device).backend)
    statistics = module.Statistics(maximum, log_total, mean if entropy else None)
    scale = temperature if temperatures is None else temperatures
    if not validate:
        target, scale, _ = set_aside(logits, target, scale, ignore_index)
    grad: Tensor = module.backward(logits, target, scale, ignore_index, statistics, *grads)
    return grad


def _backward_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    entropy_wanted = inputs[5]
    ctx.mark_non_differentiable(*(output[3:] if entropy_wanted else (output[1], *output[3:])))
    ctx.save_for_backward(*inputs[:3], *output[3:])
    ctx.options = inputs[3:]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    checks.refuse_second_derivative("selective_logprob")
    if all(grad is None for grad in grads[:3]):
        return (None,) * 8
    saved = ctx.saved_tensors
    grad = torch.ops.specs_kernels.selective_logprob_backward(*grads[:3], *saved[:3], *ctx.options, *saved[3:])
    return (grad,) + (None,) * 7


LIBRARY.impl("selective_logprob", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("selective_logprob_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("specs_kernels::selective_logprob", _forward_fake, lib=LIBRARY)
torch.library.register_fake("specs_kernels::selective_logprob_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("specs_kernels::selective_logprob", _autograd, setup_context=_setup, lib=LIBRARY)
OPERATOR = torch.ops.specs_kernels.selective_logprob.default

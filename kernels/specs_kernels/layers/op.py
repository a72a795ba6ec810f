"""The public ``rms_norm`` and ``swiglu``: what they accept, and which backend they call."""

from __future__ import annotations

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.layers.native import rms_norm_native, swiglu_native
from specs_kernels.layers.reference import rms_norm_reference, swiglu_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """Root-mean-square layer norm over the last dimension (arXiv 1910.07467; the form of T5 and Llama)::

        out = weight * x / sqrt(mean(x^2) + eps)

    x: ``[..., D]``, weight: ``[D]``, one dtype (fp16, bf16, fp32, fp64), D >= 1. eps: at least 0.
    backend: "auto", "native" (C++, CPU) or "reference".

    Returns ``[..., D]`` in the dtype of x. Gradients flow to x and weight; differentiable once with the native backend.
    Numerics: fp32 (fp64 for fp64) inside, one rounding at the end (transformers rounds before it multiplies by the weight).

    Raises ValueError for wrong shapes, dtypes, devices or eps.
    """
    _check_float("x", x)
    checks.check_float("weight", weight, 1)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1; got shape {checks.shape_of(x)}")
    checks.check_shape("weight", weight, (x.shape[-1],))
    checks.check_same_dtype(x=x, weight=weight)
    checks.check_same_device(x=x, weight=weight)
    checks.check_not_negative("eps", eps)
    native = choose("rms_norm", backend, x.device).backend == "native"
    with torch.autocast(x.device.type, enabled=False):
        return (rms_norm_native if native else rms_norm_reference)(x, weight, float(eps))


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """The gated activation of Llama's and Qwen's feed-forward layers (arXiv 2002.05202)::

        out = silu(gate) * up        silu(x) = x / (1 + exp(-x))

    gate, up: of one shape and dtype (fp16, bf16, fp32, fp64). backend: "auto", "native" (C++, CPU) or "reference".

    Returns the dtype and shape of gate. Gradients flow to both; differentiable once with the native backend.
    Numerics: fp32 (fp64 for fp64) inside, one rounding at the end.

    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check_float("gate", gate)
    _check_float("up", up)
    checks.check_shape("up", up, tuple(gate.shape))
    checks.check_same_dtype(gate=gate, up=up)
    checks.check_same_device(gate=gate, up=up)
    native = choose("swiglu", backend, gate.device).backend == "native"
    with torch.autocast(gate.device.type, enabled=False):
        return (swiglu_native if native else swiglu_reference)(gate, up)


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    checks.check_float(name, tensor, tensor.dim())

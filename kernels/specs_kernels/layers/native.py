"""``rms_norm`` and ``swiglu`` in C++ on CPU (``csrc/cpu/layers*``): one pass over memory forward, one backward.

Plain PyTorch makes five passes for a norm and two for SwiGLU, and about twice as many backward. fp16 and bf16 are
computed in fp32. Deterministic, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.softmax import accumulation_dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = torch.ops.specs_kernels.rms_norm_forward(x_ND, weight, eps)
        ctx.save_for_backward(x_ND, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("rms_norm")
        return *torch.ops.specs_kernels.rms_norm_backward(grad_ND.contiguous(), *ctx.saved_tensors), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.specs_kernels.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        checks.refuse_second_derivative("swiglu")
        return torch.ops.specs_kernels.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`specs_kernels.layers.rms_norm`."""
    dtype = accumulation_dtype(x.dtype)
    x_ND = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
    return _RMSNorm.apply(x_ND, weight.to(dtype).contiguous(), eps).view(x.shape).to(x.dtype)


def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`specs_kernels.layers.swiglu`."""
    dtype = accumulation_dtype(gate.dtype)
    return _SwiGLU.apply(gate.to(dtype).contiguous(), up.to(dtype).contiguous()).to(gate.dtype)

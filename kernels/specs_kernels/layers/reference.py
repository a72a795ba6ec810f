"""Definitions of ``rms_norm`` and ``swiglu`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels.softmax import accumulation_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`specs_kernels.layers.rms_norm`."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(dtype) * (wide * scale)).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`specs_kernels.layers.swiglu`."""
    dtype = accumulation_dtype(gate.dtype)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)

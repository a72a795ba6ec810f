"""What a case of ``specs-kernels verify`` is: inputs, an op on them, and the plain PyTorch a user would write instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """inputs: fp32 tensors, each of which gets a gradient. run(inputs, backend) and plain(inputs) give named outputs."""

    op: str
    name: str
    inputs: Tensors
    run: Callable[[Tensors, str], Tensors]
    plain: Callable[[Tensors], Tensors]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    no_float64: tuple[str, ...] = ()
    """Backends that refuse float64."""


@dataclass(frozen=True)
class Invariance:
    """run(inputs, index, backend): outputs of the targets that ``index`` names, in one call."""

    op: str
    name: str
    count: int
    inputs: Tensors
    run: Callable[[Tensors, Tensor, str], Tensors]
    batches: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

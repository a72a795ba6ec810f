"""What a case of ``specs-kernels verify`` is: inputs, an op on them, and the plain PyTorch a user would write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

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
    takes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """Dtypes of backends that do not take all of them in this case; none where a backend refuses the case."""
    setting: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the case runs under."""

    def refused_by(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether the backend says, by name, that it does not do this."""
        if dtype == torch.float64 and backend in self.no_float64:
            return True
        return backend in self.takes and dtype not in self.takes[backend]


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

"""What surrounds a call: a tracer or tensors without data, autocast, ``torch.compile``'s graphs (whose compiler takes seconds to
import, so it is not).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(reason: str) -> Callable[[F], F]:
    """What ``torch.compiler.disable(reason=...)`` does: a graph break at the call, an error under ``fullgraph=True``."""

    def mark(function: F) -> F:
        assert isinstance(function, FunctionType)
        function.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        compiler: Any = torch._C._dynamo.eval_frame
        skip = compiler._FrameAction.SKIP
        compiler.set_code_exec_strategy(function.__code__, compiler._FrameExecStrategy(skip, skip))
        return function

    return mark


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call is being traced, or its tensors are not plain ones or hold no data: then it goes through the operator."""
    return torch.compiler.is_compiling() or any(
        tensor is not None
        and (tensor.is_meta or (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter))
        for tensor in tensors
    )


def autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; its context costs more than all checks together, so it is entered only where it is on."""
    return torch.autocast(device.type, enabled=False) if autocast_on(device) else nullcontext()

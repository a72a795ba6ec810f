"""Keeping a function out of ``torch.compile``'s graphs without importing the compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch

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

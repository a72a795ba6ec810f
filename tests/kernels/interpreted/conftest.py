"""Tests of the Triton kernels under Triton's interpreter. They need ``TRITON_INTERPRET=1`` before Triton is imported, which would
leak into every other test of a process, so ``test_triton_interpreted.py`` (one folder up) runs them in a process of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # packed_forests
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies every argument's storage onto itself after a launch; on the CPU that changes nothing, and would
    commit the memory of the tests with huge strides."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)


@pytest.fixture(autouse=True)
def one_patch_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch replaces the functions of ``triton.language``; so does, again, each call between kernels: half of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return patch(fn) if any(tl.core.is_builtin(module.load) for module in modules) else None

    monkeypatch.setattr(interpreter, "_patch_lang", once)

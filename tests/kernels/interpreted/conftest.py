"""Tests of the Triton kernels under Triton's interpreter. They need ``TRITON_INTERPRET=1`` before Triton is imported, which would
leak into every other test of a process, so ``test_triton_interpreted.py`` (one folder up) runs them in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies every argument's storage onto itself after a launch; on the CPU that changes nothing, and would
    commit the memory of the tests with huge strides."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)

"""Runs ``interpreted/`` in a process with ``TRITON_INTERPRET=1``, and what depends on that variable being unset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.timeout(1800)
def test_kernels_under_the_interpreter() -> None:
    """All of them in one process: each costs an import of PyTorch and Triton."""
    options = ["--confcutdir", str(FOLDER), "-p", "no:cacheprovider", "--import-mode=importlib"]
    result = interpreted("-m", "pytest", *options, str(FOLDER))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


def test_without_the_variable_the_backend_is_unavailable_and_says_why() -> None:
    from specs_kernels import dispatch

    reason = dispatch.unavailable("triton", "cpu")
    assert reason is not None and "set TRITON_INTERPRET=1 before Triton is imported" in reason
    with pytest.raises(ValueError, match="linear_logprob has no backend 'triton' here .*TRITON_INTERPRET=1"):
        dispatch.choose("linear_logprob", "triton")


def test_setting_the_variable_after_triton_was_imported_is_refused() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET'); import triton.language; os.environ['TRITON_INTERPRET'] = '1'; "
        "from specs_kernels import dispatch; print(dispatch.unavailable('triton', 'cpu'))"
    )
    assert "before Triton is imported" in interpreted("-c", code).stdout


def test_importing_the_library_does_not_import_triton() -> None:
    """PyTorch may import it; nothing of ours does."""
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import specs_kernels, specs_kernels.verify; "
        "ours = [m for m in sys.modules if m.startswith('specs_kernels') and 'triton' in m]; "
        "assert not ours, ours; assert before or 'triton' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_on_a_gpu_auto_stays_with_chunked_and_says_why() -> None:
    from specs_kernels import dispatch

    choice = dispatch.choose("linear_logprob", device="cuda")
    assert choice.backend == "chunked" and "triton runs by name" in choice.reason and "measured" in choice.reason
    assert dispatch.choose("linear_logprob", "triton", "cuda").backend == "triton"
    assert "not on mps" in str(dispatch.unavailable("triton", "mps"))

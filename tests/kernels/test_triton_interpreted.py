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


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path: Path) -> None:
    options = ["-q", "--confcutdir", str(FOLDER), "-p", "no:cacheprovider", "--import-mode=importlib"]
    result = interpreted("-m", "pytest", *options, str(path))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout

"""The CUDA C++ sources compile where there is an nvcc, without spills.

Nothing at run time needs them and the set-up does not build them; they are candidates to be measured on a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "selective_logprob.cu"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here; the CUDA C++ sources are optional")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_selective_logprob_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    assert NVCC is not None
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall"]
    result = subprocess.run(
        [NVCC, *flags, "-c", str(SOURCE), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    if "is not defined for option 'gpu-architecture'" in result.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    # Forward and backward, three dtypes, aligned and not.
    assert len(spills) == 12 and set(spills) == {("0", "0")}

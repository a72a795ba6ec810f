"""The compiled library: built from the sources it lies beside, or not used; a failed build leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specs_kernels import native

ROOT = Path(__file__).parents[2]


def copy_sources(to: Path) -> Path:
    return Path(shutil.copytree(ROOT / "csrc", to / "csrc"))


def test_the_fingerprint_changes_with_contents_names_and_files(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path)
    seen = {native.fingerprint(sources)}
    assert seen == {native.fingerprint(ROOT / "csrc")}
    for change in (
        lambda: (sources / "library.cpp").write_text("// changed"),
        lambda: (sources / "library.cpp").rename(sources / "other.cpp"),
        lambda: (sources / "cpu" / "more.h").touch(),
    ):
        change()
        seen.add(native.fingerprint(sources))
    assert len(seen) == 4 and all(0 <= value < 2**63 for value in seen)
    (sources / "notes.txt").touch()
    assert native.fingerprint(sources) in seen


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_a_library_built_from_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = copy_sources(tmp_path)
    monkeypatch.setattr(native, "SOURCES", sources)
    assert native.missing.__wrapped__() is None
    (sources / "library.cpp").write_text("// changed")
    assert "was built from other sources than" in str(native.missing.__wrapped__())
    monkeypatch.setattr(native, "SOURCES", tmp_path / "not a checkout")
    assert native.missing.__wrapped__() is None


@pytest.mark.parametrize("switch, code", [("", 0), ("1", 1)])
def test_a_failed_build_says_so_and_leaves_no_earlier_library(tmp_path: Path, switch: str, code: int) -> None:
    copy_sources(tmp_path)
    package = tmp_path / "kernels" / "specs_kernels"
    package.mkdir(parents=True)
    for name in ("setup.py", "kernels/specs_kernels/__init__.py", "kernels/specs_kernels/native.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "setup.cfg").write_text("[options]\npackage_dir =\n  specs_kernels = kernels/specs_kernels\n")
    earlier = package / "_C.abi3.so"
    earlier.touch()
    environment = {**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent", "SPECS_FAST_NATIVE": switch}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "/nonexistent" in done.stderr
    if code == 0:
        assert "the native CPU library was not built" in done.stderr
        assert not earlier.exists()

"""The compiled CPU library ``specs_kernels/_C`` (sources in ``csrc/``): loaded once, or a reason why it is not there.

It is built when the package is installed with a C++17 compiler at hand; it speaks PyTorch's stable ABI, so one build serves every
PyTorch from 2.11 on. Beside its sources (a checkout) it is used only if it was built from them as they are. Nothing here raises
at import: without the library the other backends run.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[1] / "csrc"


def fingerprint(sources: Path) -> int:
    """63 bits that change with any C++ file in this folder; compiled into the library."""
    digest = hashlib.sha256()
    for path in sorted(path for path in sources.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(sources).as_posix()} {len(content)}\n".encode() + content)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _built_from(sources: Path) -> bool:
    ops = torch.ops.specs_kernels
    return hasattr(ops, "native_fingerprint") and int(ops.native_fingerprint()) == fingerprint(sources)


@cache
def missing() -> str | None:
    """None once the library is loaded; otherwise what is missing and how to get it."""
    found = sorted(path for path in FOLDER.glob("_C*") if path.suffix in (".so", ".dylib", ".pyd"))
    if not found:
        return (
            "the native library is not built: install a C++17 compiler (g++ or clang++) and install this package again"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"the native library {found[0].name} does not load ({error}): install this package again"
    if SOURCES.is_dir() and not _built_from(SOURCES):
        return f"the native library {found[0].name} was built from other sources than {SOURCES}: install this package again"
    return None


def instruction_set() -> str | None:
    """The vector instructions the library uses on this machine, or None without a library."""
    if missing() is not None:
        return None
    names = ("portable", "avx2", "avx512", "avx512_bf16")
    return names[int(torch.ops.specs_kernels.native_isa())]

"""Builds the native CPU library `specs_kernels/_C` beside what pyproject.toml declares.

It needs a C++17 compiler and PyTorch at build time (`pip install --no-build-isolation`). Where either is missing the
package installs without it: `specs-fast doctor` then says so, and the PyTorch backends run. Set SPECS_FAST_NATIVE=1 to
make a failed build an error, SPECS_FAST_NATIVE=0 to skip it.
"""

from __future__ import annotations

import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = Path("kernels/specs_kernels")
SWITCH = os.environ.get("SPECS_FAST_NATIVE", "")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# PyTorch 2.11, the oldest one supported: the library uses nothing newer, and one build runs on every later version.
TARGET_VERSION = "0x020b000000000000"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-g0",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *AVX2]
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": ["-mavx512bf16", *AVX512]}


class BuildNative(build_ext):
    """Compiles each source for the instruction set its name ends with, and lives with a missing compiler."""

    def run(self) -> None:
        in_place = self.inplace
        try:
            super().run()
        except Exception as error:
            if SWITCH == "1":
                raise
            print(f"warning: the native CPU library was not built: {error}", file=sys.stderr)
            stale = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
            for path in [*stale, *(PACKAGE / path.name for path in stale if in_place)]:
                path.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        if all(
            Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(e.name))).exists() for e in self.extensions
        ):
            super().copy_extensions_to_source()

    def build_extension(self, extension: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        fingerprint = runpy.run_path(str(PACKAGE / "native.py"))["fingerprint"](Path("csrc"))
        macros = [("TORCH_TARGET_VERSION", TARGET_VERSION), ("SPECS_FINGERPRINT", f"{fingerprint}LL")]
        objects: list[str] = []
        for source in extension.sources:
            isa = Path(source).stem.rsplit("_", 1)[-1]
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[*macros, *([("SPECS_X86", "1")] if X86 else [])],
                include_dirs=include_paths("cpu"),
                extra_postargs=[*FLAGS, *ISA_FLAGS.get(isa, [])],
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=["torch_cpu", "torch"],
            library_dirs=library_paths("cpu"),
            build_temp=self.build_temp,
            target_lang="c++",
        )


def extensions() -> list[Extension]:
    if SWITCH == "0":
        return []
    sources = [path.as_posix() for path in sorted(Path("csrc").rglob("*.cpp"))]
    if not X86:
        sources = [path for path in sources if not path.endswith(("_avx2.cpp", "_avx512.cpp", "_avx512bf16.cpp"))]
    headers = [path.as_posix() for path in sorted(Path("csrc").rglob("*.h"))]
    return [Extension("specs_kernels._C", sources, depends=headers, py_limited_api=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})

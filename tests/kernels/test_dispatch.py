"""Which backend runs: auto chooses and says so; a named one runs or raises."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import specs_kernels
from specs_kernels import dispatch, native

BUILT = native.missing() is None


def test_auto_prefers_native_then_chunked_and_describe_lists_every_op() -> None:
    choices = {choice.op: choice for choice in dispatch.describe()}
    assert {op: choice.backend for op, choice in choices.items()} == {
        "linear_logprob": "native" if BUILT else "chunked",
        "linear_loss": "native" if BUILT else "chunked",
        "selective_logprob": "native" if BUILT else "chunked",
        "packed_attention": "native" if BUILT else "chunked",
        "rms_norm": "native" if BUILT else "reference",
        "swiglu": "native" if BUILT else "reference",
        "preference_loss": "reference",
        "policy_loss": "reference",
    }
    assert all(choice.reason.startswith("auto: ") for choice in choices.values())


def test_a_named_backend_is_what_runs() -> None:
    assert dispatch.choose("linear_logprob", "reference").backend == "reference"
    assert dispatch.choose("linear_logprob", "reference").reason.startswith("asked for by name")


def test_unknown_backend_and_op_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="no backend 'cuda' here; allowed: 'auto', 'reference', 'chunked'"):
        dispatch.choose("packed_attention", "cuda", "cuda")
    with pytest.raises(ValueError, match="unknown op 'softmax'; ops: linear_logprob"):
        dispatch.choose("softmax")


def test_native_is_for_cpu_tensors_only() -> None:
    assert dispatch.choose("packed_attention", device="cuda").backend == "chunked"
    assert (
        "native backend runs on CPU tensors, not on cuda" in dispatch.choose("packed_attention", device="cuda").reason
    )
    with pytest.raises(ValueError, match="no backend 'native' here .the native backend runs on CPU tensors"):
        dispatch.choose("packed_attention", "native", torch.device("cuda", 0))


def test_without_the_library_auto_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a compiler: chunked runs and says why, native by name raises; so does a library that does not load."""
    for content, words in ((None, "not built: install a C.*compiler"), ("not a library", "_C.abi3.so does not load")):
        if content:
            (tmp_path / "_C.abi3.so").write_text(content)
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        monkeypatch.setattr(native, "missing", native.missing.__wrapped__)
        choice = dispatch.choose("packed_attention")
        assert choice.backend == "chunked"
        with pytest.raises(ValueError, match=words):
            dispatch.choose("packed_attention", "native")
        monkeypatch.undo()


@pytest.mark.skipif(not BUILT, reason=str(native.missing()))
def test_the_instruction_set_has_a_name() -> None:
    assert native.instruction_set() in ("portable", "avx2", "avx512", "avx512_bf16")


def test_public_names_exist_and_the_version_is_the_distributions() -> None:
    assert all(hasattr(specs_kernels, name) for name in specs_kernels.__all__)
    assert set(dispatch.ops()) < set(specs_kernels.__all__)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert specs_kernels.__version__ == project["version"]


def test_import_needs_torch_only() -> None:
    """Nothing outside torch and the standard library is imported by the kernel library itself."""
    code = (
        "import torch, json, sys; before = set(sys.modules); import specs_kernels, specs_kernels.verify; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(json.dumps(sorted(new)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(result.stdout)) <= {"specs_kernels", "torch"}

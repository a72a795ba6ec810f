"""The compile gate: one configuration per kernel and target compiled here, the committed table, and that each rule can fail.

``make gate`` compiles all configurations.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton

from specs_kernels import gate, gate_cases, gate_checks
from specs_kernels.gate_cases import TARGETS, Case
from specs_kernels.linear_logprob import triton_forward
from specs_kernels.triton_common import Launch

ROOT = Path(__file__).parents[2]
FIRST = [case for case in gate_cases.cases() if case.first]


@pytest.mark.parametrize("target", TARGETS)
def test_one_configuration_per_kernel_compiles_and_keeps_the_rules(target: str) -> None:
    rows = gate.run(FIRST, (target,))
    shipped = {row.kernel for row in gate.committed()[1]}
    assert {row.kernel for row in rows} == shipped and len(shipped) == 11
    assert [row for row in rows if row.problems] == []
    assert gate.compare(rows) == []


def test_the_committed_table_is_current_and_complete() -> None:
    document, rows = gate.committed()
    assert document["sources"] == gate.source_hash(), "run python -m specs_kernels.gate --write"
    shipped = [
        (launch.kernel.__name__, case.name, target)
        for target in TARGETS
        for case, launch in gate.distinct(gate_cases.cases(), target)
    ]
    assert [(row.kernel, row.case, row.target) for row in rows] == shipped
    assert not any(row.spill for row in rows if (row.kernel, row.case, row.target) not in _excused())
    assert (ROOT / "docs/compile_gate.md").read_text(encoding="utf-8") == gate.page(document, rows)


def _excused() -> set[tuple[str, str, str]]:
    return {(e.kernel, e.case, e.target) for e in gate_cases.EXCEPTIONS}


def test_a_stale_table_and_a_changed_row_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    document, rows = gate.committed()
    if document["triton"] == triton.__version__:
        changed = dataclasses.replace(rows[0], registers=rows[0].registers + 1)
        assert "differs" in gate.compare([changed])[0]
    monkeypatch.setattr(gate, "source_hash", lambda: "another")
    assert "stale" in gate.compare([])[0]


def test_the_kernels_state_the_precision_of_every_dot(tmp_path: Path) -> None:
    assert gate.source_problems() == []
    dots = [re.findall(r"tl\.dot\(", path.read_text(encoding="utf-8")) for path in gate.sources()]
    assert sum(map(len, dots)) >= 1
    careless = tmp_path / "careless.py"
    careless.write_text(
        "def f(a, b, acc):\n    acc = tl.dot(a, b, acc)\n    return tl.dot(a, b, input_precision='ieee')\n"
    )
    assert gate_checks.dots_without_precision(careless) == ["careless.py:2: tl.dot without input_precision"]


def _module(source: str, name: str, folder: Path) -> Any:
    """A module with this source; Triton reads kernels from files."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _changed(name: str, folder: Path, *changes: tuple[str, str]) -> Any:
    """The fused forward kernel with some of its source replaced."""
    source = Path(triton_forward.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source
        source = source.replace(old, new, 1)
    return _module(source, name, folder).fused_forward_kernel


def _fused(name: str, target: str = "sm90") -> tuple[Case, Launch]:
    """The case of the fused forward with this name."""
    return next(
        (case, launch)
        for case, launch in gate.distinct(gate_cases.cases(), target)
        if case.name == name and launch.kernel.__name__ == "fused_forward_kernel"
    )


def _problems(kernel: Any, case: str, target: str) -> list[str]:
    """What the gate says about a case of the fused forward, run with another kernel."""
    launch = dataclasses.replace(_fused(case, target)[1], kernel=kernel)
    compiled, _ = gate.compile_launch(launch, target)
    return gate_checks.problems(kernel, launch.arguments, compiled.asm["ttir"], compiled.asm["ptx"], target)


STRIDED = "part.to(tl.int64) * stride_slice"


def test_32_bit_strides_are_found(tmp_path: Path) -> None:
    declared = ("    stride_slice: tl.int64,", "    stride_slice,")
    kernel = _changed("narrow_strides", tmp_path, declared, (STRIDED, "part * stride_slice"))
    found = _problems(kernel, "bf16, entropy", "sm90")
    assert any("parameter stride_slice is not declared tl.int64" in line for line in found)
    assert any("32-bit product of a stride" in line for line in found)


def test_a_stride_cast_down_before_the_product_is_found(tmp_path: Path) -> None:
    kernel = _changed("cast_strides", tmp_path, (STRIDED, "part * stride_slice.to(tl.int32)"))
    found = _problems(kernel, "bf16, entropy", "sm90")
    assert len(found) == 1 and "32-bit product of a stride" in found[0]


def test_tf32_in_an_fp32_configuration_is_found(tmp_path: Path) -> None:
    used = "acc = dot(x, w.T, acc)"
    kernel = _changed("tf32", tmp_path, (used, "acc = tl.dot(x, w.T, acc, input_precision='tf32')"))
    assert "tf32 in the assembly of an fp32 configuration" in _problems(kernel, "fp32", "sm80")


def test_spills_and_shared_memory_are_found_and_excused_by_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 128 x 256 with a softcap does not fit the registers."""
    monkeypatch.setattr(triton_forward, "tile_for", lambda *_: triton_forward.Tile(128, 256, 64, 8, 8, 4))
    case, launch = _fused("bf16, all options")
    row = gate.measure(case, launch, "sm90")
    assert row.spill > 0 and row.problems == (f"spills {row.spill} bytes, allowed 0",)
    excuse = gate_cases.Spill(row.kernel, case.name, "sm90", row.spill, "a test")
    monkeypatch.setattr(gate_cases, "EXCEPTIONS", (excuse,))
    monkeypatch.setitem(gate_cases.SHARED_LIMIT, "sm90", row.shared - 1)
    assert gate.measure(case, launch, "sm90").problems == (
        f"takes {row.shared} bytes of shared memory, limit {row.shared - 1}",
    )


def test_half_precision_dots_need_tensor_cores_and_descriptors_need_bulk_copies() -> None:
    _, launch = _fused("bf16, entropy")
    assert launch.arguments["DESCRIPTOR"]
    assert gate_checks.problems(launch.kernel, launch.arguments, "tt.dot", "", "sm90") == [
        "tl.dot without wgmma.mma_async",
        "tensor descriptors without cp.async.bulk.tensor",
    ]


def test_a_passing_run_is_not_repeated_on_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run(*arguments: object, **options: object) -> list[gate.Row]:
        calls.append(arguments)
        return gate.committed()[1]

    monkeypatch.setattr(gate, "run", run)
    command = ["--cache", str(tmp_path / "gate")]
    assert gate.main(command) == 0 and gate.main(command) == 0 and len(calls) == 1
    assert "passed before on the same sources" in capsys.readouterr().out
    monkeypatch.setattr(gate, "source_hash", lambda: "another")
    assert gate.main(command) == 1 and len(calls) == 2

"""The compile gate: every shipped Triton configuration, compiled ahead of time, held to what makes it fast and safe.

No GPU is needed: Triton compiles for a named target, and ``ptxas`` ships with it. For each configuration and target:

* no register spills, or a line in ``gate_cases.EXCEPTIONS`` that says how many bytes and why;
* shared memory within the target's limit;
* tensor-core instructions of the architecture (WGMMA on sm_90) in half-precision kernels with ``tl.dot``;
* every ``tl.dot`` in the sources states its ``input_precision``, and no tf32 stands in the PTX of fp32 configurations;
* strides are 64-bit arguments, and no 32-bit multiply has one as an operand.

    python -m specs_kernels.gate            check everything, and that the committed table says the same
    python -m specs_kernels.gate --write    check everything and write the table

The table (``gate_table.json``, and ``docs/compile_gate.md`` made from it) carries a hash of the kernel sources; a stale one
fails. Exit code 0 when all is well, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from specs_kernels import gate_cases, gate_checks, triton_common
from specs_kernels.gate_cases import SHARED_LIMIT, TARGETS, Case

PACKAGE = Path(__file__).parent
TABLE = PACKAGE / "gate_table.json"
_GPU = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Row:
    """One compiled configuration. spill: bytes of stack (scratch on AMD). problems: empty when it passes."""

    kernel: str
    case: str
    target: str
    registers: int
    spill: int
    shared: int
    problems: tuple[str, ...] = ()


def sources() -> list[Path]:
    """Files that decide what is compiled."""
    return sorted([*PACKAGE.rglob("triton*.py"), *PACKAGE.glob("gate*.py")])


def source_hash() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def launches(case: Case, target: str) -> list[triton_common.Launch]:
    """What the case would launch on the target, each kernel once: rows of the table are named by kernel and case."""
    with triton_common.recorded(target) as recorded:
        case.run()
    names = [launch.kernel.__name__ for launch in recorded]
    if len(set(names)) != len(names):
        raise ValueError(f"case {case.name!r} launches a kernel twice: {names}; make it two cases")
    return recorded


def _source(launch: triton_common.Launch) -> ASTSource:
    """The launch as Triton's run time would specialise it: None, 1 and constexpr become constants, divisibility by 16 a hint."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = parameter.annotation_type or triton.runtime.jit.mangle_type(value)
        aligned = value.data_ptr() if isinstance(value, Tensor) else value
        special = not (parameter.do_not_specialize or isinstance(value, TensorDescriptor))
        if special and isinstance(aligned, int) and aligned % 16 == 0:
            hints[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, hints)


def compile_launch(launch: triton_common.Launch, target: str) -> tuple[Any, str]:
    """The compiled kernel and what ``ptxas -v`` said about it."""
    log = io.StringIO()
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(_source(launch), target=_GPU[target], options=options)
    return compiled, log.getvalue()


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}: {text[:500]!r}")
    return int(found.group(1))


def measure(case: Case, launch: triton_common.Launch, target: str) -> Row:
    """Compile one launch and hold it to the rules."""
    compiled, log = compile_launch(launch, target)
    name = launch.kernel.__name__
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spill = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        registers = _number(r"Used (\d+) registers", log)
        spill = _number(r"(\d+) bytes stack frame", log)
    shared = int(compiled.metadata.shared)
    problems = gate_checks.problems(launch.kernel, launch.arguments, compiled.asm["ttir"], text, target)
    allowed = max(
        (e.bytes for e in gate_cases.EXCEPTIONS if (e.kernel, e.case, e.target) == (name, case.name, target)), default=0
    )
    if spill > allowed:
        problems.append(f"spills {spill} bytes, allowed {allowed}")
    if shared > SHARED_LIMIT[target]:
        problems.append(f"takes {shared} bytes of shared memory, limit {SHARED_LIMIT[target]}")
    return Row(name, case.name, target, registers, spill, shared, tuple(problems))


def run(cases: Iterable[Case], targets: Sequence[str] = TARGETS, progress: bool = False) -> list[Row]:
    """Compile all cases for all targets. A launch that two cases share is listed once, under the first."""
    if triton_common.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels of this process are interpreted, not compiled; unset it")
    chosen, rows = list(cases), []
    for target in targets:
        for case, launch in distinct(chosen, target):
            rows.append(measure(case, launch, target))
            if progress:
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def distinct(cases: Iterable[Case], target: str) -> Iterator[tuple[Case, triton_common.Launch]]:
    """Launches of the cases on a target, without those that compile to the same thing as an earlier one."""
    seen: set[str] = set()
    for case in cases:
        for launch in launches(case, target):
            key = f"{launch.kernel.__name__} {_source(launch).hash()} {launch.num_warps} {launch.num_stages}"
            if key not in seen:
                seen.add(key)
                yield case, launch


def source_problems() -> list[str]:
    """Rules that hold for source files."""
    return [line for path in sources() for line in gate_checks.dots_without_precision(path)]


def table_text(rows: Sequence[Row]) -> str:
    """``gate_table.json``: one line per configuration and target."""
    lines = ",\n".join("  " + json.dumps([r.kernel, r.case, r.target, r.registers, r.spill, r.shared]) for r in rows)
    head = json.dumps({"sources": source_hash(), "triton": triton.__version__})[1:-1]
    return f'{{{head},\n "columns": ["kernel", "case", "target", "registers", "spill", "shared"],\n "rows": [\n{lines}\n ]}}\n'


def committed() -> tuple[dict[str, Any], list[Row]]:
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    return document, [Row(*row) for row in document["rows"]]


def page(document: dict[str, Any], rows: Sequence[Row]) -> str:
    """``docs/compile_gate.md``: a line per configuration, a column per target."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        spilled = f", **{row.spill} B spilled**" if row.spill else ""
        cell = f"{row.registers} / {row.shared / 1024:.0f}{spilled}"
        cells.setdefault((row.kernel, row.case), {})[row.target] = cell
    head = ["kernel", "configuration", *TARGETS]
    body = [[kernel, case, *(by.get(target, "") for target in TARGETS)] for (kernel, case), by in cells.items()]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    excused = [f"- `{e.kernel}` ({e.case}), {e.target}: {e.bytes} bytes. {e.why}" for e in gate_cases.EXCEPTIONS]
    return (
        "\n".join(
            [
                "# The compile gate",
                "",
                "Every Triton configuration that ships, compiled ahead of time without a GPU by `make gate`: registers per",
                "thread / shared memory per program in KiB. An empty cell is a configuration equal to an earlier line on that",
                "target. This is what the compiler made; speed is not in this table.",
                "",
                f"Triton {document['triton']}, kernel sources {document['sources']}.",
                "",
                *lines,
                "",
                "Accepted spills: " + ("none." if not excused else ""),
                *excused,
                "",
            ]
        ).rstrip()
        + "\n"
    )


def compare(rows: Sequence[Row]) -> list[str]:
    """How the committed table differs from these rows (all of them, or some)."""
    if not TABLE.exists():
        return [f"{TABLE.name} is missing: run python -m specs_kernels.gate --write"]
    document, known = committed()
    if document["sources"] != source_hash():
        return [f"{TABLE.name} is stale (kernel sources changed): run python -m specs_kernels.gate --write"]
    if document["triton"] != triton.__version__:
        return []  # another compiler counts other registers; the rules themselves were checked
    by_key = {(row.kernel, row.case, row.target): row for row in known}
    return [
        f"{TABLE.name} differs: {row} is now measured, the table has {by_key.get((row.kernel, row.case, row.target))}"
        for row in rows
        if by_key.get((row.kernel, row.case, row.target)) != row
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m specs_kernels.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write gate_table.json and the page after a passing run")
    parser.add_argument(
        "--page", type=Path, default=Path("docs/compile_gate.md"), help="page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of stamps: a passing run on the same sources is not repeated"
    )
    arguments = parser.parse_args(argv)
    stamp = arguments.cache / f"{source_hash()}-{triton.__version__}" if arguments.cache else None
    if stamp is not None and stamp.exists() and not arguments.write and not compare([]):
        print(f"compile gate: passed before on the same sources ({stamp.name})")
        return 0
    rows = run(gate_cases.cases(), progress=sys.stderr.isatty())
    problems = source_problems() + [f"{r.kernel} ({r.case}) on {r.target}: {p}" for r in rows for p in r.problems]
    if arguments.write and not problems:
        TABLE.write_text(table_text(rows), encoding="utf-8")
        arguments.page.write_text(page(*committed()), encoding="utf-8")
    problems += compare(rows)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"compile gate: {len(rows)} configurations, {len(problems)} problems")
    if stamp is not None and not problems:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

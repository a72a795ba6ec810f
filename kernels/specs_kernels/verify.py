"""``specs-kernels verify``: every op and backend against its fp64 definition, on this device.

For each case, dtype and backend, outputs and gradients are compared with the fp64 reference computed from the same
rounded inputs. The error of a tensor is ``||x - ref|| / ||ref||`` (Frobenius). The yardstick is the error of ordinary
PyTorch in the same dtype; a backend passes when for every tensor

    error <= 2 * error of PyTorch + FLOOR

In float64 a backend is compared with the plain PyTorch version itself, so that a wrong definition fails as well:
``error <= EXACT``.

A backend that raises fails with what it raised; the others are still checked. What a backend refuses by name (a dtype, a case) is
left out. Without a GPU the cascade of ``packed_attention`` runs on a stand-in for the libraries whose kernels it calls.

For the log-prob ops a last case compares a target's results alone and in small batches with those in the whole, bit by bit;
a backend that cannot keep that promise on this machine is said so, and does not fail.

Exit code 0 when everything passes, 1 when something fails, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specs_kernels.dispatch import backends, ops
from specs_kernels.verify_case import Case, Invariance, Tensors
from specs_kernels.verify_cases import cases
from specs_kernels.verify_logprob_cases import invariance_cases

ALLOWED_RATIO = 2.0
FLOOR = 1e-6
"""Relative error below which no comparison is made: a few fp32 roundings."""
EXACT = 1e-10
"""Relative difference from plain PyTorch allowed in float64."""


@dataclass(frozen=True)
class Result:
    """Worst tensor (highest error against what is allowed) of one case, dtype and backend."""

    op: str
    backend: str
    case: str
    dtype: str
    tensor: str
    error: float
    torch_error: float
    ratio: float
    passed: bool
    note: str = ""


def verify(
    names: Sequence[str] = (), device: torch.device | str = "cpu", seed: int = 0, progress: bool = False
) -> list[Result]:
    """Run all cases of the named ops (default: all). ValueError for an unknown op."""
    return [result for results in results_in_turn(names, device, seed, progress) for result in results]


def results_in_turn(
    names: Sequence[str] = (), device: torch.device | str = "cpu", seed: int = 0, progress: bool = False
) -> Iterator[list[Result]]:
    """The results of :func:`verify` as they come, a case and dtype at a time."""
    for name in names:
        backends(name)
    for op in names or ops():
        for case in cases(op, torch.device(device), seed):
            with case.setting():
                results = _verify_definition(case)
            yield results
            for dtype in case.dtypes:
                if progress:
                    print(f"{op}: {case.name}, {_short(dtype)}", file=sys.stderr)
                with case.setting():
                    results = _verify_case(case, dtype)
                yield results
        for invariance in invariance_cases(op, torch.device(device), seed):
            for dtype in invariance.dtypes:
                yield _verify_invariance(invariance, dtype)


def _verify_invariance(case: Invariance, dtype: torch.dtype) -> list[Result]:
    """Bit by bit: a target's results alone, in a few small batches and in the whole. A difference is no failure, but said.

    The promise rests on a GEMM library that computes every row of one block shape alike, which only a machine can show.
    """
    inputs = {name: tensor.to(dtype) for name, tensor in case.inputs.items()}
    results = []
    for backend in backends(case.op, next(iter(inputs.values())).device):
        if backend == "reference":
            continue
        try:
            worst, tensor = _worst_of_batches(case, inputs, backend)
        except Exception as error:
            results.append(_raised(case, backend, dtype, error))
            continue
        note = "" if worst == 0.0 else "results depend on the batch: the GEMM library treats equal rows differently"
        ratio = 0.0 if worst == 0.0 else math.inf
        results.append(Result(case.op, backend, case.name, _short(dtype), tensor, worst, 0.0, ratio, True, note))
    return results


def _worst_of_batches(case: Invariance, inputs: Tensors, backend: str) -> tuple[float, str]:
    """The largest difference from the whole, and in which output."""
    whole = case.run(inputs, torch.arange(case.count), backend)
    worst, tensor = 0.0, "logp"
    for index in case.batches:
        for name, values in case.run(inputs, index, backend).items():
            expected = whole[name].index_select(0, index.to(whole[name].device))
            error = 0.0 if torch.equal(values, expected) else float((values - expected).abs().max())
            if error > worst or math.isnan(error):
                worst, tensor = error, name
    return worst, tensor


def _verify_definition(case: Case) -> list[Result]:
    """Every backend that takes float64 against plain PyTorch in float64."""
    exact = {name: tensor.double() for name, tensor in case.inputs.items()}
    plain = _evaluate(case.plain, exact)
    results = []
    for backend in backends(case.op, next(iter(case.inputs.values())).device):
        if case.refused_by(backend, torch.float64):
            continue
        try:
            outputs = _evaluate(lambda x, backend=backend: case.run(x, backend), exact)  # type: ignore[misc]
            errors = _errors({name: value for name, value in outputs.items() if name in plain}, plain)
        except Exception as error:
            results.append(_raised(case, backend, torch.float64, error))
            continue
        worst = max(errors, key=lambda name: _excess(errors[name], 0.0))
        size = errors[worst]
        results.append(Result(case.op, backend, case.name, "float64", worst, size, EXACT, size / EXACT, size <= EXACT))
    return results


def _verify_case(case: Case, dtype: torch.dtype) -> list[Result]:
    rounded = {name: tensor.to(dtype) for name, tensor in case.inputs.items()}
    exact = {name: tensor.double() for name, tensor in rounded.items()}
    reference = _evaluate(lambda x: case.run(x, "reference"), exact)
    plain = _errors(_evaluate(case.plain, rounded), reference)
    results = []
    for backend in backends(case.op, next(iter(case.inputs.values())).device):
        if case.refused_by(backend, dtype):
            continue
        try:
            errors = _errors(_evaluate(lambda x, backend=backend: case.run(x, backend), rounded), reference)  # type: ignore[misc]
        except Exception as error:
            results.append(_raised(case, backend, dtype, error))
            continue
        # A metric that the plain version does not compute is held to the error of the loss itself.
        yardstick = {name: plain.get(name, plain.get("loss", 0.0)) for name in errors}
        worst = max(errors, key=lambda name: _excess(errors[name], yardstick[name]))
        size, torch_error = errors[worst], yardstick[worst]
        ratio = size / torch_error if torch_error else (0.0 if size == 0 else math.inf)
        passed = _excess(size, torch_error) <= 1.0
        results.append(Result(case.op, backend, case.name, _short(dtype), worst, size, torch_error, ratio, passed))
    return results


def _raised(case: Case | Invariance, backend: str, dtype: torch.dtype, error: Exception) -> Result:
    """A result that fails, with the first line of what the backend raised."""
    lines = str(error).strip().splitlines() or [""]
    note = f"raised {type(error).__name__}: {lines[0][:200]}"
    nothing = math.nan
    return Result(case.op, backend, case.name, _short(dtype), "", nothing, nothing, nothing, False, note)


def _excess(error: float, torch_error: float) -> float:
    """Error over what is allowed; a NaN error is infinitely bad."""
    return math.inf if math.isnan(error) else error / (ALLOWED_RATIO * torch_error + FLOOR)


def _evaluate(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    """Outputs, and ``d input`` gradients for one fixed random upstream gradient per output."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(1)
    total: Tensor | None = None
    for name in ("logp", "entropy", "lse", "out", "loss"):
        if name in outputs:
            # bf16-representable values, so that every dtype gets the same upstream gradient.
            upstream = torch.randn(outputs[name].shape, generator=generator).bfloat16().to(outputs[name].device)
            part = (
                (outputs[name] * upstream.to(outputs[name].dtype))
                .to(torch.promote_types(outputs[name].dtype, torch.float32))
                .sum()
            )
            total = part if total is None else total + part
    assert total is not None
    grads = torch.autograd.grad(total, list(leaves.values()))
    results = {name: value.detach() for name, value in outputs.items()}
    results.update({f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return results


def _errors(results: Tensors, reference: Tensors) -> dict[str, float]:
    errors = {}
    for name, value in results.items():
        exact = reference[name].double()
        scale = float(exact.norm())
        errors[name] = float((value.double() - exact).norm()) / (scale or 1.0)
    return errors


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(results: Sequence[Result]) -> str:
    header = ("op", "backend", "case", "dtype", "worst tensor", "error", "torch error", "ratio", "")
    rows = [header] + [
        (
            r.op,
            r.backend,
            r.case,
            r.dtype,
            r.tensor,
            f"{r.error:.1e}",
            f"{r.torch_error:.1e}",
            f"{r.ratio:.2f}",
            (r.note or "pass") if r.passed else f"FAIL {r.note}".rstrip(),
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``specs-kernels``."""
    parser = argparse.ArgumentParser(prog="specs-kernels", description="The kernel library of specs-fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="every op and backend against its fp64 definition, on this device")
    command.add_argument("ops", nargs="*", metavar="OP", help=f"ops to verify (default: all of {', '.join(ops())})")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there as well, case by case")
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.ops if name not in ops()]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; ops: {', '.join(ops())}")
    device = _device_name(parser, arguments.device)
    results: list[Result] = []
    for batch in results_in_turn(arguments.ops, arguments.device, arguments.seed, progress=sys.stderr.isatty()):
        results += batch
        if arguments.out is not None:
            _write(arguments.out, _document(results, device, complete=False))
    document = _document(results, device, complete=True)
    if arguments.out is not None:
        _write(arguments.out, document)
    if arguments.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print(
            f"torch {torch.__version__}, {device}; error = |x - fp64| / |fp64|, worst tensor of outputs and gradients"
        )
        print(_table(results))
        print(f"{sum(result.passed for result in results)} of {len(results)} pass")
    return 0 if document["passed"] else 1


def _device_name(parser: argparse.ArgumentParser, name: str) -> str:
    """ "cpu", or the GPU's name; a usage error for a device that is not here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name


def _document(results: Sequence[Result], device: str, *, complete: bool) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "device": device,
        "complete": complete,
        "passed": all(result.passed for result in results),
        "rule": f"error <= {ALLOWED_RATIO} * torch_error + {FLOOR}; float64: error <= {EXACT} (as torch_error)",
        "results": [_plain(result) for result in results],
    }


def _plain(result: Result) -> dict[str, object]:
    """For JSON, which has no NaN and no infinity: they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(result).items()
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    """At once: whoever is stopped meanwhile leaves the old file or the new one."""
    written = path.with_name(f".{path.name}.partial")
    written.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    written.replace(path)


if __name__ == "__main__":
    sys.exit(main())

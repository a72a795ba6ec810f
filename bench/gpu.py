"""Verify and measure everything on this machine's GPU in one call, from the source tree, nothing installed but torch and triton:

    PYTHONPATH=kernels:. python -m bench.gpu

Every op against its fp64 definition, then the op benchmarks, the most telling sections first, then the update of a whole model
(which needs transformers). Each part is a process of its own with a share of the time; files are written section by section,
so that what was measured before a part ran out of time is kept. Writes bench/results/<gpu name>/{verify,<op>,update,gpu}.json.

Exit code: 0; 1 where an op fails its check or a part fails; 2 where there is no GPU. A part that runs out of time is no
failure; gpu.json says so.

``--dry-run`` goes the same way on the CPU at tiny sizes, into ``--out``: a check of the flow, not of the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import provenance
from bench.run import RESULTS, device_name, write_json
from bench.section import importable

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 520.0
"""Below nine minutes, with room to write and to leave."""
GRACE_SECONDS = 15.0
UPDATE = "update"


@dataclass(frozen=True)
class Part:
    """A process. seconds: the most it may take; what a part leaves over is the next ones'."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    file: str | None = None
    """JSON that it prints and that is written here; the others write their own."""


def parts(device: torch.device, folder: Path, *, tiny: bool) -> list[Part]:
    """What is run, in order."""

    def op(name: str, seconds: float, per_section: float, *shapes: str) -> Part:
        arguments = ["-m", "bench.run", name, "--device", str(device), "--out", str(folder / f"{name}.json")]
        arguments += ["--plot", str(folder / f"{name}.png"), "--seconds", str(per_section)]
        arguments += ["--tiny", "--repeats", "1", "--arms", "eager", "ours", "SDPA"] if tiny else []
        label = f"{name} {' '.join(shapes)}".strip()
        return Part(label, (*arguments, *(("--shapes", *shapes) if shapes else ())), seconds)

    verify = ("-m", "specs_kernels.verify", "verify", "--device", str(device), "--json")
    update = ("-m", "bench.update", "--device", device.type, "--out", str(folder / "update.json"))
    if tiny:
        return [
            Part("verify", (*verify, "policy_loss"), 60, "verify.json"),
            op("linear_logprob", 90, 1, "bf16 forward"),
            op("selective_logprob", 90, 1, "bf16 forward"),
            op("packed_attention", 90, 1, "forward"),
        ]
    return [
        op("linear_logprob", 200, 6, "16384x4096x131072", "8192x4096x151936"),
        Part("verify", verify, 120, "verify.json"),
        op("selective_logprob", 60, 2, "8192x151936"),
        op("packed_attention", 70, 2),
        op("linear_logprob", 100, 3, "sweep", "16384x192x512"),
        op("selective_logprob", 40, 1, "sweep", "16384x32000"),
        Part(UPDATE, update, 60),
    ]


def run_all(plan: Sequence[Part], folder: Path, total: float) -> list[dict[str, Any]]:
    """Every part's exit code, seconds, and how it ended."""
    deadline = time.monotonic() + total
    report: list[dict[str, Any]] = []
    for part in plan:
        left = deadline - time.monotonic()
        entry: dict[str, Any] = {"part": part.name, "command": " ".join(["python", *part.arguments])}
        report.append(entry)
        if part.name == UPDATE and not importable("transformers"):
            entry["ended"] = "not run: transformers is not installed"
        elif left < GRACE_SECONDS:
            entry["ended"] = "not run: no time was left"
        else:
            entry |= run_part(part, folder, min(part.seconds, left - GRACE_SECONDS / 3))
        print(f"--- {part.name}: {entry['ended']}", flush=True)
    return report


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *_extra_path()])}
    print(f"--- {part.name}: up to {seconds:.0f} s", flush=True)
    capture = part.file is not None
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        ended = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers it started
        output, _ = process.communicate()
        ended = f"stopped after {seconds:.0f} s; what was written before is kept"
    if part.file is not None:
        write_json(folder / part.file, {**provenance(), "ended": ended, "verify": parsed(output or "")})
    return {
        "ended": ended,
        "exit_code": process.returncode if ended[0] != "s" else None,
        "seconds": round(time.monotonic() - started, 1),
    }


def _extra_path() -> list[str]:
    """What was on the path already: peers may have been unpacked there."""
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", ".", "kernels")]


def parsed(text: str) -> Any:
    """The JSON a part printed; its text where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"output": text[-4000:]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Verify and measure everything on this GPU."
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: bench/results/<gpu name>)")
    parser.add_argument("--dry-run", action="store_true", help="the same flow on the CPU at tiny sizes; needs --out")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out is None:
        parser.error("--dry-run needs --out: its files are no results")
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU that PyTorch sees; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    folder = (options.out or RESULTS / device_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = run_all(parts(device, folder, tiny=options.dry_run), folder, options.seconds)
    write_json(folder / "gpu.json", {**provenance(), "dry_run": options.dry_run, "parts": report})
    return 1 if any(entry.get("exit_code") for entry in report) else 0


if __name__ == "__main__":
    sys.exit(main())

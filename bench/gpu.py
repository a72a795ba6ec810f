"""Verify and measure everything on this machine's GPU in one call, from the source tree, nothing installed but torch and triton:

    PYTHONPATH=kernels:. python -m bench.gpu

The most telling sections of the op benchmarks, then every op against its fp64 definition, then the other sections and the
update of a whole model (which needs transformers). Each part is a process of its own with a share of the time; only the
verifications, which measure nothing, run side by side. Files are written as results come, so what was there before a part ran
out of time, failed, or lost the GPU is kept; a benchmark that lost it goes on without the arm it died of.

Writes into bench/results/<gpu name>: gpu.json (how every part ended, and what failed), verify.json, update.json, and a JSON and
a plot per op. ``--commit`` names the commit where git does not tell.

Exit code: 0; 1 where an op fails its check, an arm of ours raises, or a part fails; 2 where there is no GPU. A part that runs
out of time is no failure; gpu.json says so.

``--dry-run`` goes the same way on the CPU at tiny sizes, into ``--out``: a check of the flow, not of the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import COMMIT_VARIABLE, provenance
from bench.run import DEVICE_LOST, OPS, RESULTS, device_name, write_json
from bench.section import version
from specs_kernels.dispatch import ops as kernel_ops

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 515.0
"""Below nine minutes, with room to start, to write and to leave."""
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.1
COLLECT_SECONDS = 5.0
"""Between two looks at what verifications have written so far."""
UPDATE_NEEDS = {"transformers": (5, 23), "tokenizers": (0,), "numpy": (0,), "pillow": (0,), "safetensors": (0,)}
TAIL = 3000
"""Characters of a failed part's stderr that gpu.json keeps."""


@dataclass(frozen=True)
class Part:
    """A process. seconds: the most it may take; what a part leaves over is the next ones'. needs: distributions and their
    least versions, without which it is not run."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: dict[str, tuple[int, ...]] = field(default_factory=dict)


Step = tuple[Part, ...]
"""Parts that run side by side."""


def plan(device: torch.device, folder: Path, checks: Path, *, tiny: bool) -> list[Step]:
    """What is run, in order. checks: folder for what each verification writes."""

    def op(name: str, seconds: float, per_section: float, *shapes: str) -> Step:
        arguments = ["-m", "bench.run", name, "--device", str(device), "--out", str(folder / f"{name}.json")]
        arguments += ["--plot", str(folder / f"{name}.png"), "--seconds", str(per_section)]
        arguments += ["--tiny", "--repeats", "1", "--arms", "eager", "ours", "SDPA"] if tiny else []
        label = f"{name} {' '.join(shapes)}".strip()
        return (Part(label, (*arguments, *(("--shapes", *shapes) if shapes else ())), seconds),)

    def verify(seconds: float, *groups: Sequence[str]) -> Step:
        command = ("-m", "specs_kernels.verify", "verify", "--device", str(device), "--out")
        return tuple(
            Part(f"verify {' '.join(names)}", (*command, str(checks / f"{names[0]}.json"), *names), seconds)
            for names in groups
        )

    if tiny:
        return [
            op("linear_logprob", 90, 1, "bf16 forward"),
            verify(90, ["policy_loss"], ["preference_loss"]),
            op("selective_logprob", 90, 1, "bf16 forward"),
            op("packed_attention", 90, 1, "forward"),
        ]
    alone = ("linear_logprob", "linear_loss", "selective_logprob")
    update = ("-m", "bench.update", "--device", str(device), "--out", str(folder / "update.json"))
    update += ("--seconds", "2", "--mix", "tower")  # the mixes with images
    return [
        op("linear_logprob", 230, 4, "16384x4096x131072", "8192x4096x151936"),
        verify(130, *([name] for name in alone), [name for name in kernel_ops() if name not in alone]),
        op("selective_logprob", 60, 2, "8192x151936"),
        op("packed_attention", 80, 2),
        op("linear_logprob", 100, 3, "sweep", "16384x192x512"),
        op("selective_logprob", 40, 1, "sweep", "16384x32000"),
        (Part("update", update, 60, UPDATE_NEEDS),),
    ]


class Running:
    """A part's process, with what it writes to stderr kept aside, since it is printed when the part ends."""

    def __init__(self, part: Part, seconds: float, *, resume: bool) -> None:
        self.part = part
        self.arguments = [*part.arguments, *(["--resume"] if resume else [])]
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        print(f"--- {part.name}: up to {seconds:.0f} s", flush=True)
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments], cwd=ROOT, env=environment(), stderr=self.errors, start_new_session=True
        )

    def ended(self) -> str | None:
        """How it ended; None while it runs. Its time being over ends it."""
        if self.process.poll() is not None:
            code = self.process.returncode
            return "done" if code == 0 else f"failed with exit code {code}"
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        return f"stopped after {self.seconds:.0f} s; what was written before is kept"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def kill(self) -> None:
        """With the compilers it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)

    def entry(self, ended: str) -> dict[str, Any]:
        """What gpu.json says of it."""
        stopped = ended.startswith("stopped")
        self.errors.seek(0)
        text = self.errors.read()
        self.errors.close()
        print(text, end="", file=sys.stderr, flush=True)
        entry: dict[str, Any] = {"part": self.part.name, "command": " ".join(["python", *self.arguments])}
        entry |= {"ended": ended, "exit_code": None if stopped else self.process.returncode}
        entry["seconds"] = round(self.seconds, 1)
        return entry if ended == "done" else {**entry, "stderr": text[-TAIL:]}


def environment() -> dict[str, str]:
    """The source tree first, then what was on the path, where peers may have been unpacked. Kernels are not interpreted."""
    kept = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", ".", "kernels")]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *kept])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}


def run_step(step: Step, deadline: float, started: set[Path]) -> Iterable[dict[str, Any] | None]:
    """Every part's entry as it ends, and None now and then meanwhile. started: the results that this call has begun, to which
    a later part adds.

    A benchmark that ends because it lost the GPU is begun again, as long as its time lasts.
    """
    running: list[Running] = []
    try:
        for part in step:
            lacking = missing_of(part)
            left = deadline - time.monotonic()
            if lacking or left < GRACE_SECONDS:
                yield {"part": part.name, "ended": f"not run: {lacking or 'no time was left'}"}
            else:
                running.append(begin(part, min(part.seconds, left - GRACE_SECONDS / 3), started))
        looked = time.monotonic()
        while running:
            time.sleep(POLL_SECONDS)
            if time.monotonic() - looked > COLLECT_SECONDS:
                yield None
                looked = time.monotonic()
            for one in list(running):
                ended = one.ended()
                if ended is None:
                    continue
                running.remove(one)
                yield one.entry(ended)
                left = one.deadline - time.monotonic()
                if ended != "done" and one.process.returncode == DEVICE_LOST and left > GRACE_SECONDS:
                    running.append(begin(one.part, left, started))
    finally:
        for one in running:
            one.kill()


def begin(part: Part, seconds: float, started: set[Path]) -> Running:
    """A benchmark adds to the result that this call has begun, and otherwise begins it anew."""
    benchmark = part.arguments[1:2] == ("bench.run",)
    out = Path(part.arguments[part.arguments.index("--out") + 1]) if benchmark else None
    resume = out in started and out.is_file() if out is not None else False
    if out is not None:
        started.add(out)
    return Running(part, seconds, resume=resume)


def missing_of(part: Part) -> str | None:
    """What is not installed, or too old, of what the part needs."""
    for name, least in part.needs.items():
        found = version(name)
        wanted = f"{name} >= {'.'.join(map(str, least))}" if any(least) else name
        if found is None:
            return f"{wanted} is not installed"
        if tuple(int(number) for number in found.split(".")[: len(least)] if number.isdigit()) < least:
            return f"{wanted} is needed; {found} is installed"
    return None


def collected(checks: Path) -> dict[str, Any]:
    """The verifications' documents as one: their results after each other, passed when all have come to their end and passed."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(checks.glob("*.json"))]
    shared = {key: documents[0][key] for key in ("torch", "device", "rule")} if documents else {}
    complete = bool(documents) and all(document["complete"] for document in documents)
    return {
        **shared,
        "complete": complete,
        "passed": complete and all(document["passed"] for document in documents),
        "results": [result for document in documents for result in document["results"]],
    }


def problems(folder: Path, since: float) -> list[str]:
    """What went wrong within parts: checks that failed, sections that raised, arms of ours that raised or lost the GPU."""
    found = []
    if (path := folder / "verify.json").is_file() and path.stat().st_mtime >= since:
        results = json.loads(path.read_text(encoding="utf-8"))["verify"]["results"]
        cells = ("op", "backend", "case", "dtype", "tensor", "note")
        found += ["verify: " + ", ".join(filter(None, (r[key] for key in cells))) for r in results if not r["passed"]]
    for op in OPS:
        if not (path := folder / f"{op}.json").is_file() or path.stat().st_mtime < since:
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        log = result["run"]
        found += [f"{op}, {entry['section']}: {entry['problem']}" for entry in log["failed"]]
        found += [
            f"{op}, {entry['section']}, {entry['arm']}: {entry['problem']}; the GPU was lost" for entry in log["lost"]
        ]
        found += [
            f"{op}, {section['name']}, {row['arm']}: {row['not_run']}"
            for section in result["sections"]
            for row in section["rows"]
            if section["name"] in log["sections"]
            and row["arm"].startswith("ours")
            and row.get("not_run", "").startswith("raised")
        ]
    return found


def run_all(
    steps: Sequence[Step], folder: Path, checks: Path, total: float, *, dry_run: bool = False
) -> dict[str, Any]:
    """Runs everything; gpu.json and verify.json are written again after each part."""
    deadline, since = time.monotonic() + total, time.time() - 1
    document: dict[str, Any] = {**provenance(), "dry_run": dry_run, "ended": "running", "parts": [], "problems": []}
    started: set[Path] = set()
    write_json(folder / "gpu.json", document)
    try:
        for step in steps:
            for entry in run_step(step, deadline, started):
                if any(checks.glob("*.json")):
                    write_json(folder / "verify.json", {**provenance(), "verify": collected(checks)})
                if entry is None:
                    continue
                document["parts"].append(entry)
                document["problems"] = problems(folder, since)
                write_json(folder / "gpu.json", document)
                print(f"--- {entry['part']}: {entry['ended']}", flush=True)
        document["ended"] = "done"
    except BaseException as error:
        document["ended"] = f"interrupted by {type(error).__name__}"
        raise
    finally:
        write_json(folder / "gpu.json", document)
    return document


def terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Verify and measure everything on this GPU."
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: bench/results/<gpu name>)")
    parser.add_argument("--commit", help="what the results name as their commit where git does not tell")
    parser.add_argument("--dry-run", action="store_true", help="the same flow on the CPU at tiny sizes; needs --out")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out is None:
        parser.error("--dry-run needs --out: its files are no results")
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU that PyTorch sees; nothing was measured", file=sys.stderr)
        return 2
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    device = torch.device("cpu" if options.dry_run else "cuda")
    folder = (options.out or RESULTS / device_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as checks:
        steps = plan(device, folder, Path(checks), tiny=options.dry_run)
        document = run_all(steps, folder, Path(checks), options.seconds, dry_run=options.dry_run)
    for problem in document["problems"]:
        print(f"problem: {problem}", file=sys.stderr)
    failed = [entry for entry in document["parts"] if entry.get("exit_code") not in (None, 0, DEVICE_LOST)]
    return 1 if failed or document["problems"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)  # so that the processes started here end too
    sys.exit(main())

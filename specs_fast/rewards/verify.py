"""math-verify in a process of its own, so that no expression can hang, crash or silently zero a batch.

In-process time limits of math-verify are signals: they do nothing outside the main thread, and nothing while sympy is
busy in C (``9^{9^{9^{9}}}``). Here each item has a limit that the kernel enforces on the worker
(`specs_fast.rewards.verify_worker`); an item that exceeds it costs the worker, which is restarted for the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("verify_worker.py")
WALL_MARGIN = 5.0


class Verdict(Enum):
    """What became of one comparison.

    EQUAL, DIFFERENT: decided. GOLD_UNPARSABLE: the gold answer is no mathematics. TIMEOUT, FAILED: the item used up its
    time, or its memory, or broke the parser; it counts as wrong, alone, and is reported.
    """

    EQUAL = "equal"
    DIFFERENT = "different"
    GOLD_UNPARSABLE = "gold_unparsable"
    TIMEOUT = "timeout"
    FAILED = "failed"


@dataclass(frozen=True)
class Limits:
    """Bounds of the worker.

    seconds: CPU time of one item, so that a busy machine does not change a score; four times as long on the clock.
    memory_mb: address space. startup_seconds: until a new worker has imported math-verify and passed its self-test.
    """

    seconds: float = 5.0
    memory_mb: int = 4096
    startup_seconds: float = 120.0


@dataclass
class Counts:
    """Items seen by a verifier, and how many of them it had to give up."""

    items: int = 0
    timeouts: int = 0
    failures: int = 0
    restarts: int = 0


class Verifier:
    """A bounded math-verify worker, started when first needed and after every item that costs it.

    Thread-safe; a forked child starts a worker of its own. RuntimeError when a worker cannot start or fails its
    self-test: then every item would fail, which must not look like wrong answers.
    """

    def __init__(self, limits: Limits | None = None, *, command: Sequence[str] | None = None) -> None:
        self.limits = limits or Limits()
        self.counts = Counts()
        self._command = list(command or self._default_command())
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._buffer = b""
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def compare(self, pred: str, gold: str) -> Verdict:
        """Whether the two LaTeX or plain expressions are equal, as math-verify judges it (6 decimals)."""
        status = self._ask({"op": "compare", "pred": pred, "gold": gold})
        if status == "equal":
            return Verdict.EQUAL
        if status in ("different", "pred_unparsable"):
            return Verdict.DIFFERENT
        return self._other(status, f"comparing {pred[:200]!r} with {gold[:200]!r}")

    def can_parse(self, gold: str) -> Verdict:
        """EQUAL where math-verify can read the text, else GOLD_UNPARSABLE, TIMEOUT or FAILED."""
        status = self._ask({"op": "parse", "gold": gold})
        return Verdict.EQUAL if status == "parsed" else self._other(status, f"parsing {gold[:200]!r}")

    def close(self) -> None:
        """End the worker; a later call starts another."""
        with self._lock:
            self._stop()

    def _other(self, status: str, doing: str) -> Verdict:
        if status == "gold_unparsable":
            return Verdict.GOLD_UNPARSABLE
        if status == "timeout":
            self.counts.timeouts += 1
            logger.warning("math-verify took over %g s %s; this item alone counts as wrong", self.limits.seconds, doing)
            return Verdict.TIMEOUT
        self.counts.failures += 1
        logger.warning("math-verify failed (%s) %s; this item alone counts as wrong", status, doing)
        return Verdict.FAILED

    def _ask(self, request: dict[str, str]) -> str:
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None and process.stdin is not None
            self.counts.items += 1
            line: bytes | None = b""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                line = self._read_line(4 * self.limits.seconds + WALL_MARGIN)
            if line:
                return str(json.loads(line)["status"])
            if line is None:
                process.kill()
            code = process.wait()
            self._stop()
            self.counts.restarts += 1
            if line is None or code in (-signal.SIGPROF, -signal.SIGALRM):
                return "timeout"
            return f"the worker ended with code {code}"

    def _start(self) -> None:
        self._stop()
        self._owner = os.getpid()
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
        )
        line = self._read_line(self.limits.startup_seconds)
        hello: dict[str, Any] = json.loads(line) if line else {}
        if hello.get("status") != "equal":
            self._process.kill()
            self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip()[-1000:]
            self._stop()
            raise RuntimeError(
                f"the math-verify worker {'failed its self-test' if line else 'could not start'} within "
                f"{self.limits.startup_seconds:g} s and {self.limits.memory_mb} MB: {hello or said or 'no output'}. "
                "Check that math-verify is installed, or raise the limits"
            )
        if not hello.get("memory_limited", False):
            logger.warning("this system does not let the math-verify worker bound its memory")

    def _read_line(self, seconds: float) -> bytes | None:
        """One line of the worker; empty when it ended, None when the time is up."""
        process = self._process
        assert process is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            block = os.read(process.stdout.fileno(), 65536)
            if not block:
                return b""
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _stop(self) -> None:
        process, self._process, self._buffer = self._process, None, b""
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self._owner == os.getpid() and process.poll() is None:
            process.kill()
            process.wait()

    def _default_command(self) -> list[str]:
        return [
            sys.executable, "-P", "-W", "ignore", str(WORKER),
            f"--seconds={self.limits.seconds}", f"--memory-mb={self.limits.memory_mb}",
        ]  # fmt: skip


_shared: Verifier | None = None
_shared_lock = threading.Lock()


def shared_verifier() -> Verifier:
    """The verifier of this program; its worker ends with the program."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close)
        return _shared

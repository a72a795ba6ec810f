"""The process that runs math-verify: JSON lines in, JSON lines out. Run as a script by `specs_fast.rewards.verify`.

Requests: ``{"op": "compare", "pred": str, "gold": str}`` and ``{"op": "parse", "gold": str}``; replies: ``{"status": str}``.
One request at a time, in the main thread, with math-verify's own time limits off: they are alarms that Python code
must get round to handling. Here the kernel ends the process, whatever it is computing, when one request has used its
CPU seconds (SIGPROF) or four times as many seconds of the clock (SIGALRM); the parent then starts another.

Imports nothing of specs_fast, so that a restart takes half a second. Only LaTeX is parsed, by a grammar: math-verify's
plain-expression parser, which evaluates Python, is not used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

WALL_FACTOR = 4.0


def limit_memory(megabytes: int) -> bool:
    """Bound the address space; False where the system does not allow it."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
    except (ValueError, OSError):
        return False
    return True


class Clock:
    """Ends this process when more than ``seconds`` of CPU are used between ``start`` and ``stop``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        for name in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(name, signal.SIG_DFL)

    def start(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * self.seconds)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def parsed(text: str) -> list[Any]:
    """math-verify's readings of a LaTeX text, none where it has none."""
    from math_verify import LatexExtractionConfig, parse

    marked = text if "$" in text or r"\boxed" in text else f"${text}$"
    found = parse(
        marked,
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=False,
    )
    return list(found)


def answer(request: dict[str, Any]) -> str:
    """One of equal, different, pred_unparsable, gold_unparsable, parsed."""
    from math_verify import verify

    gold = parsed(request["gold"])
    if not gold:
        return "gold_unparsable"
    if request["op"] == "parse":
        return "parsed"
    pred = parsed(request["pred"])
    if not pred:
        return "pred_unparsable"
    same = verify(gold, pred, timeout_seconds=None, raise_on_error=False)
    return "equal" if same else "different"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--memory-mb", type=int, required=True)
    options = arguments.parse_args()
    # Replies go through a private copy of stdout: what a library prints must not land among them.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    memory_limited = limit_memory(options.memory_mb)
    check = answer({"op": "compare", "pred": r"\frac{1}{2}", "gold": "0.5"})
    print(json.dumps({"status": check, "memory_limited": memory_limited}), file=replies, flush=True)
    clock = Clock(options.seconds)
    for line in sys.stdin:
        clock.start()
        try:
            status = answer(json.loads(line))
        except MemoryError:
            status = "out_of_memory"
        except Exception as error:  # whatever sympy raises on odd input concerns this item alone
            status = f"error: {type(error).__name__}: {error}"[:300]
        clock.stop()
        print(json.dumps({"status": status}), file=replies, flush=True)


if __name__ == "__main__":
    main()

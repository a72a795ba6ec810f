"""Progress of anything longer than a few seconds: count, rate, time left, latest metrics.

Stages take a ``Progress`` and know nothing of terminals; ``SILENT`` is their default. The command line passes
``console_progress()``: a live bar on a terminal, a line every ten seconds where output goes to a file or a CI log::

    with progress.track("zero", total=80) as task:
        for batch in batches:
            task.advance(1, reward=0.73, entropy=0.21)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress


class Task(Protocol):
    """Something that is being counted."""

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Count ``n`` more; ``metrics`` are the latest values to show next to the count."""


class Progress(Protocol):
    """Where a stage reports how far it is."""

    def track(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task of ``total`` counts (None: not known beforehand), shown until the block ends. Tasks may nest."""

    def say(self, message: str) -> None:
        """Show one line that stays."""


class _SilentTask:
    def advance(self, n: int = 1, **metrics: float) -> None:
        pass


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, message: str) -> None:
        pass


SILENT: Progress = NoProgress()


class _LineTask:
    def __init__(self, owner: LineProgress, description: str, total: int | None) -> None:
        self.owner = owner
        self.description = description
        self.total = total
        self.count = 0
        self.metrics: dict[str, float] = {}
        self.started = self.printed = owner.clock()

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.count += n
        self.metrics.update(metrics)
        now = self.owner.clock()
        if now - self.printed >= self.owner.interval:
            self.printed = now
            self.owner.say(self._line(now))

    def _line(self, now: float) -> str:
        elapsed = now - self.started
        parts = [f"{self.description}: {count_text(self.count, self.total)}", rate_text(self.count, elapsed)]
        if self.total is not None and 0 < self.count < self.total:
            parts.append(f"{duration_text(elapsed * (self.total - self.count) / self.count)} left")
        return "  ".join([*parts, metrics_text(self.metrics)]).rstrip()

    def finish(self, done: bool) -> None:
        elapsed = self.owner.clock() - self.started
        count = count_text(self.count, self.total)
        how = "done" if done else "stopped"
        text = f"{self.description}: {count} {how} in {duration_text(elapsed)}  {rate_text(self.count, elapsed)}"
        self.owner.say(f"{text}  {metrics_text(self.metrics)}".rstrip())


class LineProgress:
    """A line every ``interval`` seconds and one at the end of each task, flushed: for logs.

    ``clock`` returns seconds and only ever grows.
    """

    def __init__(self, stream: TextIO, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.interval = interval
        self.clock = clock

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Task]:
        task = _LineTask(self, description, total)
        done = False
        try:
            yield task
            done = True
        finally:
            task.finish(done)

    def say(self, message: str) -> None:
        print(message, file=self.stream, flush=True)


class _BarTask:
    def __init__(self, bars: RichProgress, description: str, total: int | None) -> None:
        self.bars = bars
        self.metrics: dict[str, float] = {}
        self.id = bars.add_task(description, total=total, metrics="", rate="")
        self.started = time.monotonic()

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.metrics.update(metrics)
        count = self.bars.tasks[self.bars.task_ids.index(self.id)].completed + n
        rate = rate_text(int(count), time.monotonic() - self.started)
        self.bars.update(self.id, advance=n, metrics=metrics_text(self.metrics), rate=rate)


class BarProgress:
    """Live bars on a terminal; an inner task's bar disappears when it ends, the outermost stays."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: RichProgress | None = None

    @contextmanager
    def track(self, description: str, total: int | None = None) -> Iterator[Task]:
        outermost = self.bars is None
        if self.bars is None:
            self.bars = _bars(self.console)
            self.bars.start()
        bars = self.bars
        task = _BarTask(bars, description, total)
        try:
            yield task
        finally:
            if outermost:
                bars.stop()
                self.bars = None
            else:
                bars.remove_task(task.id)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)


def _bars(console: Console) -> RichProgress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", markup=False, style="dim"),
        console=console,
    )


def console_progress(stream: TextIO | None = None) -> Progress:
    """Bars where ``stream`` (default: stderr) is a terminal, lines where it is not."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        return LineProgress(stream)
    from rich.console import Console

    return BarProgress(Console(file=stream))


def count_text(count: int, total: int | None) -> str:
    """``12/80``, or ``12`` where the total is not known."""
    return str(count) if total is None else f"{count}/{total}"


def rate_text(count: int, seconds: float) -> str:
    """``3.1/s``, or ``4.2 s each`` below one per second; empty before anything was counted."""
    if count <= 0 or seconds <= 0:
        return ""
    rate = count / seconds
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


def duration_text(seconds: float) -> str:
    """``0.4 s``, ``18 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metrics_text(metrics: dict[str, float]) -> str:
    """``reward=0.73 entropy=0.21``."""
    return " ".join(f"{name}={value:.3g}" for name, value in metrics.items())

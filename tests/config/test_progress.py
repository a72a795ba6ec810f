"""Progress: what a log gets, what a terminal gets, and that a stage may run without either."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from specs_fast.progress import (
    SILENT,
    BarProgress,
    LineProgress,
    console_progress,
    duration_text,
    rate_text,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_interval_with_rate_time_left_and_latest_metrics() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, interval=10, clock=clock)
    with progress.track("zero", 80) as task:
        for step in range(20):
            clock.now += 1.0
            task.advance(1, reward=step / 10)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "zero: 10/80  1/s  1 min 10 s left  reward=0.9"
    assert lines[1] == "zero: 20/80  1/s  1 min 00 s left  reward=1.9"
    assert lines[2] == "zero: 20/80 done in 20 s  1/s  reward=1.9"
    assert len(lines) == 3


def test_a_task_without_a_total_counts_and_shows_no_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with LineProgress(stream, interval=1, clock=clock).track("rows") as task:
        clock.now += 4
        task.advance(2)
    assert stream.getvalue().splitlines()[0] == "rows: 2  2 s each"


def test_a_task_that_raises_says_stopped_and_the_error_passes() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="boom"), LineProgress(stream).track("zero", 3) as task:
        task.advance()
        raise RuntimeError("boom")
    assert stream.getvalue().startswith("zero: 1/3 stopped in ")


def test_bars_nest_and_leave_only_the_outermost() -> None:
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=160))
    with progress.track("outer", 2) as outer:
        for _ in range(2):
            with progress.track("inner [1]", 3) as inner:
                inner.advance(3, loss=math.pi)
            progress.say("a [bold] line")
            outer.advance()
    text = stream.getvalue()
    assert "a [bold] line" in text
    last = text.split("\x1b[2K")[-1]
    assert "outer" in last and "2/2" in last and "inner" not in last
    assert progress.bars is None


def test_bars_stop_when_the_work_raises() -> None:
    progress = BarProgress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError), progress.track("outer", 2):
        raise RuntimeError
    assert progress.bars is None
    with progress.track("again", 1) as task:
        task.advance()


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    assert isinstance(console_progress(io.StringIO()), LineProgress)


def test_silent_accepts_everything() -> None:
    with SILENT.track("x", 3) as task:
        task.advance(2, **{"completions/mean_length": 3.0})
    SILENT.say("nothing")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "seconds", "text"), [(0, 3, ""), (3, 0, ""), (100, 8, "12.5/s"), (2, 9, "4.5 s each")]
)
def test_rates(count: int, seconds: float, text: str) -> None:
    assert rate_text(count, seconds) == text

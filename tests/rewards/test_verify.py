"""A parse that hangs, dies or eats memory costs its own item and nothing else."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from specs_fast.rewards import accuracy, verify
from specs_fast.rewards.accuracy import accuracy_reward, check_gold
from specs_fast.rewards.compose import RewardSet
from specs_fast.rewards.verify import WORKER, Limits, Verdict, Verifier

HANGING = "9^{9^{9^{9}}}"  # sympy computes this power in C, where no Python signal handler runs


@pytest.fixture(scope="module")
def quick() -> Iterator[Verifier]:
    """The real worker with one second per item."""
    verifier = Verifier(Limits(seconds=1))
    yield verifier
    verifier.close()


@pytest.fixture
def shared_quick(quick: Verifier, monkeypatch: pytest.MonkeyPatch) -> Verifier:
    accuracy._compare_once.cache_clear()
    monkeypatch.setattr(accuracy, "shared_verifier", lambda: quick)
    return quick


def fake(tmp_path: Path, body: str) -> list[str]:
    """A worker that greets and then runs ``body`` for each request line."""
    hello = 'print(json.dumps({"status": "equal", "memory_limited": True}), flush=True)'
    path = tmp_path / "worker.py"
    path.write_text(f"import json, os, sys, time\n{hello}\nfor line in sys.stdin:\n    {body}\n", encoding="utf-8")
    return [sys.executable, str(path)]


def test_a_hanging_parse_costs_one_completion_of_a_batch_and_is_counted(
    shared_quick: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [r"\sqrt{4}", HANGING, "2^1", "3^1", HANGING, "2"]
    texts = [f"<think> so . </think> <answer> {answer} </answer>" for answer in answers]
    before = shared_quick.counts.timeouts
    logged: dict[str, float] = {}
    with caplog.at_level(logging.WARNING):
        rewards = accuracy_reward([None] * 6, texts, ["2"] * 6, log_metric=logged.__setitem__)
    assert rewards == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert logged == {"verify/timeouts": 2.0, "verify/failures": 0.0}
    assert shared_quick.counts.timeouts == before + 1  # the second one was remembered
    assert HANGING in caplog.text and "this item alone counts as wrong" in caplog.text


def test_a_reward_set_counts_timeouts_over_its_life(shared_quick: Verifier) -> None:
    rewards = RewardSet({"accuracy": accuracy_reward})
    text = f"<answer> {HANGING} </answer>"
    for _ in range(2):
        result = rewards.score([None, None], [text, "<answer> 2 </answer>"], {"answer": ["2", "2"]})
        assert result.total.tolist() == [0.0, 1.0] and result.metrics["verify/timeouts"] == 1.0
    assert rewards.timeouts == 2


def test_a_gold_that_hangs_is_refused_at_load_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "shared_verifier", TimeoutVerifier)
    with pytest.raises(ValueError, match="takes too long to parse"):
        check_gold("2x + 3")


class TimeoutVerifier(Verifier):
    def can_parse(self, gold: str) -> Verdict:
        return Verdict.TIMEOUT


def test_running_out_of_memory_costs_one_item() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("worker", {str(WORKER)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
real = worker.answer
worker.answer = lambda request: str(len(bytes(10**9))) if request["pred"] == "big" else real(request)
sys.argv = ["worker", "--seconds=5", "--memory-mb=512"]
worker.main()
"""
    verifier = Verifier(command=[sys.executable, "-P", "-W", "ignore", "-c", code])
    verdicts = [verifier.compare(text, "8") for text in ("2^3", "big", "2^3", "2^4")]
    assert verdicts == [Verdict.EQUAL, Verdict.FAILED, Verdict.EQUAL, Verdict.DIFFERENT]
    assert verifier.counts.failures == 1
    verifier.close()


def test_a_worker_that_dies_costs_one_item(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = 'os._exit(3) if "die" in line else print(json.dumps({"status": "equal"}), flush=True)'
    verifier = Verifier(command=fake(tmp_path, body))
    assert [verifier.compare(text, "1") for text in ("a", "die", "b")] == [Verdict.EQUAL, Verdict.FAILED, Verdict.EQUAL]
    assert verifier.counts.failures == verifier.counts.restarts == 1
    assert "ended with code 3" in caplog.text
    verifier.close()


def test_a_worker_that_waits_without_computing_is_ended_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "WALL_MARGIN", 0.1)
    body = 'time.sleep(1000) if "wait" in line else print(json.dumps({"status": "different"}), flush=True)'
    verifier = Verifier(Limits(seconds=0.05), command=fake(tmp_path, body))
    assert verifier.compare("wait", "1") is Verdict.TIMEOUT
    assert verifier.compare("go", "1") is Verdict.DIFFERENT
    verifier.close()


def test_an_error_of_the_parser_costs_one_item_and_keeps_the_worker(tmp_path: Path) -> None:
    verifier = Verifier(command=fake(tmp_path, 'print(json.dumps({"status": "error: Boom"}), flush=True)'))
    assert verifier.compare("1", "1") is Verdict.FAILED
    assert (verifier.counts.failures, verifier.counts.restarts) == (1, 0)
    verifier.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ('print("{\\"status\\": \\"different\\"}", flush=True)', "self-test"),
        ("import time; time.sleep(100)", "could not start"),
    ],
)
def test_a_worker_that_cannot_work_is_an_error_and_no_wrong_answer(code: str, message: str) -> None:
    seconds = 0.3 if "sleep" in code else 60
    verifier = Verifier(Limits(startup_seconds=seconds), command=[sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match="math-verify worker") as caught:
        verifier.compare("1", "1")
    assert message in str(caught.value)


def test_too_little_memory_to_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="40 MB"):
        Verifier(Limits(memory_mb=40)).compare("1", "1")


def test_it_works_in_threads_where_math_verify_itself_refuses_to(quick: Verifier) -> None:
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=lambda i=i: verdicts.append(quick.compare(f"{i}^1", str(i)))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [Verdict.EQUAL] * 8


def test_a_forked_child_gets_a_worker_of_its_own(quick: Verifier) -> None:
    assert quick.compare("2^2", "4") is Verdict.EQUAL
    child = os.fork()
    if child == 0:
        own = quick.compare("2^3", "8") is Verdict.EQUAL and quick.compare("2^3", "9") is Verdict.DIFFERENT
        quick.close()
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert quick.compare("2^4", "16") is Verdict.EQUAL


def test_closing_ends_the_worker_and_a_later_call_starts_another(quick: Verifier) -> None:
    assert quick.compare("2^5", "32") is Verdict.EQUAL
    process = quick._process
    assert process is not None
    quick.close()
    assert process.poll() is not None
    assert quick.compare("2^5", "32") is Verdict.EQUAL


def test_the_worker_ends_with_the_program_that_started_it_even_when_that_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from specs_fast.rewards.verify import Verifier\n"
        "v = Verifier(); v.compare('2^2', '4'); print(v._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker = int(done.stdout)
    waited = threading.Event()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split(")")[-1].split()[0] == "Z":
            return  # ended; its new parent has not collected it
        waited.wait(0.05)
    pytest.fail(f"worker {worker} still runs")

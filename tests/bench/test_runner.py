"""The runner's logic on made-up arms: rows, errors, failures, goals, files."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import arms
from bench import run as runner
from bench.measure import MIN_ROUNDS, Times, held_beyond_gradients, interleaved, peak_bytes
from bench.section import Arm, Case, Goal, Section
from bench.tables import section_table
from specs_fast import cli

CPU = torch.device("cpu")
EXACT = {"logp": torch.tensor([3.0, 4.0], dtype=torch.float64)}


def fails() -> dict[str, torch.Tensor]:
    raise RuntimeError("no kernel image\nand more lines")


def section(device: torch.device) -> Section:
    good = Arm("good", "lib 1", lambda: {"logp": torch.tensor([3.0, 4.0])}, bare=("gemm", "gemm"), note="a note")
    off = Arm("off", "lib 2", lambda: {"logp": torch.tensor([3.0, 4.5])})
    absent = Arm.absent("absent", "lib not installed", "not installed")
    work = torch.ones(100, 100)
    bare = {"gemm": lambda: work @ work}
    return Section([good, off, Arm("broken", "lib 3", fails), absent], bare, lambda: EXACT, flop=1e6, moved=1e3)


CASE = Case("2x8 forward", {"N": 2, "V": 8, "dtype": "fp32", "task": "forward"}, section, rounds=2)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return arms.measure(CASE, CPU, rounds=2, seconds=None, tiny=True)


def row(section: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(entry for entry in section["rows"] if entry["arm"] == arm)


def test_a_row_holds_error_time_and_share_of_the_bare_parts(measured: dict[str, Any]) -> None:
    good = row(measured, "good")
    assert good["error"] == {"logp": 0.0}
    assert row(measured, "off")["error"]["logp"] == pytest.approx(0.1)
    expected = good["milliseconds"]["median"] / (2 * measured["bare_milliseconds"]["gemm"])
    assert good["times_bare"] == pytest.approx(expected, rel=0.05)
    assert good["rounds"] == 2 and good["bare"] == ["gemm", "gemm"]
    assert "times_bare" not in row(measured, "off")


def test_an_arm_that_is_absent_or_raises_is_a_row_that_says_why(measured: dict[str, Any]) -> None:
    assert row(measured, "absent")["not_run"] == "not installed"
    assert row(measured, "broken")["not_run"] == "raised RuntimeError: no kernel image"
    assert "milliseconds" not in row(measured, "broken")


def test_a_section_carries_its_provenance(measured: dict[str, Any]) -> None:
    assert {"command", "commit", "hardware", "versions"} <= measured["measured"].keys()
    json.dumps(measured)


def test_the_table_shows_every_arm(measured: dict[str, Any]) -> None:
    table = section_table(measured)
    assert "| good " in table and "- good: a note." in table
    assert "- absent: not run, not installed." in table and "- broken: not run, raised RuntimeError" in table


def test_an_output_of_the_wrong_shape_is_no_result() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        arms.errors({"logp": torch.ones(2, 1)}, EXACT)


def test_rounds_alternate_and_stop_when_the_time_is_over() -> None:
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(functions, CPU, rounds=50, seconds=0.0)
    assert order == ["a", "b", "b", "a", "a", "b"] and MIN_ROUNDS == 3
    assert [len(values) for values in times.values()] == [3, 3]


def test_percentiles_of_times() -> None:
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Times(3.0, 1.8, 4.2, 5)
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 1)


def temporary_and_gradient() -> dict[str, torch.Tensor]:
    torch.ones(16 << 20).sum()  # 64 MiB
    gradient = torch.ones(8 << 20)  # 32 MiB
    torch.ones(4 << 20).sum()  # 16 MiB
    return {"d weight": gradient}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_peak_memory_counts_what_is_freed_within_the_call() -> None:
    temporary_and_gradient()
    peak = peak_bytes(temporary_and_gradient, CPU)
    assert peak is not None and 60 << 20 < peak < 90 << 20


def test_extra_memory_is_the_most_held_beyond_the_returned_gradients() -> None:
    extra, outputs = held_beyond_gradients(temporary_and_gradient, CPU)
    assert extra is not None and 64 << 20 <= extra < 65 << 20
    assert set(outputs) == {"d weight"}
    extra, _ = held_beyond_gradients(lambda: {"d weight": torch.ones(16 << 20)}, CPU)
    assert extra is not None and extra < 1 << 20


def stored(*rows: dict[str, Any], name: str = "s") -> dict[str, Any]:
    return {"name": name, "shape": {}, "rows": list(rows)}


def timed(arm: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "milliseconds": {"median": milliseconds}, **more}


def test_goals_are_read_from_the_rows() -> None:
    sections = [stored(timed("ours", 10.0, times_bare=1.2, extra_mib=5.0), timed("eager", 20.0, extra_mib=50.0))]
    goals = [
        Goal("s", "ours", "times_bare", 1.1),
        Goal("s", "ours", "milliseconds", 11.0),
        Goal("s", "ours", "memory_of:eager", 0.2),
        Goal("s", "ours", "times_faster_than:eager", 1.5, at_most=False),
        Goal("s", "absent", "times_bare", 1.1),
        Goal("other", "ours", "times_bare", 1.1),
    ]
    judged = runner.judged(goals, sections)
    assert [goal["measured"] for goal in judged] == [1.2, 10.0, 0.1, 2.0, None, None]
    assert [goal["met"] for goal in judged] == [False, True, True, True, None, None]


def test_a_new_section_replaces_its_namesake_only() -> None:
    old = [stored(timed("ours", 1.0), name="a"), stored(timed("ours", 2.0), name="b")]
    new = stored(timed("ours", 3.0), name="a")
    assert runner.merged(old, new) == [new, old[1]]
    assert runner.merged(old, {**new, "name": "c"})[2]["name"] == "c"


def options(out: Path, **more: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = dict.fromkeys(("threads", "seconds", "shapes", "arms", "plot"))
    return SimpleNamespace(
        **{**defaults, "op": "made_up", "device": "cpu", "repeats": 2, "list": False, "no_write": False, "tiny": False}
        | {"resume": False, "out": out}
        | more
    )


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An op of two sections."""
    module = SimpleNamespace(
        WHAT="made up",
        cases=lambda device, tiny: [CASE, Case("4x8 forward", {**CASE.shape, "N": 4}, section, 2)],
        goals=lambda device: [Goal("2x8 forward", "good", "times_bare", 1e9)],
    )
    monkeypatch.setattr(runner, "load", lambda op: module)
    monkeypatch.setattr("bench.measure.COPY_BYTES", 1 << 20)
    monkeypatch.setattr("bench.arms.gc.collect", lambda: 0)
    return ["2x8 forward", "4x8 forward"]


def test_a_run_of_one_section_keeps_the_others_of_the_file(
    made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made_up.json"
    runner.run(options(path))
    first = json.loads(path.read_text())
    runner.run(options(path, shapes=["4x8"], repeats=3))
    second = json.loads(path.read_text())
    assert [entry["name"] for entry in second["sections"]] == made_up
    assert second["sections"][0] == first["sections"][0]
    assert row(second["sections"][1], "good")["rounds"] == 3
    assert second["goals"][0]["met"] is True
    assert "2x8 forward: good, times_bare <= 1e+09" in capsys.readouterr().out


def test_nothing_is_written_when_not_asked_for(made_up: list[str], tmp_path: Path) -> None:
    runner.run(options(tmp_path / "x.json", no_write=True))
    assert not list(tmp_path.iterdir())


def test_arms_can_be_picked(made_up: list[str], tmp_path: Path) -> None:
    result = runner.run(options(tmp_path / "x.json", arms=["good"], shapes=["2x8"]))
    assert [entry["arm"] for entry in result["sections"][0]["rows"]] == ["good"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shapes": ["nothing"]}, "no section's name contains that; sections: 2x8 forward; 4x8 forward"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: cpu, cuda"),
        ({"device": "cuda:99"}, "--device is 'cuda:99', but PyTorch sees"),
        ({"threads": 0}, "--threads is 0; it must be at least 1"),
        ({"repeats": 0}, "--repeats is 0; it must be above 0"),
        ({"arms": ["nothing"]}, "--arms nothing: no arm's name contains that in: 2x8 forward; 4x8 forward"),
        ({"out": Path(__file__)}, "test_runner.py, which is no result of this program; move it away or name another"),
        ({"out": Path(__file__).parent}, "bench, a folder; name a file"),
    ],
)
def test_bad_options_are_refused(made_up: list[str], tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(runner.BadOption) as error:
        runner.run(options(**{"out": tmp_path / "x.json"} | bad))
    assert message in str(error.value)


def test_a_bad_option_of_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "linear_logprob", "--shapes", "nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --shapes nothing: no section's name contains that; sections: 512x896x151936 fp32")


def failing(device: torch.device) -> Section:
    raise RuntimeError("no room for the inputs")


def test_a_section_that_fails_costs_no_other_and_is_said(
    made_up: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runner.load("made_up")
    cases = module.cases(CPU, tiny=False)
    monkeypatch.setattr(module, "cases", lambda device, tiny: [Case("bad", CASE.shape, failing, 2), *cases])
    runner.run(options(tmp_path / "x.json"))
    result = json.loads((tmp_path / "x.json").read_text())
    assert [entry["name"] for entry in result["sections"]] == made_up
    assert result["run"]["failed"] == [{"section": "bad", "problem": "raised RuntimeError: no room for the inputs"}]
    assert runner.exit_code(result) == runner.FAILED


def test_an_arm_that_raises_while_timed_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def later() -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return {"logp": torch.tensor([3.0, 4.0])}

    def with_later(device: torch.device) -> Section:
        built = section(device)
        built.arms.append(Arm("later", "lib", later, note="a note"))
        return built

    measured = arms.measure(Case("s", CASE.shape, with_later, 5), CPU, rounds=5, seconds=None, tiny=True)
    assert measured is not None
    assert row(measured, "later") == {"arm": "later", "library": "lib", "not_run": "raised RuntimeError: out of memory"}
    assert row(measured, "good")["rounds"] == 5


def test_a_lost_device_ends_the_run_and_resume_goes_on_without_the_arm(
    made_up: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last arm of the first section leaves nothing usable; it stays out from then on, in every section."""
    path = tmp_path / "x.json"
    monkeypatch.setattr(arms, "usable", lambda device: False)
    lost = runner.run(options(path))
    assert runner.exit_code(lost) == runner.DEVICE_LOST and lost["sections"] == []
    entry = {"section": "2x8 forward", "arm": "broken", "problem": "raised RuntimeError: no kernel image"}
    assert json.loads(path.read_text())["run"]["lost"] == [entry]
    result = runner.run(options(path, resume=True))
    assert runner.exit_code(result) == 0 and [entry["name"] for entry in result["sections"]] == made_up
    for measured in result["sections"]:
        assert row(measured, "broken")["not_run"] == "raised RuntimeError: no kernel image, in 2x8 forward"
        assert "milliseconds" in row(measured, "good")
    before = path.read_text()
    runner.run(options(path, resume=True))  # nothing is left to do
    assert path.read_text() == before
    assert runner.run(options(path, shapes=["2x8"], arms=["good"]))["run"]["lost"] == []


def test_an_arm_that_does_not_return_is_reported_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "ARM_SECONDS", 0.01)
    reported = threading.Event()
    with arms.watched("slow", torch.device("cuda"), lambda arm: reported.set() if arm == "slow" else None):
        assert reported.wait(20)
    monkeypatch.setattr(arms, "ARM_SECONDS", 1000.0)
    with arms.watched("quick", torch.device("cuda"), lambda arm: reported.clear()):
        pass
    assert reported.is_set()


def test_the_command_lists_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "linear_logprob", "--list"]) == 0
    assert "512x896x151936 fp32 train" in capsys.readouterr().out.splitlines()


def test_the_command_needs_a_source_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a source checkout"):
        cli.source_package("bench", tmp_path)

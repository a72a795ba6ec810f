"""The command line: what it runs and skips, what it refuses, and that mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from specs_fast.cli import main
from specs_fast.config import load_config

CALLS = Any  # Calls of conftest.py


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_run_builds_the_lab_trains_evaluates_and_reports(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe]) == 0
    evaluations = ["eval base", "eval zero", "eval coldstart", "eval final"]
    assert calls.take() == ["lab", "zero", "coldstart", "final", *evaluations]
    out = capsys.readouterr().out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in out
    assert "cold start" in out and "50.0 ±" in out and "75.0 ±" in out
    run_dir = tmp_path / "run"
    assert (run_dir / "report.html").stat().st_size > 10_000
    info = json.loads((run_dir / "run.json").read_text())
    assert {"started", "finished", "versions", "machine", "config_hash", "command", "base_model"} <= set(info)
    assert set(info["seconds"]) == {"lab", "evaluation"}
    assert info["versions"]["torch"] == torch.__version__


def test_the_stages_get_the_labs_files_and_the_folder_keeps_what_was_asked(
    calls: CALLS, recipe: str, tmp_path: Path
) -> None:
    assert main(["run", recipe]) == 0
    lab = tmp_path / "run" / "lab"
    assert calls.config.model.path == str(lab / "base")
    assert calls.config.data.train == str(lab / "train.jsonl")
    assert calls.config.eval.splits == {"id": str(lab / "eval_id.jsonl")}
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(recipe)


def test_the_same_command_again_does_only_what_is_missing(calls: CALLS, recipe: str, tmp_path: Path) -> None:
    calls.fail_in = "coldstart"
    assert main(["run", recipe]) == 130
    assert calls.take() == ["lab", "zero", "coldstart"]
    calls.fail_in = "eval zero"
    assert main(["run", recipe]) == 130
    assert calls.take() == ["lab", "coldstart", "final", "eval base", "eval zero"]
    calls.fail_in = None
    assert main(["run", recipe]) == 0
    assert calls.take() == ["lab", "eval zero", "eval coldstart", "eval final"]
    assert main(["run", recipe]) == 0
    assert calls.take() == ["lab"]


def test_other_evaluation_settings_or_files_evaluate_again_and_train_nothing(
    calls: CALLS, recipe: str, tmp_path: Path
) -> None:
    assert main(["run", recipe]) == 0
    calls.take()
    evaluations = ["eval base", "eval zero", "eval coldstart", "eval final"]
    assert main(["run", recipe, "eval.samples=3", "threads=1", "name=again"]) == 0
    assert calls.take() == ["lab", *evaluations]
    assert load_config(tmp_path / "run" / "config.yaml").eval.samples == 3
    marker = tmp_path / "run" / "eval" / "zero.DONE.json"
    marker.unlink()
    assert main(["run", recipe, "eval.samples=3"]) == 0
    assert calls.take() == ["lab", "eval zero"]
    (tmp_path / "run" / "final" / "model.safetensors").write_text("other weights")
    assert main(["run", recipe, "eval.samples=3"]) == 0
    assert calls.take() == ["lab", "eval final"]


def test_a_folder_of_another_configuration_is_refused_naming_the_keys(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe]) == 0
    calls.take()
    before = (tmp_path / "run" / "config.yaml").read_text()
    message = fails(capsys, "run", recipe, "zero.optim.lr=2e-4", "seed=5")
    assert "zero.optim.lr: 0.0001 -> 0.0002" in message and "seed: 0 -> 5" in message
    assert "output_dir=" in message and "delete" in message
    assert calls.take() == []
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_start_that_finished_no_stage_may_be_corrected(calls: CALLS, recipe: str, tmp_path: Path) -> None:
    calls.fail_in = "zero"
    assert main(["run", recipe]) == 130
    calls.fail_in = None
    assert main(["run", recipe, "zero.optim.lr=2e-4"]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").zero.optim.lr == 2e-4


def test_a_folder_whose_configuration_cannot_be_read_is_refused(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "zero").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("from_the_future: 1\n")
    message = fails(capsys, "run", recipe)
    assert "from_the_future" in message and "delete" in message


def test_overrides_may_stand_anywhere_and_print_config_runs_nothing(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe, "zero.steps=7", "--print-config", "--final.optim.lr=1e-5", "seed=3"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config(printed)
    assert (config.zero.steps, config.final.optim.lr, config.seed) == (7, 1e-5, 3)
    assert calls.take() == [] and not (tmp_path / "run").exists()


def test_threads_and_seed_are_set(calls: CALLS, recipe: str) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["run", recipe, "threads=1", "seed=11"]) == 0
        assert torch.get_num_threads() == 1
        assert torch.initial_seed() == 11
    finally:
        torch.set_num_threads(threads)


def test_a_run_without_evaluation_splits_says_so(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["lab=null", f"model.path={tmp_path / 'base'}", "data.train=train.jsonl"]
    assert main(["run", recipe, *own]) == 0
    captured = capsys.readouterr()
    assert calls.take() == ["zero", "coldstart", "final"]
    assert "eval.splits is empty" in captured.err and "no evaluation" in captured.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "{recipe}", "zero.stepz=3"], "did you mean 'steps'"),
        (["run", "{recipe}", "zero.steps=many"], "'many' is a text"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["eval", "model", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["eval", "model", "--data", "a/x.jsonl", "b/x.jsonl"], "same name"),
        (["eval", "model", "--data", "{recipe}", "--samples", "2", "--pass-k", "4"], "pass_k"),
        (["eval", "model", "--data", "{recipe}", "--temperature", "0"], "temperature"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    calls: CALLS, recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    message = fails(capsys, *[argument.replace("{recipe}", recipe) for argument in arguments])
    assert message.startswith("error: ") and part in message


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["run"], ["run", "r.yaml", "--bogus"], ["doctor", "x=1"], ["eval", "m"]]
)
def test_a_usage_error_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: specs-fast" in capsys.readouterr().err


def test_the_traceback_is_shown_when_asked_for(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECS_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="stepz"):
        main(["run", recipe, "zero.stepz=3"])


def test_functions_named_by_import_path_may_lie_in_the_current_directory(
    calls: CALLS, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["run", recipe]) == 0 and str(tmp_path) not in sys.path
    own = ["output_dir=own", "rewards=[{name: accuracy}, {name: 'my_rewards:short'}]"]
    assert main(["run", recipe, *own]) == 0 and sys.path[-1] == str(tmp_path)


def test_a_gradient_that_is_not_finite_is_one_line(
    calls: CALLS, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverged(*_: object) -> None:
        raise FloatingPointError("gradient norm is nan at optimizer step 3")

    monkeypatch.setattr("specs_fast.methods.specs.run", diverged)
    assert "gradient norm is nan" in fails(capsys, "run", recipe)


def test_a_bug_is_not_dressed_up_as_a_mistake(calls: CALLS, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specs_fast.cli.show", lambda run_dir: {}["nothing"])
    with pytest.raises(KeyError):
        main(["run", recipe])


def test_eval_writes_the_file_and_prints_the_table(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "mine.jsonl"
    questions.write_text("{}\n")
    assert main(["eval", str(tmp_path / "model"), "--data", str(questions), "--samples", "8"]) == 0
    out = capsys.readouterr().out
    assert "mine: 2 held-out questions" in out and "75.0 ±" in out and "change" not in out
    written = json.loads((tmp_path / "eval" / "model.json").read_text())
    assert written["settings"] == {"samples": 8}


HOLDER = """
import sys, time
from pathlib import Path
from specs_fast.cli import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_share_a_run_folder_and_a_killed_one_holds_nothing(
    calls: CALLS, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = fails(capsys, "run", recipe)
        assert f"pid {holder.pid}" in message and "output_dir" in message
        assert calls.take() == []
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert main(["run", recipe]) == 0


def test_a_child_of_a_killed_run_does_not_keep_the_folder(calls: CALLS, recipe: str, tmp_path: Path) -> None:
    code = HOLDER.replace(
        '    print("held", flush=True)', "    import os\n    if child := os.fork(): os.write(1, b'%d\\n' % child)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)
        assert main(["run", recipe]) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_output_into_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "specs_fast", "doctor", "--json"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")

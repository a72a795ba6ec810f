"""The command line end to end: a whole run, a run killed in every stage, TRL on its pair file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specs_fast.data.rows import load_pairs, load_prompts
from specs_fast.models.load import load_model, load_processor
from specs_fast.rewards.format import parse_response

RECIPE = Path(__file__).with_name("mini-specs.yaml")
STARTER = """
import json, os, sys
import specs_fast.evals.run, specs_fast.lab, specs_fast.methods.specs, specs_fast.report
from specs_fast import cli

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["specs-fast", *json.loads(line)]
        sys.stdout = sys.stderr
        os._exit(cli.main(sys.argv[1:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Each line of its input is a command in a process of its own; the imports, most of what a short run costs, are made once."""
CHECKPOINTS = ("zero", "coldstart", "final")


def command(run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "specs_fast", *arguments(run_dir, *overrides)]


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    return ["run", str(RECIPE), f"output_dir={run_dir}", *overrides]


class Starter:
    """Starts commands one after the other, each to be waited for or killed."""

    def __init__(self, stderr: Path) -> None:
        self.stderr = stderr
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr.open("w"),
            text=True,
        )

    def start(self, command: list[str]) -> int:
        """Process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Exit code of the command that was started last; negative for a signal."""
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.stderr.read_text()
        return int(line)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("starter") / "stderr.txt")
    yield starter
    starter.process.communicate()


def artefacts(run_dir: Path) -> dict[str, str]:
    """Hashes of everything a run promises to reproduce; metrics without their timings."""
    found = {}
    for name in CHECKPOINTS:
        found[name] = hashlib.sha256((run_dir / name / "model.safetensors").read_bytes()).hexdigest()
        rows = [json.loads(line) for line in (run_dir / name / "metrics.jsonl").read_text().splitlines()]
        found[f"{name}/metrics"] = json.dumps([{k: v for k, v in row.items() if "time" not in k} for row in rows])
    found["pairs"] = (run_dir / "pairs" / "pairs.jsonl").read_text()
    for model in ("base", *CHECKPOINTS):
        found[f"eval/{model}"] = json.dumps(json.loads((run_dir / "eval" / f"{model}.json").read_text())["splits"])
    return found


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(command(run_dir), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir / "stdout.txt").write_text(done.stdout)
    yield run_dir


def test_a_run_leaves_loadable_checkpoints_pairs_evaluation_and_report(whole_run: Path) -> None:
    for name in CHECKPOINTS:
        model = load_model(whole_run / name)
        assert sum(p.numel() for p in model.parameters()) < 4_000_000
        assert load_processor(whole_run / name).image_processor is not None
    out = (whole_run / "stdout.txt").read_text().lower()
    assert all(word in out for word in ("base", "zero", "cold", "final", "report.html"))
    page = (whole_run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page


def test_pairs_are_decoupled_correct_on_both_sides_and_differ_in_form(whole_run: Path) -> None:
    pairs = load_pairs(whole_run / "pairs" / "pairs.jsonl")
    counts = json.loads((whole_run / "pairs" / "yield.json").read_text())
    assert len(pairs) == counts["pairs"] > 0
    assert counts["zero"]["sampled"] == 48 * 4 >= counts["zero"]["correct"] >= counts["zero"]["format"]
    for pair in pairs:
        assert parse_response(pair.chosen, pair.prompt.tags).ok
        assert not parse_response(pair.rejected, pair.prompt.tags).ok


def test_the_same_command_again_does_nothing_anew(whole_run: Path, starter: Starter) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*.safetensors")}
    starter.start(arguments(whole_run))
    assert starter.wait() == 0, starter.stderr.read_text()
    assert before == {path: path.stat().st_mtime_ns for path in whole_run.rglob("*.safetensors")}


def test_a_run_folder_of_another_configuration_is_refused(whole_run: Path) -> None:
    done = subprocess.run(command(whole_run, "zero.steps=4"), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "zero.steps" in done.stderr and "Traceback" not in done.stderr


def test_killed_in_every_stage_and_started_again_ends_with_the_same_artefacts(
    whole_run: Path, starter: Starter, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    for stage in ("zero", "pairs", "coldstart", "final", "eval"):
        watched = run_dir / ("eval" if stage == "eval" else f"{stage}.partial")
        process = starter.start(arguments(run_dir))
        deadline = time.monotonic() + 120
        while not watched.exists() and alive(process) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert alive(process), f"the run ended before {watched} was seen: {starter.stderr.read_text()}"
        os.kill(process, signal.SIGKILL)
        assert starter.wait() == -signal.SIGKILL
        assert not (run_dir / stage / "DONE.json").exists()
    starter.start(arguments(run_dir))
    assert starter.wait() == 0, starter.stderr.read_text()
    expected, found = artefacts(whole_run), artefacts(run_dir)
    assert [key for key in expected if expected[key] != found[key]] == []
    assert (run_dir / "report.html").exists() and not list(run_dir.glob("*.partial"))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def documented_loader() -> Any:
    """The loader printed in docs/data.md, run as it stands; at most ten lines."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def load_pairs" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["load_pairs"]


def test_trl_takes_a_dpo_step_on_the_pair_file(whole_run: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the trl extra is not installed")
    model = load_model(whole_run / "lab" / "base")
    before = model.lm_head.weight.detach().clone()
    settings = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=model,
        args=settings,
        train_dataset=documented_loader()(whole_run / "pairs" / "pairs.jsonl"),
        processing_class=load_processor(whole_run / "lab" / "base"),
    )
    result = trainer.train()
    assert abs(result.training_loss - 0.6931) < 1e-3
    assert (model.lm_head.weight.detach().cpu() - before).abs().max() > 0


def test_prompts_of_the_run_are_ordinary_rows(whole_run: Path) -> None:
    prompts = load_prompts(whole_run / "lab" / "train.jsonl")
    assert len(prompts) == 48 and all(len(prompt.images) == 1 for prompt in prompts)

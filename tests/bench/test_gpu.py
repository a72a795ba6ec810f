"""``python -m bench.gpu``: its flow, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench import run as runner

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_dry_run_does_not_write_into_the_results() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run"])


def test_the_flow_runs_from_the_source_tree(tmp_path: Path) -> None:
    """One op of the dry run's plan, and a verification, in processes as on a GPU machine."""
    plan = gpu.parts(torch.device("cpu"), tmp_path, tiny=True)[:2]
    report = gpu.run_all(plan, tmp_path, total=200)
    assert [entry["ended"] for entry in report] == ["done", "done"], report
    assert json.loads((tmp_path / "verify.json").read_text())["verify"]["passed"] is True
    result = json.loads((tmp_path / "linear_logprob.json").read_text())
    assert result["tiny"] and result["sections"][0]["rows"]


def test_a_part_that_takes_too_long_is_stopped_and_said_so(tmp_path: Path) -> None:
    plan = [gpu.Part("slow", ("-c", "import time; time.sleep(60)"), 0.5), gpu.Part("next", ("-c", "print(1)"), 30)]
    report = gpu.run_all(plan, tmp_path, total=100)
    assert report[0]["ended"].startswith("stopped after") and report[0]["exit_code"] is None
    assert report[1]["exit_code"] == 0


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    report = gpu.run_all([gpu.Part("late", ("-c", "raise SystemExit(3)"), 5)], tmp_path, total=0)
    assert report[0]["ended"] == "not run: no time was left"


def test_a_failing_part_gives_exit_code_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_, **__: [gpu.Part("bad", ("-c", "raise SystemExit(3)"), 30)])
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["exit_code"] == 3


def test_the_plan_fits_nine_minutes_and_names_sections_that_exist() -> None:
    cuda = torch.device("cuda")
    assert gpu.TOTAL_SECONDS + gpu.GRACE_SECONDS < 540
    for part in gpu.parts(cuda, Path("/nowhere"), tiny=False):
        if "--shapes" in part.arguments:
            names = [case.name for case in runner.load(part.arguments[2]).cases(cuda)]
            for text in part.arguments[part.arguments.index("--shapes") + 1 :]:
                assert any(text in name for name in names), (text, names)


def test_the_bench_runs_without_the_trainer_or_transformers() -> None:
    """On a GPU machine there may be nothing but torch and triton."""
    code = (
        "import sys, bench.run, bench.gpu, bench.linear_logprob, bench.selective_logprob, bench.packed_attention;"
        "sys.exit(any(m.split('.')[0] in ('specs_fast', 'transformers', 'matplotlib') for m in sys.modules))"
    )
    environment = {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False, cwd=ROOT).returncode == 0

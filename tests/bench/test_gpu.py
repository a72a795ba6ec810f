"""``python -m bench.gpu``: its flow, on the CPU."""

from __future__ import annotations

import ast
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, machine
from bench import run as runner
from specs_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_dry_run_does_not_write_into_the_results() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run"])


def run_all(steps: list[gpu.Step], folder: Path, total: float = 200) -> dict[str, Any]:
    checks = folder / "checks"
    checks.mkdir(exist_ok=True)
    return gpu.run_all(steps, folder, checks, total)


def endings(document: dict[str, Any]) -> list[str]:
    return [entry["ended"] for entry in document["parts"]]


def test_the_flow_runs_from_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op of the dry run and a verification side by side, in processes as on a GPU machine, where little is installed."""
    (tmp_path / "checks").mkdir()
    for name in ("transformers", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ops, verifications, *_ = gpu.plan(torch.device("cpu"), tmp_path, tmp_path / "checks", tiny=True)
    document = run_all([(*ops, verifications[0])], tmp_path)
    assert endings(document) == ["done", "done"] and document["problems"] == [], document
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written == document and written["ended"] == "done" and {"commit", "versions", "hardware"} <= written.keys()
    verified = json.loads((tmp_path / "verify.json").read_text())["verify"]
    assert verified["passed"] is True and verified["complete"] is True
    assert {result["op"] for result in verified["results"]} == {"policy_loss"}
    result = json.loads((tmp_path / "linear_logprob.json").read_text())
    assert result["tiny"] and result["sections"][0]["rows"] and result["run"]["sections"]


def script(name: str, code: str, seconds: float = 60, **more: Any) -> gpu.Step:
    return (gpu.Part(name, ("-c", code), seconds, **more),)


def test_a_part_that_takes_too_long_is_stopped_and_said_so(tmp_path: Path) -> None:
    document = run_all([script("slow", "import time; time.sleep(60)", 0.5), script("next", "print(1)")], tmp_path)
    assert endings(document) == [document["parts"][0]["ended"], "done"]
    assert document["parts"][0]["ended"].startswith("stopped after") and document["parts"][0]["exit_code"] is None


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert endings(run_all([script("late", "raise SystemExit(3)")], tmp_path, total=0)) == ["not run: no time was left"]


def test_a_part_is_not_run_without_what_it_needs(tmp_path: Path) -> None:
    steps = [
        script("absent", "", needs={"no-such-thing": (0,)}),
        script("old", "", needs={"torch": (99, 1)}),
        script("here", "", needs={"torch": (2, 11)}),
    ]
    absent, old, here = endings(run_all(steps, tmp_path))
    assert absent == "not run: no-such-thing is not installed"
    assert old == f"not run: torch >= 99.1 is needed; {version('torch')} is installed" and here == "done"


def test_a_failing_part_costs_no_other_and_gives_exit_code_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [script("bad", "import sys; sys.exit('no such kernel')"), script("good", "")]
    monkeypatch.setattr(gpu, "plan", lambda *_, **__: steps)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    bad, good = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert bad["exit_code"] == 1 and bad["stderr"] == "no such kernel\n" and good["ended"] == "done"


def test_a_benchmark_that_lost_the_gpu_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; sys.exit(0 if '--resume' in sys.argv else 3)"
    out = tmp_path / "op.json"
    out.write_text("{}")
    part = gpu.Part("op", ("-c", "bench.run", "--out", str(out)), 60)
    real = gpu.Running

    def running(part: gpu.Part, seconds: float, *, resume: bool) -> gpu.Running:
        one = real(gpu.Part(part.name, ("-c", code), seconds), seconds, resume=resume)
        one.part = part
        return one

    monkeypatch.setattr(gpu, "Running", running)
    assert endings(run_all([(part,)], tmp_path)) == ["failed with exit code 3", "done"]


def test_what_went_wrong_within_a_part_is_a_problem(tmp_path: Path) -> None:
    raised = {"arm": "ours recompute [triton]", "not_run": "raised RuntimeError: no kernel image"}
    absent = {"arm": "ours [native]", "not_run": "the native backend runs on CPU tensors, not on cuda"}
    peer = {"arm": "QuACK", "not_run": "raised ImportError: its own affair"}
    result = {
        "sections": [{"name": "s", "rows": [raised, absent, peer]}, {"name": "of an earlier run", "rows": [raised]}],
        "run": {
            "sections": ["s"],
            "failed": [{"section": "t", "problem": "raised OutOfMemoryError: 3 GiB"}],
            "lost": [{"section": "s", "arm": "CCE", "problem": "raised AcceleratorError: illegal address"}],
        },
    }
    (tmp_path / "linear_logprob.json").write_text(json.dumps(result))
    (tmp_path / "selective_logprob.json").write_text("of an earlier run")
    os.utime(tmp_path / "selective_logprob.json", (0, 0))
    row = {"op": "swiglu", "backend": "native", "case": "one", "dtype": "float32", "tensor": "out", "note": ""}
    verified = {"results": [{**row, "passed": False}, {**row, "passed": True}]}
    (tmp_path / "verify.json").write_text(json.dumps({"verify": verified}))
    assert gpu.problems(tmp_path, since=1) == [
        "verify: swiglu, native, one, float32, out",
        "linear_logprob, t: raised OutOfMemoryError: 3 GiB",
        "linear_logprob, s, CCE: raised AcceleratorError: illegal address; the GPU was lost",
        "linear_logprob, s, ours recompute [triton]: raised RuntimeError: no kernel image",
    ]


def test_a_verification_that_was_stopped_has_not_passed(tmp_path: Path) -> None:
    document = {"torch": "2", "device": "a GPU", "rule": "r", "complete": True, "passed": True, "results": [1]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert gpu.collected(tmp_path)["passed"] is True
    (tmp_path / "b.json").write_text(json.dumps({**document, "complete": False, "results": [2]}))
    both = gpu.collected(tmp_path)
    assert (both["passed"], both["complete"], both["results"]) == (False, False, [1, 2])


def test_what_verifications_have_written_is_there_before_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part ends only when it finds its results collected."""
    monkeypatch.setattr(gpu, "COLLECT_SECONDS", 0.0)
    checks, collected = tmp_path / "checks", tmp_path / "verify.json"
    document = {"torch": "2", "device": "a GPU", "rule": "r", "complete": False, "passed": True, "results": []}
    wait = f"while not os.path.exists({str(collected)!r}): pass"
    (tmp_path / "a.partial").write_text(json.dumps(document))
    move = f"os.replace({str(tmp_path / 'a.partial')!r}, {str(checks / 'a.json')!r})"
    code = f"import os\n{move}\n{wait}"
    assert endings(run_all([script("verify", code, 30)], tmp_path)) == ["done"]


def test_the_commit_may_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc")
    assert machine.commit() != "abc"  # git tells here
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "abc" and machine.provenance()["commit"] == "abc"


def test_the_plan_fits_nine_minutes_and_names_sections_and_ops_that_exist() -> None:
    cuda = torch.device("cuda")
    assert gpu.TOTAL_SECONDS + gpu.GRACE_SECONDS < 540
    verified: list[str] = []
    for part in [part for step in gpu.plan(cuda, Path("/nowhere"), Path("/tmp"), tiny=False) for part in step]:
        if part.arguments[1] == "specs_kernels.verify":
            verified += part.arguments[part.arguments.index("--out") + 2 :]
        if "--shapes" in part.arguments:
            names = [case.name for case in runner.load(part.arguments[2]).cases(cuda)]
            for text in part.arguments[part.arguments.index("--shapes") + 1 :]:
                assert any(text in name for name in names), (text, names)
    assert sorted(verified) == sorted(dispatch.ops())


def test_the_bench_is_made_of_the_kernel_library_alone() -> None:
    """On a GPU machine there may be nothing but torch and triton."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        if path.stem not in ("update", "update_mixes", "seeds"):  # they run the trainer
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and "specs_fast" in str(node.module)]

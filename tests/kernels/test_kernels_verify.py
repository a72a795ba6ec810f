"""specs-kernels verify: passes here, fails for a wrong backend, and its exit code says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specs_kernels import dispatch, verify, verify_cases
from specs_kernels.linear_logprob import head, op
from specs_kernels.results import TokenLogprobs

ALL_CASES = dict(verify_cases._CASES)


@pytest.fixture(autouse=True)
def one_dtype_and_small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case of each op in fp32: the full run takes seconds and is a command of its own."""
    full = dict(verify_cases._CASES)

    def first(name: str):  # type: ignore[no-untyped-def]
        def generate(generator, device):  # type: ignore[no-untyped-def]
            case = next(full[name](generator, device))
            yield verify_cases.Case(case.op, case.name, case.inputs, case.run, case.plain, (torch.float32,))

        return generate

    monkeypatch.setattr(verify_cases, "_CASES", {name: first(name) for name in full})
    monkeypatch.setattr(verify, "invariance_cases", lambda *_: iter(()))


def test_every_op_and_backend_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["verify", "--json", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    ran = {(row["op"], row["backend"], row["dtype"]) for row in document["results"]}
    for name in ("linear_logprob", "selective_logprob", "packed_attention"):
        for backend in ("reference", "chunked"):
            assert {(name, backend, "float32"), (name, backend, "float64")} <= ran
    assert ("policy_loss", "reference", "float32") in ran and ("preference_loss", "reference", "float32") in ran


@pytest.mark.parametrize("factor, added", [(1.001, 0.0), (1.0, float("nan"))])
def test_a_wrong_backend_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float, added: float
) -> None:
    right = op.LinearLogprob

    class Wrong:
        @staticmethod
        def apply(*arguments):  # type: ignore[no-untyped-def]
            logp, entropy, lse = right.apply(*arguments)
            return TokenLogprobs(logp, entropy * factor + added, lse)

    monkeypatch.setattr(op, "LinearLogprob", Wrong)
    assert verify.main(["verify", "linear_logprob", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    backends = len(dispatch.backends("linear_logprob"))
    assert "FAIL" in out and f"2 of {2 * backends} pass" in out  # only the reference


def test_a_wrong_definition_fails_in_float64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = op.linear_logprob_reference

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        result = right(*arguments)
        return result._replace(lse=result.lse + 1e-6)

    monkeypatch.setattr(op, "linear_logprob_reference", wrong)
    assert verify.main(["verify", "linear_logprob", "--json", "--device", "cpu"]) == 1
    rows = json.loads(capsys.readouterr().out)["results"]
    assert any(not row["passed"] and row["dtype"] == "float64" and row["tensor"] == "lse" for row in rows)


def test_a_backend_that_raises_fails_and_the_others_are_still_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def raises(*_: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(op.LinearLogprob, "apply", raises)
    out = tmp_path / "verify.json"
    assert verify.main(["verify", "linear_logprob", "policy_loss", "--device", "cpu", "--out", str(out)]) == 1
    assert "FAIL raised RuntimeError: no compiler\n" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["complete"] and not document["passed"] and list(tmp_path.iterdir()) == [out]
    failed = {(row["op"], row["backend"]) for row in document["results"] if not row["passed"]}
    backends = set(dispatch.backends("linear_logprob")) - {"reference"}
    assert failed == {("linear_logprob", backend) for backend in backends}
    assert any(row["op"] == "policy_loss" for row in document["results"])


def test_results_are_written_case_by_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever is stopped keeps what was verified; it does not count as complete."""
    out = tmp_path / "verify.json"
    first = list(verify.results_in_turn(["policy_loss"]))[:1]

    def interrupted(*_: object, **__: object) -> Iterator[list[verify.Result]]:
        yield from first
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "results_in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.main(["verify", "policy_loss", "--device", "cpu", "--out", str(out)])
    document = json.loads(out.read_text())
    assert len(document["results"]) == len(first[0]) and document["passed"] and not document["complete"]


def test_a_device_that_is_not_here_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:77", "nowhere"):
        with pytest.raises(SystemExit) as exit_:
            verify.main(["verify", "--device", device])
        assert exit_.value.code == 2
        assert f"--device {device}: " in capsys.readouterr().err


def test_unknown_op_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        verify.main(["verify", "softmax"])
    assert exit_.value.code == 2
    assert "unknown op 'softmax'; ops: linear_logprob" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown op 'softmax'"):
        verify.verify(["softmax"])


@pytest.mark.parametrize("device, message", [("meta", "it holds no values"), ("banana", "banana"), ("cuda:99", "")])
def test_a_device_that_is_not_here_is_a_wrong_command_line(
    device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        verify.main(["verify", "linear_logprob", "--device", device])
    assert f"--device {device}: " in (error := capsys.readouterr().err) and message in error


def test_json_has_no_nan_and_no_infinity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = verify.Result("linear_logprob", "chunked", "x", "float32", "logp", float("nan"), 0.0, float("inf"), False)
    monkeypatch.setattr(verify, "results_in_turn", lambda *_, **__: [[wrong]])
    assert verify.main(["verify", "--json", "--device", "cpu"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (row,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["results"]
    assert row["error"] is None and row["ratio"] is None and row["passed"] is False


@pytest.mark.parametrize("name", ["linear_logprob", "linear_loss"])
def test_every_case_runs_with_the_row_blocks_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache or a workspace of fewer rows than a block raises, and a GPU's block has more rows than a CPU's."""
    monkeypatch.setattr(head, "CPU_TILING", head.Tiling(head.GPU_TILING.row_block, 2048, 8192))
    made = list(ALL_CASES[name](torch.Generator().manual_seed(0), torch.device("cpu")))
    for case in made:
        inputs = {key: tensor.bfloat16() for key, tensor in case.inputs.items()}
        assert all(values.isfinite().all() for values in case.run(inputs, "chunked").values())
    assert len(made) >= 2

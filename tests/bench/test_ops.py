"""Every arm that is ours does what its section asks, at tiny sizes; peers that are installed and run on a CPU as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import linear_logprob, linear_logprob_peers, packed_attention, selective_logprob
from bench.arms import measure
from bench.section import Case

CPU = torch.device("cpu")
OPS = (linear_logprob, selective_logprob, packed_attention)
CASES = [
    pytest.param(op, case, id=f"{op.__name__.removeprefix('bench.')}: {case.name}")
    for op in OPS
    for case in op.cases(CPU, tiny=True)
    if "sweep" not in case.shape
    and case.shape.get("N", 512) == 512
    and (case.shape["dtype"] == "fp32" or case.shape["task"] == "train")
]
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}


@pytest.mark.parametrize(("op", "case"), CASES)
def test_our_arms_give_the_exact_answer(op: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if op is not packed_attention:
        monkeypatch.setattr(linear_logprob_peers if op is linear_logprob else op, "peers", lambda problem: [])
    section = measure(case, CPU, rounds=1, seconds=None, tiny=True, only=["ours", "eager", "SDPA"])
    ran = [row for row in section["rows"] if "not_run" not in row]
    assert len(ran) >= 2 and any(not row["arm"].startswith("ours") for row in ran)
    for row in ran:
        assert row["error"] and max(row["error"].values()) < TOLERANCE[case.shape["dtype"]], row
    assert not [row for row in section["rows"] if row.get("not_run", "").startswith("raised")]


@pytest.mark.parametrize("name", ["512x896x151936 fp32 train", "512x896x151936 fp32 forward+entropy"])
def test_peers_that_run_here_do_the_same_task(name: str) -> None:
    case = next(case for case in linear_logprob.cases(CPU, tiny=True) if case.name == name)
    section = measure(case, CPU, rounds=1, seconds=None, tiny=True, only=["F.", "Liger", "TRL", "QuACK"])
    assert len(section["rows"]) >= 2
    for row in section["rows"]:
        assert "not_run" in row or max(row["error"].values()) < 1e-5, row
        assert not row.get("not_run", "").startswith("raised"), row


def test_goals_name_sections_and_arms_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logprob_peers, "peers", lambda problem: [])
    cases = {case.name: case for case in linear_logprob.cases(CPU, tiny=True)}
    for goal in linear_logprob.goals(CPU):
        assert goal.section in cases
        modes = {arm.name.split(" [")[0] for arm in cases[goal.section].build(CPU).arms}
        assert goal.arm.split(" [")[0] in modes
        assert goal.figure.partition(":")[2] in ("", "eager")
    gpu = {case.name for case in linear_logprob.cases(torch.device("cuda"))}
    assert {goal.section for goal in linear_logprob.goals(torch.device("cuda"))} <= gpu
    gpu = {case.name for case in selective_logprob.cases(torch.device("cuda"))}
    assert {goal.section for goal in selective_logprob.goals(torch.device("cuda"))} <= gpu

"""doctor: what is here, as tables and as data."""

from __future__ import annotations

import json

import pytest
import torch

from specs_fast.cli import main
from specs_fast.doctor import PACKAGES, diagnosis
from specs_kernels import dispatch


def test_json_holds_machine_versions_and_every_op_with_its_backend_and_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["versions"]["torch"] == torch.__version__
    assert set(data["versions"]) == {"python", *PACKAGES}
    assert data["machine"]["threads"] == torch.get_num_threads() and data["machine"]["cores"] >= 1
    assert [row["op"] for row in data["ops"]] == list(dispatch.ops())
    for row in data["ops"]:
        assert row["backend"] in row["available"] and row["reason"]


def test_the_tables_say_the_same_and_name_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    data = diagnosis()
    for row in data["ops"]:
        assert row["op"] in text
    for name, version in data["versions"].items():
        assert name in text and (version or "not installed") in text
    assert ("none: this PyTorch" in text) == (not data["machine"]["gpus"])

"""Two gloo ranks, one job for all tests here: DDP under the HF Trainer, TRL's DPO and GRPO trainers, and FSDP2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import largest_difference, make_model, tokenizer

pytest.importorskip("accelerate", reason="accelerate is not installed; it comes with specs-fast[trl]")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw: run name -> "own" (the host as it is) and "ours" -> losses and gradients of each step."""
    folder = tmp_path_factory.mktemp("two_ranks")
    make_model(vocab_size=len(tokenizer())).save_pretrained(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(HERE / "two_ranks.py"), str(folder), str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _run(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    if name not in ranks[0]:
        pytest.skip("trl is not installed; it comes with specs-fast[trl]")
    return [rank[name] for rank in ranks]


@pytest.mark.parametrize("name", ["hf", "dpo", "grpo", "fsdp2 untied", "fsdp2 tied"])
def test_losses_and_gradients_equal_those_of_the_unmodified_host(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in _run(ranks, name):
        assert len(rank["ours"]["losses"]) == len(rank["ours"]["gradients"]) == 2
        assert rank["ours"]["losses"] == pytest.approx(rank["own"]["losses"], rel=1e-5, abs=1e-6)
        for got, expected in zip(rank["ours"]["gradients"], rank["own"]["gradients"], strict=True):
            assert largest_difference(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["hf", "dpo", "grpo", "fsdp2 untied", "fsdp2 tied", "fsdp2 bf16"])
def test_both_ranks_hold_equal_gradients(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = _run(ranks, name)
    for one, other in zip(first["ours"]["gradients"], second["ours"]["gradients"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(grad, other[key]) for key, grad in one.items())


def test_the_ranks_had_different_data(ranks: list[dict[str, Any]]) -> None:
    """Otherwise equal gradients would prove nothing."""
    assert ranks[0]["backend"] == ranks[1]["backend"] == "gloo"
    assert ranks[0]["fsdp2 tied"]["ours"]["losses"] != ranks[1]["fsdp2 tied"]["ours"]["losses"]


def test_fsdp2_in_bf16_is_as_close_to_fp32_as_the_models_own_head(ranks: list[dict[str, Any]]) -> None:
    exact, half = ranks[0]["fsdp2 untied"]["own"], ranks[0]["fsdp2 bf16"]
    own, ours = (_distance(half[who]["gradients"][0], exact["gradients"][0]) for who in ("own", "ours"))
    assert 0 < ours < 1.2 * own < 0.1


def _distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    assert got.keys() == expected.keys()
    difference = sum(float((got[name] - grad).square().sum()) for name, grad in expected.items())
    return float((difference / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5)


def test_a_head_called_past_fsdp_says_that_its_weight_is_sharded(ranks: list[dict[str, Any]]) -> None:
    assert "sharded DTensor (64, 32)" in ranks[0]["outside"] and "fully_shard was given" in ranks[0]["outside"]

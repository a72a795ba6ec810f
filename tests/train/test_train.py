"""Advantages, the optimizer's guard and schedule, metric sums, stage folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from specs_fast.config import OptimConfig
from specs_fast.train.advantages import group_advantages
from specs_fast.train.metrics import JsonlWriter, MetricSum
from specs_fast.train.optim import Optimizer
from specs_fast.train.stage_dir import fingerprint, is_done, read_done, run_stage


def test_group_advantages_by_hand() -> None:
    reward = torch.tensor([1.5, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0])
    advantage, flat = group_advantages(reward, 4)
    std = math.sqrt(((1.5 - 0.5) ** 2 + 2 * 0.25) / 3)
    assert torch.allclose(advantage[:4], torch.tensor([1.0, -0.5, 0.0, -0.5]) / (std + 1e-4))
    assert advantage[4:].tolist() == [0.0] * 4 and flat.tolist() == [False, True]
    centred, _ = group_advantages(reward, 4, scale="none")
    assert torch.allclose(centred[:4], torch.tensor([1.0, -0.5, 0.0, -0.5]))


def test_equal_rewards_that_do_not_round_give_exactly_zero() -> None:
    advantage, flat = group_advantages(torch.full((7,), 0.1), 7)
    assert advantage.tolist() == [0.0] * 7 and flat.tolist() == [True]


def test_group_advantages_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(torch.ones(4), 3)
    with pytest.raises(ValueError, match=r"reward 1 \(group 0\) is nan"):
        group_advantages(torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(torch.ones(4), 2, scale="std")


def test_schedule_warms_up_and_falls() -> None:
    model = nn.Linear(2, 2)
    linear = Optimizer(model, OptimConfig(lr=1.0, warmup_steps=4, schedule="linear"), total_steps=10)
    assert [linear.learning_rate(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    rates = [linear.learning_rate(step) for step in range(4, 11)]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.2
    cosine = Optimizer(model, OptimConfig(lr=1.0, schedule="cosine"), total_steps=9)
    assert math.isclose(cosine.learning_rate(5), 0.5) and cosine.learning_rate(9) > 0
    constant = Optimizer(model, OptimConfig(lr=1.0), total_steps=10)
    assert constant.learning_rate(1) == constant.learning_rate(10) == 1.0


def test_a_non_finite_gradient_changes_no_weight() -> None:
    model = nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, OptimConfig(lr=1.0), total_steps=1)
    (model(torch.ones(1, 2)).sum() * float("inf")).backward()
    with pytest.raises(FloatingPointError, match="optimizer step 1"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_clipping_and_decay_of_matrices_only() -> None:
    model = nn.Linear(3, 1)
    optimizer = Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, max_grad_norm=1.0), total_steps=1)
    assert [group["weight_decay"] for group in optimizer.adamw.param_groups] == [0.5, 0.0]
    (100 * model(torch.ones(1, 3)).sum()).backward()
    norm, rate = optimizer.step()
    assert norm == pytest.approx(200.0) and rate == 0.1
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer(model.requires_grad_(False), OptimConfig(lr=0.1), total_steps=1)


def test_bfloat16_weights_follow_updates_far_below_their_spacing() -> None:
    model = nn.Linear(64, 1, bias=False).to(torch.bfloat16)
    exact = nn.Linear(64, 1, bias=False)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    start = model.weight.detach().clone()
    optimizers = [Optimizer(m, OptimConfig(lr=1e-5), total_steps=200) for m in (model, exact)]
    for _ in range(200):
        for m, optimizer in zip((model, exact), optimizers, strict=True):
            m(torch.ones(1, 64, dtype=m.weight.dtype)).sum().backward()
            optimizer.step()
    assert (model.weight != start).float().mean() > 0.5
    assert torch.equal(model.weight, exact.weight.to(torch.bfloat16))


def test_metrics_add_and_non_finite_values_become_null(tmp_path: Path) -> None:
    total = MetricSum()
    total.add({"a": torch.tensor(0.25)})
    total.add({"a": 0.5, "b": 1.0})
    assert total.values == {"a": 0.75, "b": 1.0}
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"x": float("nan"), "y": 1, "z": {"deep": [float("inf"), 2.0]}})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"x": None, "y": 1, "z": {"deep": [None, 2.0]}}


def test_a_stage_is_complete_or_absent(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run_stage(tmp_path / "zero", fails)
    assert not is_done(tmp_path / "zero") and (tmp_path / "zero.partial" / "half").exists()
    assert run_stage(tmp_path / "zero", lambda folder: {"steps": 3})
    assert not (tmp_path / "zero.partial").exists() and not (tmp_path / "zero" / "half").exists()
    assert read_done(tmp_path / "zero") == {"steps": 3}
    assert not run_stage(tmp_path / "zero", fails)


def test_a_folder_without_its_marker_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    with pytest.raises(ValueError, match="no DONE.json"):
        is_done(tmp_path / "zero")


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert len(first) == 16 and fingerprint(tmp_path) != first

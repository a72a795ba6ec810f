"""A stage's updates do not depend on which backends run: native kernels against PyTorch only, on stored rollouts and pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specs_fast.config import DPOConfig, GRPOConfig, ModelConfig, OptimConfig, RewardConfig, SamplingConfig
from specs_fast.data.rows import load_prompts
from specs_fast.data.types import Tree
from specs_fast.lab import LabPaths
from specs_fast.rewards.compose import RewardSet
from specs_fast.stages.common import Policy
from specs_fast.stages.dpo import batch_gradient
from specs_fast.stages.grpo import Rollouts, collect, minibatch_gradient
from specs_fast.train.optim import Optimizer
from specs_kernels import dispatch, native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
UPDATES = 5
OPTIM = OptimConfig(lr=1e-4)
GRPO = GRPOConfig(
    steps=1, prompts_per_step=6, group_size=4, beta=0.04, optim=OPTIM, sampling=SamplingConfig(max_new_tokens=24)
)
DPO = DPOConfig(optim=OPTIM)


@pytest.fixture(scope="module")
def rollouts(mini_lab: LabPaths) -> Rollouts:
    """Sampled once; the behaviour is a little off the policy, so that ratios differ from 1."""
    policy = Policy.load(mini_lab.base_dir, ModelConfig(), trainable=False)
    with RewardSet.from_config([RewardConfig("format"), RewardConfig("accuracy")]) as rewards:
        found = collect(policy, policy, load_prompts(mini_lab.train)[:6], rewards, GRPO, seed=3)
    generator = torch.Generator().manual_seed(0)
    old = [logp + 0.1 * torch.randn(logp.shape, generator=generator) for logp in found.old_logp]
    advantages = torch.randn(found.advantages.shape, generator=generator)
    return replace(found, old_logp=old, advantages=advantages)


def five_updates(
    lab: LabPaths, freeze_vision: bool, gradient: Callable[[Policy], dict[str, float]]
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each update, from the base model."""
    policy = Policy.load(lab.base_dir, ModelConfig(freeze_vision=freeze_vision), trainable=True)
    optimizer = Optimizer(policy.model, OPTIM, UPDATES)
    results = []
    for _ in range(UPDATES):
        loss = gradient(policy)["loss"]
        results.append((float(loss), optimizer.step()[0]))
    return results


@pytest.mark.parametrize("freeze_vision", [True, False])
@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_losses_and_gradient_norms_of_five_updates_agree(
    mini_lab: LabPaths, rollouts: Rollouts, stage: str, freeze_vision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [Tree(tree.prompt, tree.responses[:2]) for tree in rollouts.trees]
    reference = [
        torch.cat(logp.split([len(response) for response in tree.responses])[:2])
        for tree, logp in zip(rollouts.trees, rollouts.old_logp, strict=True)
    ]

    def gradient(policy: Policy) -> dict[str, float]:
        if stage == "grpo":
            return minibatch_gradient(policy, rollouts, list(range(6)), GRPO)
        return batch_gradient(policy, pairs, reference, DPO)

    assert "native" in {choice.backend for choice in dispatch.describe()}
    ours = five_updates(mini_lab, freeze_vision, gradient)
    monkeypatch.setattr(native, "missing", lambda: "left out in this test")
    assert "native" not in {choice.backend for choice in dispatch.describe()}
    plain = five_updates(mini_lab, freeze_vision, gradient)
    assert len({loss for loss, _ in plain}) == UPDATES and all(norm > 0 for _, norm in plain)
    for (loss, norm), (plain_loss, plain_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(plain_norm, rel=1e-4)

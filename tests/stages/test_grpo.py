"""GRPO: what a step computes does not depend on how it is cut, and groups without variance teach nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specs_fast.config import GRPOConfig, ModelConfig, OptimConfig, RewardConfig, SamplingConfig
from specs_fast.data.rows import load_prompts
from specs_fast.data.types import Completion, Prompt, Tree
from specs_fast.lab import LabPaths
from specs_fast.rewards.compose import RewardSet
from specs_fast.rewards.format import format_reward
from specs_fast.stages.common import Policy
from specs_fast.stages.grpo import Rollouts, collect, minibatch_gradient, rollout_metrics, run_grpo

CONFIG = GRPOConfig(
    steps=2,
    prompts_per_step=4,
    group_size=4,
    minibatches=2,
    optim=OptimConfig(lr=1e-4),
    sampling=SamplingConfig(max_new_tokens=24),
    log_completions_every=1,
)
MODEL = ModelConfig(path="unused")


@pytest.fixture(scope="module")
def prompts(mini_lab: LabPaths) -> list[Prompt]:
    return load_prompts(mini_lab.train)


def rollouts_of(policy: Policy, prompts: list[Prompt], config: GRPOConfig = CONFIG) -> Rollouts:
    with RewardSet.from_config([RewardConfig("format"), RewardConfig("accuracy")]) as rewards:
        reference = policy if config.beta > 0 else None
        return collect(policy, reference, prompts[:4], rewards, config, seed=3)


def off_policy(rollouts: Rollouts) -> Rollouts:
    """Behaviour and reference a little off the policy and advantages of both signs: no metric is the same for every token."""
    generator = torch.Generator().manual_seed(0)

    def moved(logps: list[torch.Tensor] | None) -> list[torch.Tensor]:
        return [logp + 0.3 * torch.randn(logp.shape, generator=generator) for logp in logps or []]

    advantages = torch.randn(rollouts.advantages.shape, generator=generator)
    return replace(
        rollouts, old_logp=moved(rollouts.old_logp), ref_logp=moved(rollouts.ref_logp), advantages=advantages
    )


def gradient(policy: Policy, rollouts: Rollouts, config: GRPOConfig) -> tuple[torch.Tensor, dict[str, float]]:
    policy.model.zero_grad(set_to_none=True)
    metrics = minibatch_gradient(policy, rollouts, list(range(4)), config)
    flat = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return torch.cat(flat), metrics


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_micro_batches_and_packing_never_change_the_gradient(
    mini_lab: LabPaths, prompts: list[Prompt], aggregation: str
) -> None:
    config = replace(CONFIG, aggregation=aggregation, beta=0.04)  # type: ignore[arg-type]
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    rollouts = off_policy(rollouts_of(policy, prompts, config))
    whole, metrics = gradient(policy, rollouts, config)
    cut, cut_metrics = gradient(policy, rollouts, replace(config, micro_batch_tokens=1))
    largest = max(tree.num_tokens for tree in rollouts.trees)
    split, split_metrics = gradient(policy, rollouts, replace(config, micro_batch_tokens=largest - 1))
    assert metrics["packing/split_trees"] == 0 and metrics["packing/micro_batches"] == 1
    assert cut_metrics["packing/split_trees"] == 4 and cut_metrics["packing/over_budget"] == 16
    assert 1 <= split_metrics["packing/split_trees"] < 4 and split_metrics["packing/over_budget"] == 0
    policy.packing = "none"
    padded, padded_metrics = gradient(policy, rollouts, config)
    assert whole.norm() > 0
    assert close(cut, whole) < 1e-5 and close(split, whole) < 1e-5 and close(padded, whole) < 1e-5
    assert 0 < metrics["clip_ratio/low_mean"] and 0 < metrics["clip_ratio/high_mean"] and metrics["kl"] > 0
    for other in (cut_metrics, split_metrics, padded_metrics):
        assert other.keys() == metrics.keys()
        for key in (key for key in metrics if not key.startswith("packing/")):
            assert other[key] == pytest.approx(metrics[key], abs=1e-5), key


def test_log_probs_of_split_trees_come_back_in_the_order_of_trees(mini_lab: LabPaths, prompts: list[Prompt]) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=False)
    trees = rollouts_of(policy, prompts).trees
    whole = policy.score_in_batches(trees, 16384)
    largest = max(tree.num_tokens for tree in trees)
    for packing, budget in (("shared", largest - 1), ("shared", 1), ("none", 100)):
        policy.packing = packing  # type: ignore[assignment]
        parts = policy.score_in_batches(trees, budget)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parts, whole, strict=True))


def test_bnpo_averages_micro_batches_in_metrics_as_in_the_loss(mini_lab: LabPaths, prompts: list[Prompt]) -> None:
    config = replace(CONFIG, aggregation="bnpo")
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    rollouts = rollouts_of(policy, prompts, config)
    for micro_batch_tokens in (16384, 1):
        _, metrics = gradient(policy, rollouts, replace(config, micro_batch_tokens=micro_batch_tokens))
        assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_rewards_get_every_column_of_the_data_and_what_they_log_is_a_metric(
    mini_lab: LabPaths, prompts: list[Prompt], tmp_path: Path
) -> None:
    rare = [*prompts[:20], replace(prompts[20], columns={**prompts[20].columns, "hint": "look left"})]
    seen: set[str | None] = set()

    def hinted(prompts: list[Any], completions: list[Any], hint: list[str | None], log_metric: Any, **_: Any) -> Any:
        seen.update(hint)
        log_metric("hints", float(len(hint)))
        return [None, *[1.0] * (len(completions) - 1)]

    rewards = RewardSet({"format": format_reward, "hinted": hinted})
    rewards.timeouts = 3  # of an earlier stage
    summary = run_grpo(
        replace(CONFIG, steps=2, prompts_per_step=2),
        MODEL,
        stage="zero",
        model_dir=mini_lab.base_dir,
        prompts=rare,
        rewards=rewards,
        out_dir=tmp_path,
        seed=0,
    )
    assert None in seen and summary["timeouts"] == 0
    assert [json.loads(line)["hints"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [8.0, 8.0]
    first = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert first["rewards"]["hinted"] is None


def test_an_empty_completion_is_counted_and_stays_in_its_group(
    mini_lab: LabPaths, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    groups = policy.sample(prompts[:4], CONFIG.sampling, CONFIG.group_size, 3)
    end = torch.tensor([policy.encoder.eos_token_id])
    groups[1][2] = Completion(end, policy.score([Tree(policy.encoder.prompt(prompts[1]), (end,))]).logp.detach(), True)
    monkeypatch.setattr(Policy, "sample", lambda *_: groups)
    rollouts = rollouts_of(policy, prompts)
    assert rollout_metrics(rollouts)["completions/empty"] >= 1 and rollouts.texts[6] == ""
    assert rollouts.advantages.shape == (16,) and rollouts.rewards.total[6] == 0
    grads, metrics = gradient(policy, rollouts, CONFIG)
    assert torch.isfinite(grads).all() and metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_groups_without_variance_give_exactly_zero_gradient(mini_lab: LabPaths, prompts: list[Prompt]) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    rollouts = replace(rollouts_of(policy, prompts), advantages=torch.zeros(16))
    grads, _ = gradient(policy, rollouts, CONFIG)
    assert not grads.any()


def test_the_sampler_and_the_trainer_agree_on_log_probs(mini_lab: LabPaths, prompts: list[Prompt]) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=False)
    config = replace(CONFIG, sampling=SamplingConfig(max_new_tokens=24, temperature=0.7))
    rollouts = rollouts_of(policy, prompts, config)
    sampled = torch.cat([completion.logp for group in rollouts.completions for completion in group])
    assert (torch.cat(rollouts.old_logp) - sampled).abs().max() < 1e-4


def test_a_run_is_deterministic_and_leaves_a_loadable_model(
    mini_lab: LabPaths, prompts: list[Prompt], tmp_path: Path
) -> None:
    rows = []
    for name in ("a", "b"):
        out_dir = tmp_path / name
        out_dir.mkdir()
        with RewardSet.from_config([RewardConfig("format"), RewardConfig("accuracy")]) as rewards:
            summary = run_grpo(
                CONFIG,
                MODEL,
                stage="zero",
                model_dir=mini_lab.base_dir,
                prompts=prompts,
                rewards=rewards,
                out_dir=out_dir,
                seed=5,
            )
        assert summary["steps"] == 2
        rows.append([json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()])
    assert [r["step"] for r in rows[0]] == [1, 2]
    for first, second in zip(*rows, strict=True):
        assert {k: v for k, v in first.items() if "time" not in k} == {
            k: v for k, v in second.items() if "time" not in k
        }
    expected = {
        "reward", "reward_std", "rewards/format/mean", "rewards/accuracy/mean", "frac_reward_zero_std", "entropy",
        "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "loss", "grad_norm",
        "learning_rate", "num_tokens", "step_time", "sampling/sampling_logp_difference/max",
        "packing/fill", "packing/balance_tokens", "packing/balance_pairs", "packing/padding_waste", "packing/split_trees",
    }  # fmt: skip
    assert expected <= rows[0][0].keys()
    same = (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    changed = (tmp_path / "a" / "model.safetensors").read_bytes() != (
        mini_lab.base_dir / "model.safetensors"
    ).read_bytes()
    assert same and changed
    reloaded = Policy.load(tmp_path / "a", MODEL, trainable=False)
    assert reloaded.encoder.prompt(prompts[0]).input_ids.shape[0] > 4
    logged = [json.loads(line) for line in (tmp_path / "a" / "completions.jsonl").read_text().splitlines()]
    assert {
        "step",
        "prompt_id",
        "prompt",
        "images",
        "answer",
        "completion",
        "reward",
        "rewards",
        "advantage",
    } <= logged[0].keys()

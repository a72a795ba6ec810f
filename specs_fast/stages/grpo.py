"""GRPO with verifiable rewards (arXiv 2402.03300, with DAPO's asymmetric clip and token-level loss, arXiv 2503.14476).

One step: draw prompts, sample a group of responses for each, score them with the rewards, turn the rewards into group
advantages, and take ``minibatches`` clipped policy-gradient steps on the stored rollouts. Zero and final are this stage
from two different models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specs_fast.config import GRPOConfig, ModelConfig
from specs_fast.data.batching import cut, epochs, gather
from specs_fast.data.types import Completion, Prompt, Tree
from specs_fast.progress import SILENT, Progress
from specs_fast.rewards.compose import RewardResult, RewardSet
from specs_fast.stages.common import Policy, column_lists, conversation, stage_seed
from specs_fast.train.advantages import group_advantages
from specs_fast.train.metrics import JsonlWriter, MetricSum
from specs_fast.train.optim import Optimizer
from specs_kernels import policy_loss


@dataclass(frozen=True)
class Rollouts:
    """One step's samples: B prompts, G completions each; flat lists run prompt by prompt.

    old_logp, ref_logp: per tree, float32 ``[N_i]``, by the trainer's own forward; ref_logp None without KL.
    """

    prompts: list[Prompt]
    trees: list[Tree]
    completions: list[list[Completion]]
    texts: list[str]
    rewards: RewardResult
    advantages: Tensor
    flat_groups: Tensor
    old_logp: list[Tensor]
    ref_logp: list[Tensor] | None


def run_grpo(
    config: GRPOConfig,
    model_config: ModelConfig,
    *,
    stage: str,
    model_dir: str | Path,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    out_dir: Path,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train ``model_dir`` on ``prompts`` and leave the model, metrics.jsonl and completions.jsonl in ``out_dir``.

    Deterministic in ``seed`` on one device. Returns a summary: steps, time, first and last mean reward.
    """
    policy = Policy.load(model_dir, model_config, trainable=True, progress=progress)
    reference = Policy.load(model_dir, model_config, trainable=False) if config.beta > 0 else None
    optimizer = Optimizer(policy.model, config.optim, config.steps * config.minibatches)
    order = epochs(len(prompts), config.prompts_per_step, stage_seed(seed, stage))
    started = time.perf_counter()
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    timeouts_before = rewards.timeouts
    mean_rewards: list[float] = []
    num_tokens = 0
    with (
        JsonlWriter(out_dir / "metrics.jsonl") as metrics_file,
        JsonlWriter(out_dir / "completions.jsonl") as completions_file,
        progress.track(f"{stage}: GRPO", config.steps) as bar,
    ):
        for step in range(1, config.steps + 1):
            step_started = time.perf_counter()
            batch = [prompts[index] for index in next(order)]
            rollouts = collect(policy, reference, batch, rewards, config, stage_seed(seed, stage, step), columns)
            sampled = time.perf_counter()
            metrics = rollout_metrics(rollouts) | update(policy, optimizer, rollouts, config)
            num_tokens += sum(tree.num_tokens for tree in rollouts.trees)
            metrics |= {
                "num_tokens": num_tokens,
                "sampling_time": sampled - step_started,
                "step_time": time.perf_counter() - step_started,
            }
            metrics_file.write({"step": step, "stage": stage, **metrics})
            if step == 1 or step == config.steps or step % config.log_completions_every == 0:
                for example in example_rows(rollouts, step):
                    completions_file.write(example)
            mean_rewards.append(metrics["reward"])
            bar.advance(1, reward=metrics["reward"], entropy=metrics["entropy"])
    policy.save(out_dir)
    return {
        "stage": stage,
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "reward_first": mean_rewards[0],
        "reward_last": mean_rewards[-1],
        "num_tokens": num_tokens,
        "timeouts": rewards.timeouts - timeouts_before,
    }


def collect(
    policy: Policy,
    reference: Policy | None,
    prompts: list[Prompt],
    rewards: RewardSet,
    config: GRPOConfig,
    seed: int,
    columns: Sequence[str] = (),
) -> Rollouts:
    """Sample, score and compare: everything of a step that needs no gradient.

    columns: data columns that reward functions get even where none of these prompts has them.
    """
    completions = policy.sample(prompts, config.sampling, config.group_size, seed)
    trees = [
        Tree(policy.encoder.prompt(prompt), tuple(completion.token_ids for completion in group))
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    texts = [policy.encoder.decode(completion.token_ids) for group in completions for completion in group]
    owners = [prompt for prompt in prompts for _ in range(config.group_size)]
    result = rewards.score(owners, [conversation(text) for text in texts], column_lists(owners, columns))
    advantages, flat = group_advantages(result.total, config.group_size, scale=config.scale_rewards)
    temperature = config.sampling.temperature
    old_logp = policy.score_in_batches(trees, config.micro_batch_tokens, temperature=temperature)
    ref_logp = (
        reference.score_in_batches(trees, config.micro_batch_tokens, temperature=temperature) if reference else None
    )
    return Rollouts(list(prompts), trees, completions, texts, result, advantages, flat, old_logp, ref_logp)


def update(policy: Policy, optimizer: Optimizer, rollouts: Rollouts, config: GRPOConfig) -> dict[str, float]:
    """``minibatches`` optimizer steps over the rollouts, cut by prompt; metrics averaged over them."""
    totals = MetricSum()
    count = len(rollouts.trees)
    for part in range(config.minibatches):
        indices = list(range(count * part // config.minibatches, count * (part + 1) // config.minibatches))
        metrics = minibatch_gradient(policy, rollouts, indices, config)
        norm, rate = optimizer.step()
        metrics |= {"grad_norm": norm, "learning_rate": rate}
        totals.add({key: value / config.minibatches for key, value in metrics.items()})
    return totals.values


def minibatch_gradient(policy: Policy, rollouts: Rollouts, indices: list[int], config: GRPOConfig) -> dict[str, float]:
    """Gradients of the policy loss over some trees, accumulated over micro-batches under global denominators."""
    totals = MetricSum()
    trees = [rollouts.trees[index] for index in indices]
    num_tokens = sum(tree.num_response_tokens for tree in trees)
    old_logp = [rollouts.old_logp[index] for index in indices]
    ref_logp = None if rollouts.ref_logp is None else [rollouts.ref_logp[index] for index in indices]
    advantages = rollouts.advantages.view(-1, config.group_size)[indices]
    plan = policy.plan(trees, config.micro_batch_tokens)
    for parts in plan.micro_batches:
        scores = policy.score(cut(trees, parts), temperature=config.sampling.temperature, return_entropy=True)
        advantage = torch.cat([advantages[part.tree, list(part.responses)] for part in parts])
        device = scores.logp.device
        loss, metrics = policy_loss(
            scores.logp,
            gather(old_logp, trees, parts).to(device),
            advantage.to(device)[scores.segment_ids],
            scores.segment_ids,
            kind="grpo",
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            beta=config.beta,
            ref_logp=None if ref_logp is None else gather(ref_logp, trees, parts).to(device),
            aggregation=config.aggregation,
            denominator=_denominator(config, trees, num_tokens),
        )
        if config.aggregation == "bnpo":  # every micro-batch has its own denominator: average them, as TRL does
            loss, metrics = loss / len(plan), {key: value / len(plan) for key, value in metrics.items()}
        loss.backward()
        totals.add(metrics)
        assert scores.entropy is not None
        totals.add({"loss": loss.detach(), "entropy": scores.entropy.detach().sum() / num_tokens})
    return totals.values | plan.metrics()


def _denominator(config: GRPOConfig, trees: Sequence[Tree], num_tokens: int) -> float | None:
    """The minibatch's own count, so that micro-batches add up to the loss of the whole (None: local, for bnpo)."""
    num_sequences = sum(len(tree.responses) for tree in trees)
    return {
        "dapo": float(num_tokens),
        "grpo": float(num_sequences),
        "dr_grpo": float(num_sequences * config.sampling.max_new_tokens),
        "bnpo": None,
    }[config.aggregation]


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """TRL's rollout metrics, what reward functions logged, and how far the sampler's log-probs are from the trainer's."""
    flat = [completion for group in rollouts.completions for completion in group]
    lengths = torch.tensor([len(completion) for completion in flat], dtype=torch.float32)
    terminated = torch.tensor([len(completion) for completion in flat if completion.finished], dtype=torch.float32)
    total = rollouts.rewards.total
    metrics = rollouts.rewards.metrics | {
        "reward": float(total.mean()),
        "reward_std": float(total.view(len(rollouts.trees), -1).std(dim=1).mean()),
        "frac_reward_zero_std": float(rollouts.flat_groups.float().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": sum(not completion.finished for completion in flat) / len(flat),
        "completions/empty": float(sum(not text.strip() for text in rollouts.texts)),
    }
    if len(terminated):
        metrics["completions/mean_terminated_length"] = float(terminated.mean())
    for name, values in rollouts.rewards.per_function.items():
        known = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else float("nan")
        metrics[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else 0.0
    sampled = torch.cat([completion.logp for completion in flat])
    gap = torch.cat(rollouts.old_logp).to(sampled.device) - sampled
    metrics["sampling/sampling_logp_difference/mean"] = float(gap.abs().mean())
    metrics["sampling/sampling_logp_difference/max"] = float(gap.abs().max())
    metrics["sampling/importance_sampling_ratio/max"] = float(gap.max().exp())
    metrics["sampling/importance_sampling_ratio/min"] = float(gap.min().exp())
    return metrics


def example_rows(rollouts: Rollouts, step: int, limit: int = 8) -> list[dict[str, Any]]:
    """A few completions of the step for the log: the first two of each of the first prompts."""
    group_size = len(rollouts.completions[0])
    rows = []
    for index in [g * group_size + k for g in range(len(rollouts.trees)) for k in range(2)][:limit]:
        prompt = rollouts.prompts[index // group_size]
        rows.append(
            {
                "step": step,
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "images": list(prompt.image_paths),
                "answer": prompt.columns.get("answer"),
                "completion": rollouts.texts[index],
                "reward": float(rollouts.rewards.total[index]),
                "rewards": {name: float(values[index]) for name, values in rollouts.rewards.per_function.items()},
                "advantage": float(rollouts.advantages[index]),
            }
        )
    return rows

"""Supervised fine-tuning on chosen responses: mean over responses of their token-mean NLL, or over all tokens.

The control of the SPECS cold start (same data, no preference term), and the second half of RL-then-SFT methods.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specs_fast.config import DPOConfig, ModelConfig
from specs_fast.data.batching import cut, epochs
from specs_fast.data.types import Prompt, Scores, Tree
from specs_fast.progress import SILENT, Progress
from specs_fast.stages.common import LazyTrees, Policy, stage_seed
from specs_fast.train.metrics import JsonlWriter, MetricSum
from specs_fast.train.optim import Optimizer


def run_sft(
    config: DPOConfig,
    model_config: ModelConfig,
    *,
    stage: str,
    model_dir: str | Path,
    rows: Sequence[tuple[Prompt, str]],
    out_dir: Path,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train ``model_dir`` on (prompt, response) rows; the optimizer, batch size, epochs and nll_mode of ``config`` apply.

    ValueError naming the row for an empty response. Returns a summary of rows, optimizer steps and seconds.
    """
    policy = Policy.load(model_dir, model_config, trainable=True, progress=progress)
    for prompt, response in rows:
        if not response.strip():
            raise ValueError(f"{prompt.source}: the response is empty; drop the row")
    trees = LazyTrees(lambda index: row_tree(policy, *rows[index]), len(rows))
    per_step = min(config.batch_size, len(trees))
    steps = -(-config.epochs * len(trees) // per_step)
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    optimizer = Optimizer(policy.model, config.optim, steps)
    order = epochs(len(trees), per_step, stage_seed(seed, stage))
    started = time.perf_counter()
    with JsonlWriter(out_dir / "metrics.jsonl") as metrics_file, progress.track(f"{stage}: SFT", steps) as bar:
        for step in range(1, steps + 1):
            metrics = batch_gradient(policy, [trees[index] for index in next(order)], config)
            norm, rate = optimizer.step()
            metrics_file.write({"step": step, "stage": stage, **metrics, "grad_norm": norm, "learning_rate": rate})
            bar.advance(1, loss=metrics["loss"])
    policy.save(out_dir)
    return {"stage": stage, "rows": len(trees), "steps": steps, "seconds": time.perf_counter() - started}


def row_tree(policy: Policy, prompt: Prompt, response: str) -> Tree:
    """The prompt with its one response."""
    return Tree(policy.encoder.prompt(prompt), (policy.encoder.completion(response),))


def batch_gradient(policy: Policy, trees: list[Tree], config: DPOConfig) -> dict[str, float]:
    """Gradients of the batch's NLL, accumulated over micro-batches."""
    totals = MetricSum()
    num_tokens = sum(tree.num_response_tokens for tree in trees)
    plan = policy.plan(trees, config.micro_batch_tokens)
    for parts in plan.micro_batches:
        scores = policy.score(cut(trees, parts), return_entropy=True)
        loss = nll(scores, config.nll_mode, num_responses=len(trees), num_tokens=num_tokens)
        loss.backward()
        assert scores.entropy is not None
        totals.add({"loss": loss.detach(), "entropy": scores.entropy.detach().sum() / num_tokens})
    return totals.values | plan.metrics()


def nll(scores: Scores, mode: str, *, num_responses: int, num_tokens: int) -> Tensor:
    """-logp summed over tokens / ``num_tokens`` ("token"), or token means summed over responses / ``num_responses``."""
    if mode == "token":
        return -scores.logp.sum() / num_tokens
    sums = torch.zeros(scores.lengths.shape[0], dtype=scores.logp.dtype, device=scores.logp.device)
    sums = sums.index_add(0, scores.segment_ids, scores.logp)
    return -(sums / scores.lengths.to(sums.device).clamp(min=1)).sum() / num_responses

"""The DPO cold start (arXiv 2510.25801, 2305.18290): L = -log sigmoid(beta (s_w - s_l)) + lambda * NLL(chosen).

s is the summed log-ratio of a response to the reference policy, which is the model the stage starts from. Its log-probs
are computed once, by the same packed forward that trains, and stored under a key of model, data and settings.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specs_fast.config import DPOConfig, ModelConfig
from specs_fast.data.batching import cut, epochs, gather
from specs_fast.data.types import Pair, Tree
from specs_fast.progress import SILENT, Progress
from specs_fast.stages.common import LazyTrees, Policy, stage_seed
from specs_fast.train.metrics import JsonlWriter, MetricSum
from specs_fast.train.optim import Optimizer
from specs_fast.train.stage_dir import fingerprint
from specs_kernels import dispatch, native, preference_loss


def run_dpo(
    config: DPOConfig,
    model_config: ModelConfig,
    *,
    stage: str,
    model_dir: str | Path,
    pairs: Sequence[Pair],
    out_dir: Path,
    cache_dir: Path,
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train ``model_dir`` on ``pairs`` and leave the model and metrics.jsonl in ``out_dir``. Deterministic in ``seed``.

    ValueError when the pairs name another model than ``model_dir`` (see `check_origin`).
    Returns a summary: pairs, optimizer steps, seconds, whether the reference log-probs came from the cache.
    """
    base = fingerprint(model_dir)
    check_origin(pairs, base)
    policy = Policy.load(model_dir, model_config, trainable=True, progress=progress)
    trees = LazyTrees(lambda index: pair_tree(policy, pairs[index]), len(pairs))
    started = time.perf_counter()
    reference, cached = reference_logps(policy, trees, base, config, cache_dir, progress, stage)
    per_step = min(config.batch_size, len(pairs))
    steps = -(-config.epochs * len(pairs) // per_step)
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    optimizer = Optimizer(policy.model, config.optim, steps)
    order = epochs(len(pairs), per_step, stage_seed(seed, stage))
    last: dict[str, Any] = {}
    num_tokens = 0
    with JsonlWriter(out_dir / "metrics.jsonl") as metrics_file, progress.track(f"{stage}: DPO", steps) as bar:
        for step in range(1, steps + 1):
            step_started = time.perf_counter()
            indices = next(order)
            metrics = batch_gradient(policy, [trees[i] for i in indices], [reference[i] for i in indices], config)
            norm, rate = optimizer.step()
            num_tokens += sum(trees.outlines[index].num_tokens for index in indices)
            last = {"step": step, "stage": stage, "epoch": step * per_step / len(pairs), **metrics}
            last |= {"grad_norm": norm, "learning_rate": rate, "num_tokens": num_tokens}
            last["step_time"] = time.perf_counter() - step_started
            metrics_file.write(last)
            bar.advance(1, loss=last["loss"], margin=last["rewards/margins"])
    policy.save(out_dir)
    return {
        "stage": stage,
        "pairs": len(pairs),
        "steps": steps,
        "seconds": time.perf_counter() - started,
        "reference_from_cache": cached,
        "loss_last": last["loss"],
        "base_model": base,
    }


def check_origin(pairs: Sequence[Pair], base: str) -> None:
    """Refuse pairs whose ``base_model`` column names another model: their rejected side is not this model's own."""
    for pair in pairs:
        made_by = pair.prompt.columns.get("base_model")
        if made_by is not None and made_by != base:
            raise ValueError(
                f"{pair.prompt.source}: made by base model {made_by}, but the cold start begins from {base}; "
                "SPECS needs the model's own pairs: run the pairs stage again, or drop the base_model column to use them anyway"
            )


def pair_tree(policy: Policy, pair: Pair) -> Tree:
    """The prompt with (chosen, rejected) as its two responses."""
    responses = (policy.encoder.completion(pair.chosen), policy.encoder.completion(pair.rejected))
    return Tree(policy.encoder.prompt(pair.prompt), responses)


def batch_gradient(policy: Policy, trees: list[Tree], reference: list[Tensor], config: DPOConfig) -> dict[str, float]:
    """Gradients of the mean loss over a batch of pairs, accumulated over micro-batches; a pair is never split."""
    totals = MetricSum()
    chosen_tokens = sum(int(tree.responses[0].shape[0]) for tree in trees) if config.nll_mode == "token" else None
    plan = policy.plan(trees, config.micro_batch_tokens, keep_whole=True)
    for parts in plan.micro_batches:
        scores = policy.score(cut(trees, parts), return_entropy=True)
        device = scores.logp.device
        segments = torch.arange(2 * len(parts), device=device).view(-1, 2)
        loss, metrics = preference_loss(
            scores.logp,
            gather(reference, trees, parts).to(device),
            scores.segment_ids,
            segments,
            kind="sigmoid",
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            nll_weight=config.nll_weight,
            nll_mode=config.nll_mode,
            num_pairs=len(trees),
            num_chosen_tokens=chosen_tokens,
        )
        loss.backward()
        totals.add(metrics)
        assert scores.entropy is not None
        share = scores.logp.numel() / sum(tree.num_response_tokens for tree in trees)
        totals.add({"loss": loss.detach(), "entropy": scores.entropy.detach().mean() * share})
    return totals.values | plan.metrics()


def reference_logps(
    policy: Policy, trees: LazyTrees, base: str, config: DPOConfig, cache_dir: Path, progress: Progress, stage: str
) -> tuple[list[Tensor], bool]:
    """Log-probs of every pair under the starting model, float32 ``[N_i]`` each, and whether they came from the cache.

    The cache's name is a hash of the model's weights, every token and pixel key of the data, and how they are computed.
    """
    path = cache_dir / f"reference-{cache_key(trees.outlines, base, policy, config)}.safetensors"
    lengths = [tree.num_response_tokens for tree in trees.outlines]
    if path.is_file():
        return list(load_file(path)["logp"].split(lengths)), True
    label = f"{stage}: reference log-probs"
    logps = policy.score_in_batches(trees, config.micro_batch_tokens, progress=progress, label=label)
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"logp": torch.cat(logps).cpu()}, temporary)
    temporary.replace(path)
    return logps, False


def cache_key(trees: Sequence[Tree], base: str, policy: Policy, config: DPOConfig) -> str:
    """20 hex digits over everything the reference log-probs depend on, to the last bit."""
    model = policy.model
    settings = [base, policy.packing, str(model.dtype), model.device.type, config.micro_batch_tokens, torch.__version__]
    settings += [choice.backend for choice in dispatch.describe(model.device)]
    settings += [native.instruction_set(), policy.fused_layers]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(repr(policy.plan(trees, config.micro_batch_tokens).micro_batches).encode())
    for tree in trees:
        digest.update(tree.prompt.input_ids.numpy().tobytes())
        digest.update("".join(image.key for image in tree.prompt.images).encode())
        for response in tree.responses:
            digest.update(response.numpy().tobytes() + b"|")
    return digest.hexdigest()[:20]

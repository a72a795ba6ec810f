"""The cold start: first-step values are known, cuts do not change gradients, reference log-probs are cached by content."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specs_fast.config import DPOConfig, ModelConfig, OptimConfig
from specs_fast.data.rows import load_prompts
from specs_fast.data.types import Pair
from specs_fast.lab import LabPaths
from specs_fast.progress import SILENT
from specs_fast.stages.common import LazyTrees, Policy
from specs_fast.stages.dpo import batch_gradient, cache_key, pair_tree, reference_logps, run_dpo
from specs_fast.stages.sft import batch_gradient as sft_gradient
from specs_fast.stages.sft import run_sft
from specs_fast.train.stage_dir import fingerprint

CONFIG = DPOConfig(optim=OptimConfig(lr=3e-4), batch_size=4, epochs=2)
MODEL = ModelConfig(path="unused")


@pytest.fixture(scope="module")
def pairs(mini_lab: LabPaths) -> list[Pair]:
    prompts = load_prompts(mini_lab.train)[:6]
    good = "<think> i see 3 7 . 3 + 7 = 10 . </think> <answer> 10 </answer>"
    return [Pair(prompt, good, "i see 3 7 . the answer is 10") for prompt in prompts]


def gradient(
    policy: Policy, pairs: list[Pair], config: DPOConfig, reference: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    policy.model.zero_grad(set_to_none=True)
    metrics = batch_gradient(policy, [pair_tree(policy, pair) for pair in pairs], reference, config)
    assert metrics["packing/split_trees"] == 0  # the loss of a pair needs both sides
    assert metrics["packing/over_budget"] == (len(pairs) if config.micro_batch_tokens == 1 else 0)
    grads = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    return grads, {key: value for key, value in metrics.items() if not key.startswith("packing/")}


def test_the_first_step_has_margin_zero_and_loss_ln2_plus_nll(
    mini_lab: LabPaths, pairs: list[Pair], tmp_path: Path
) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    trees = [pair_tree(policy, pair) for pair in pairs]
    reference = policy.score_in_batches(trees, 4096)
    metrics = batch_gradient(policy, trees, reference, CONFIG)
    chosen = [logp[: tree.responses[0].shape[0]].mean() for logp, tree in zip(reference, trees, strict=True)]
    nll = -float(torch.stack(chosen).mean())
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(math.log(2) + nll, rel=1e-4)


@pytest.mark.parametrize("nll_mode", ["sequence", "token"])
def test_micro_batches_and_packing_never_change_the_gradient(
    mini_lab: LabPaths, pairs: list[Pair], nll_mode: str
) -> None:
    config = replace(CONFIG, nll_mode=nll_mode)  # type: ignore[arg-type]
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    longer = [*pairs[:5], replace(pairs[5], chosen=pairs[5].chosen.replace("3 + 7 = 10 .", "3 + 7 = 10 . so 10 ."))]
    reference = policy.score_in_batches([pair_tree(policy, pair) for pair in longer], 4096)
    generator = torch.Generator().manual_seed(0)
    reference = [logp + 0.3 * torch.randn(logp.shape, generator=generator) for logp in reference]
    whole, metrics = gradient(policy, longer, config, reference)
    largest = max(pair_tree(policy, pair).num_tokens for pair in longer)
    cuts = [gradient(policy, longer, replace(config, micro_batch_tokens=n), reference) for n in (1, 2 * largest)]
    policy.packing = "none"
    for grads, values in (*cuts, gradient(policy, longer, config, reference)):
        assert float((grads - whole).norm() / whole.norm()) < 1e-5
        assert values == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize("nll_mode", ["sequence", "token"])
def test_micro_batches_never_change_the_gradient_of_sft(mini_lab: LabPaths, pairs: list[Pair], nll_mode: str) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    trees = [pair_tree(policy, pair) for pair in pairs]
    trees = [replace(tree, responses=tree.responses[i % 2 : i % 2 + 1]) for i, tree in enumerate(trees)]
    results = []
    for max_tokens in (4096, 2 * max(tree.num_tokens for tree in trees), 1):
        policy.model.zero_grad(set_to_none=True)
        config = replace(CONFIG, nll_mode=nll_mode, micro_batch_tokens=max_tokens)  # type: ignore[arg-type]
        metrics = sft_gradient(policy, trees, config)
        grads = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        results.append((grads, metrics["loss"], metrics["entropy"], metrics["packing/micro_batches"]))
    whole = results[0]
    assert [result[3] for result in results] == [1, 3, 6]
    for result in results[1:]:
        assert float((result[0] - whole[0]).norm() / whole[0].norm()) < 1e-5
        assert result[1:3] == pytest.approx(whole[1:3], abs=1e-5)


def test_reference_log_probs_are_cached_by_content(mini_lab: LabPaths, pairs: list[Pair], tmp_path: Path) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=False)
    trees = LazyTrees(lambda index: pair_tree(policy, pairs[index]), len(pairs))
    first, cached = reference_logps(policy, trees, "base", CONFIG, tmp_path, SILENT, "coldstart")
    again, hit = reference_logps(policy, trees, "base", CONFIG, tmp_path, SILENT, "coldstart")
    assert not cached and hit and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = [pair_tree(policy, replace(pairs[0], rejected="the answer is 11")), *trees[1:]]
    assert cache_key(list(trees), "base", policy, CONFIG) == cache_key(trees.outlines, "base", policy, CONFIG)
    keys = {cache_key(of, base, policy, CONFIG) for of, base in ((trees, "base"), (trees, "other"), (other, "base"))}
    keys.add(cache_key(trees, "base", policy, replace(CONFIG, micro_batch_tokens=64)))
    assert len(keys) == 4


def test_pixels_of_the_pairs_never_lie_in_memory_together(
    mini_lab: LabPaths, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specs_fast.data.encode.CACHE_BYTES", 1)
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=False)
    trees = LazyTrees(lambda index: pair_tree(policy, pairs[index]), len(pairs))
    assert [image.pixel_values.numel() for tree in trees.outlines for image in tree.prompt.images] == [0] * len(pairs)
    for tree, outline in zip(trees, trees.outlines, strict=True):
        assert tree.prompt.images[0].pixel_values.numel() > 0 and tree.num_tokens == outline.num_tokens


def test_a_run_raises_the_margin_and_keeps_the_chosen_likely(
    mini_lab: LabPaths, pairs: list[Pair], tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=6)  # 36 draws from 6 pairs, 4 at a time
    (tmp_path / "out").mkdir()
    summary = run_dpo(
        config,
        MODEL,
        stage="coldstart",
        model_dir=mini_lab.base_dir,
        pairs=pairs,
        out_dir=tmp_path / "out",
        cache_dir=tmp_path / "cache",
        seed=0,
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert summary["steps"] == len(rows) == 9
    assert rows[-1]["rewards/margins"] > 0.1 and rows[-1]["rewards/chosen"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy"} <= rows[0].keys()


def test_pairs_of_another_model_are_refused(mini_lab: LabPaths, pairs: list[Pair], tmp_path: Path) -> None:
    def marked(origin: str) -> list[Pair]:
        prompt = replace(pairs[0].prompt, columns={**pairs[0].prompt.columns, "base_model": origin})
        return [replace(pairs[0], prompt=prompt), *pairs[1:]]

    arguments = {"stage": "coldstart", "model_dir": mini_lab.base_dir, "cache_dir": tmp_path, "seed": 0}
    with pytest.raises(ValueError, match=r"train\.jsonl:1: made by base model 0123456789abcdef"):
        run_dpo(CONFIG, MODEL, pairs=marked("0123456789abcdef"), out_dir=tmp_path, **arguments)  # type: ignore[arg-type]
    own = marked(fingerprint(mini_lab.base_dir))
    run_dpo(replace(CONFIG, max_steps=1), MODEL, pairs=own, out_dir=tmp_path, **arguments)  # type: ignore[arg-type]


def test_sft_is_the_nll_term_of_the_cold_start(mini_lab: LabPaths, pairs: list[Pair], tmp_path: Path) -> None:
    policy = Policy.load(mini_lab.base_dir, MODEL, trainable=True)
    trees = [pair_tree(policy, pair) for pair in pairs]
    chosen = [replace(tree, responses=tree.responses[:1]) for tree in trees]
    metrics = sft_gradient(policy, chosen, CONFIG)
    logps = policy.score_in_batches(chosen, 4096)
    assert metrics["loss"] == pytest.approx(-float(torch.stack([logp.mean() for logp in logps]).mean()), rel=1e-5)
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    run_sft(CONFIG, MODEL, stage="sft", model_dir=mini_lab.base_dir, rows=rows, out_dir=tmp_path, seed=0)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]
    with pytest.raises(ValueError, match="response is empty"):
        run_sft(
            CONFIG,
            MODEL,
            stage="sft",
            model_dir=mini_lab.base_dir,
            rows=[(pairs[0].prompt, " ")],
            out_dir=tmp_path,
            seed=0,
        )

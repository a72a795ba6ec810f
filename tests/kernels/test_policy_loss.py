"""policy_loss: numeric anchors, clipping, the four aggregations, masks, micro-batches, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import policy_loss

LENGTHS = [2, 1, 4, 3]
IDS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(10, generator=generator, dtype=torch.float64)
    return {
        "logp": logp.clone().requires_grad_(),
        "old_logp": logp + 0.4 * torch.randn(10, generator=generator, dtype=torch.float64),
        "advantage": torch.randn(4, generator=generator, dtype=torch.float64)[IDS],
        "segment_ids": IDS,
        "ref_logp": logp + 0.4 * torch.randn(10, generator=generator, dtype=torch.float64),
    }


def per_token(x: dict[str, Tensor], low: float, high: float, beta: float) -> Tensor:
    """The loss of each token, one by one in Python."""
    losses = []
    for logp, old, advantage, ref in zip(x["logp"], x["old_logp"], x["advantage"], x["ref_logp"], strict=True):
        ratio = torch.exp(logp - old)
        clipped = min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high))
        objective = min(ratio * advantage, clipped * advantage)
        losses.append(-objective + beta * (torch.exp(ref - logp) - (ref - logp) - 1))
    return torch.stack(losses)


def expected_loss(losses: Tensor, aggregation: str, denominator: float | None) -> Tensor:
    means = torch.stack([part.mean() for part in losses.split(LENGTHS)])
    return {
        "dapo": losses.sum() / (denominator or 10),
        "bnpo": losses.mean(),
        "grpo": means.sum() / (denominator or 4),
        "dr_grpo": losses.sum() / (denominator or math.nan),
    }[aggregation]


@pytest.mark.parametrize(
    "aggregation, denominator",
    [("dapo", None), ("dapo", 37), ("bnpo", None), ("grpo", None), ("grpo", 16), ("dr_grpo", 64)],
)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_equals_the_formula_token_by_token(aggregation: str, denominator: float | None, beta: float) -> None:
    x = batch()
    loss, _ = policy_loss(
        **x, epsilon=0.2, epsilon_high=0.28, beta=beta, aggregation=aggregation, denominator=denominator
    )
    exact = expected_loss(per_token(x, 0.2, 0.28, beta), aggregation, denominator)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, x["logp"])[0], torch.autograd.grad(exact, x["logp"])[0])


@pytest.mark.parametrize("aggregation", ["dapo", "grpo"])
def test_on_policy_value_is_minus_mean_advantage_and_gradient_is_reinforce(aggregation: str) -> None:
    x = batch()
    del x["ref_logp"], x["old_logp"]
    loss, metrics = policy_loss(**x, old_logp=None, aggregation=aggregation)
    weights = torch.full((10,), 0.1, dtype=torch.float64)
    if aggregation == "grpo":
        weights = torch.cat([torch.full((n,), 0.25 / n, dtype=torch.float64) for n in LENGTHS])
    torch.testing.assert_close(loss.detach(), -(weights * x["advantage"]).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, x["logp"])[0], -weights * x["advantage"])
    assert float(metrics["ratio/mean"]) == pytest.approx(1.0)
    assert float(metrics["clip_ratio/region_mean"]) == 0.0
    assert "kl" not in metrics


@pytest.mark.parametrize(
    "ratio, advantage, objective, gradient",
    [
        (1.25, 1.0, 1.25, True),  # inside the upper bound of 1.28
        (1.30, 1.0, 1.28, False),  # clipped from above
        (1.30, -1.0, -1.30, True),  # too likely and bad: not clipped
        (0.75, -1.0, -0.80, False),  # clipped from below
        (0.75, 1.0, 0.75, True),  # too unlikely and good: not clipped
    ],
)
def test_asymmetric_clip_case_by_case(ratio: float, advantage: float, objective: float, gradient: bool) -> None:
    logp = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(
        logp,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([0]),
        epsilon=0.2,
        epsilon_high=0.28,
    )
    assert float(loss.detach()) == pytest.approx(-objective)
    assert (float(torch.autograd.grad(loss, logp)[0]) != 0) == gradient
    assert float(metrics["clip_ratio/high_mean"]) == (ratio > 1.28 and advantage > 0)
    assert float(metrics["clip_ratio/low_mean"]) == (ratio < 0.8 and advantage < 0)
    assert float(metrics["clip_ratio/region_mean"]) == (not gradient)
    assert float(metrics["ratio/mean"]) == pytest.approx(ratio)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("old", [-200.0, -math.inf])
def test_a_ratio_beyond_fp32_gives_no_nan(old: float, advantage: float) -> None:
    logp = torch.tensor([-0.5, -0.5], requires_grad=True)
    loss, metrics = policy_loss(logp, torch.tensor([old, -0.5]), torch.tensor([advantage, 1.0]), torch.tensor([0, 1]))
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(metrics["ratio/mean"].item())
    assert logp.grad is not None and logp.grad.tolist() == [0.0, -0.5]
    assert metrics["clip_ratio/high_mean"].item() == (0.5 if advantage > 0 else 0.0)


def test_epsilon_high_defaults_to_epsilon() -> None:
    x = batch()
    loss, _ = policy_loss(**x, epsilon=0.1)
    same, _ = policy_loss(**x, epsilon=0.1, epsilon_high=0.1)
    other, _ = policy_loss(**x, epsilon=0.1, epsilon_high=0.9)
    assert torch.equal(loss, same) and not torch.equal(loss, other)


def test_k3_anchor() -> None:
    logp = torch.tensor([-1.0], dtype=torch.float64)
    zero = torch.tensor([0.0], dtype=torch.float64)
    loss, metrics = policy_loss(logp, None, zero, torch.tensor([0]), beta=2.0, ref_logp=logp + 0.1)
    assert float(metrics["kl"]) == pytest.approx(0.0051709, abs=1e-7)
    assert float(loss.detach()) == pytest.approx(2 * 0.0051709, abs=2e-7)


def test_kl_is_a_metric_without_beta() -> None:
    x = batch()
    loss, metrics = policy_loss(**x)
    reference = x.pop("ref_logp")
    torch.testing.assert_close(policy_loss(**x)[0], loss)
    delta = (reference - x["logp"]).detach()
    torch.testing.assert_close(metrics["kl"], (delta.exp() - delta - 1).mean())


@pytest.mark.parametrize("aggregation, denominator", [("dapo", 10), ("grpo", 4), ("dr_grpo", 64)])
def test_micro_batches_with_global_counts_add_up_to_the_whole(aggregation: str, denominator: int) -> None:
    x = batch()
    options: dict[str, Any] = {"aggregation": aggregation, "denominator": torch.tensor(denominator), "beta": 0.1}
    whole, whole_metrics = policy_loss(**x, **options)
    parts = [policy_loss(**{k: v[keep] for k, v in x.items()}, **options) for keep in (IDS < 2, IDS >= 2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


@pytest.mark.parametrize("aggregation", ["dapo", "bnpo", "grpo"])
def test_masked_tokens_are_not_read_and_not_in_any_length(aggregation: str) -> None:
    x = batch()
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)  # segment 1 has no token left
    loss, metrics = policy_loss(**{k: v[mask] for k, v in x.items()}, aggregation=aggregation, beta=0.1)
    dirty = {k: v if k == "segment_ids" else torch.where(mask, v.detach(), torch.nan) for k, v in x.items()}
    dirty["logp"].requires_grad_()
    dirty["segment_ids"] = torch.where(mask, IDS, -5)
    masked_loss, masked = policy_loss(**dirty, mask=mask, aggregation=aggregation, beta=0.1)
    torch.testing.assert_close(masked_loss, loss)
    assert {k: float(v) for k, v in masked.items()} == pytest.approx({k: float(v) for k, v in metrics.items()})
    (grad,) = torch.autograd.grad(masked_loss, dirty["logp"])
    torch.testing.assert_close(grad, torch.autograd.grad(loss, x["logp"])[0])
    assert torch.equal(grad[~mask], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", ["dapo", "bnpo", "grpo"])
def test_nothing_to_learn_from_is_zero_with_a_graph(aggregation: str) -> None:
    x = batch()
    loss, metrics = policy_loss(**x, mask=torch.zeros(10, dtype=torch.bool), aggregation=aggregation)
    assert float(loss.detach()) == 0 and all(float(value) == 0 for value in metrics.values())
    assert torch.equal(torch.autograd.grad(loss, x["logp"])[0], torch.zeros(10, dtype=torch.float64))
    empty = {k: v[:0] for k, v in x.items()}
    policy_loss(**empty, aggregation=aggregation)[0].backward()


def test_order_of_segments_does_not_matter() -> None:
    x = batch()
    index = torch.cat([torch.arange(10).split(LENGTHS)[i] for i in (2, 0, 3, 1)])
    for aggregation in ("dapo", "grpo"):
        plain, _ = policy_loss(**x, aggregation=aggregation)
        torch.testing.assert_close(
            policy_loss(**{k: v[index] for k, v in x.items()}, aggregation=aggregation)[0], plain
        )


def test_only_logp_gets_a_gradient_and_metrics_are_0d_and_detached() -> None:
    x = batch()
    for name in ("old_logp", "advantage", "ref_logp"):
        x[name].requires_grad_()
    loss, metrics = policy_loss(**x, beta=0.1)
    loss.backward()
    assert x["logp"].grad is not None
    assert all(x[name].grad is None for name in ("old_logp", "advantage", "ref_logp"))
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert policy_loss(**{k: v if k == "segment_ids" else v.bfloat16() for k, v in x.items()})[0].dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logp": torch.zeros(2, 1)}, "logp must have 1 dimensions"),
        ({"old_logp": torch.zeros(3)}, r"old_logp must have shape \[2\]"),
        ({"advantage": torch.zeros(1)}, r"advantage must have shape \[2\]"),
        ({"advantage": torch.zeros(2, dtype=torch.int64)}, "advantage must be floating point"),
        ({"ref_logp": torch.zeros(2, 2)}, "ref_logp must have 1 dimensions"),
        ({"segment_ids": torch.tensor([0])}, r"segment_ids must have shape \[2\]"),
        ({"mask": [True, True]}, "mask must be a bool tensor"),
        ({"advantage": torch.zeros(2, device="meta")}, "must be on one device"),
        ({"kind": "gspo"}, "kind 'gspo' is not known; allowed: 'grpo'"),
        ({"aggregation": "mean"}, "aggregation 'mean' is not known; allowed: 'dapo', 'bnpo', 'grpo', 'dr_grpo'"),
        ({"epsilon": -0.1}, "epsilon must be a finite number of at least 0; got -0.1"),
        ({"epsilon_high": math.inf}, "epsilon_high must be a finite number of at least 0; got inf"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"beta": 0.1}, r"beta is 0.1: the KL term needs ref_logp \[N\]"),
        ({"denominator": 0}, "denominator must be a finite number above 0; got 0"),
        ({"denominator": torch.ones(1)}, "denominator must be a number or a 0-d tensor"),
        ({"aggregation": "dr_grpo"}, 'aggregation "dr_grpo" needs denominator='),
        ({"aggregation": "bnpo", "denominator": 3}, 'aggregation "bnpo" divides by the local token count'),
        ({"backend": "triton"}, "policy_loss has no backend 'triton' here; allowed: 'auto', 'reference'"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logp": torch.zeros(2),
        "old_logp": None,
        "advantage": torch.ones(2),
        "segment_ids": torch.tensor([0, 0]),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


def test_a_split_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="segment id 3 appears in several places"):
        policy_loss(torch.zeros(3), None, torch.ones(3), torch.tensor([3, 4, 3]))

"""preference_loss: numeric anchors, masks, pairs, normalisation over micro-batches, TRL's formula, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import preference_loss

PAIR = torch.tensor([[0, 1]])


def one_pair(margin: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two segments of two tokens whose summed log-ratios differ by ``margin``."""
    ref = torch.tensor([-1.0, -2.0, -0.5, -0.25], dtype=dtype)
    logp = ref + torch.tensor([0.75, 0.25, 0.5, 0.5 - margin], dtype=dtype)
    return logp.requires_grad_(), ref, torch.tensor([0, 0, 1, 1])


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    lengths = [3, 1, 5, 2, 4, 2]
    generator = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    ref = -2 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    return logp.requires_grad_(), ref, ids, lengths


@pytest.mark.parametrize("smoothing, expected", [(0.0, 0.201413), (0.1, 0.351413)])
def test_anchor_values_at_a_margin_of_one_and_a_half(smoothing: float, expected: float) -> None:
    loss, _ = preference_loss(*one_pair(1.5), PAIR, beta=1.0, label_smoothing=smoothing)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)


def test_no_margin_is_log_two_and_gradient_is_half_beta() -> None:
    logp, ref, ids = one_pair(0.0)
    loss, _ = preference_loss(logp, ref, ids, PAIR, beta=0.1)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, torch.tensor([-0.05, -0.05, 0.05, 0.05], dtype=torch.float64))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("nll_mode", ["sequence", "token"])
def test_equals_the_formula_written_per_sequence(smoothing: float, nll_mode: str) -> None:
    logp, ref, ids, lengths = batch()
    pairs = torch.tensor([[1, 0], [3, 2], [4, 5]])
    loss, metrics = preference_loss(
        logp, ref, ids, pairs, beta=0.3, label_smoothing=smoothing, nll_weight=0.7, nll_mode=nll_mode
    )
    policy, reference = logp.split(lengths), ref.split(lengths)
    s = [(p - r).sum() for p, r in zip(policy, reference, strict=True)]
    preference = torch.stack(
        [
            -(1 - smoothing) * F.logsigmoid(0.3 * (s[c] - s[r])) - smoothing * F.logsigmoid(-0.3 * (s[c] - s[r]))
            for c, r in pairs.tolist()
        ]
    ).mean()
    if nll_mode == "sequence":
        nll = -torch.stack([policy[c].mean() for c in (1, 3, 4)]).mean()
    else:
        nll = -torch.cat([policy[c] for c in (1, 3, 4)]).mean()
    torch.testing.assert_close(loss, preference + 0.7 * nll)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(preference + 0.7 * nll, logp)[0])
    chosen = [float(s[c].detach()) * 0.3 for c in (1, 3, 4)]
    rejected = [float(s[r].detach()) * 0.3 for r in (0, 2, 5)]
    expected = {
        "rewards/chosen": sum(chosen) / 3,
        "rewards/rejected": sum(rejected) / 3,
        "rewards/margins": (sum(chosen) - sum(rejected)) / 3,
        "rewards/accuracies": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 3,
        "logps/chosen": sum(float(policy[c].detach().sum()) for c in (1, 3, 4)) / 3,
        "logps/rejected": sum(float(policy[r].detach().sum()) for r in (0, 2, 5)) / 3,
        "preference_loss": float(preference.detach()),
        "nll_loss": float(nll.detach()),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def test_metrics_are_0d_and_detached() -> None:
    _, metrics = preference_loss(*one_pair(1.0), PAIR, nll_weight=1.0)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_gradcheck() -> None:
    logp, ref, ids, _ = batch()
    pairs = torch.tensor([[0, 1], [3, 2], [4, 2]])

    def run(logp: Tensor) -> Tensor:
        return preference_loss(logp, ref, ids, pairs, label_smoothing=0.1, nll_weight=0.5)[0]

    assert torch.autograd.gradcheck(run, (logp,))


def test_masked_tokens_are_not_read_and_not_in_any_length() -> None:
    logp, ref, ids, _ = batch()
    pairs = torch.tensor([[0, 2], [4, 5]])
    mask = torch.ones(17, dtype=torch.bool)
    mask[[1, 5, 12, 16]] = False
    loss, metrics = preference_loss(logp[mask], ref[mask], ids[mask], pairs, nll_weight=1.0)
    nan_logp = torch.where(mask, logp.detach(), torch.nan).requires_grad_()
    nan_ids = torch.where(mask, ids, 77)  # not even the segment id is read
    masked_loss, masked = preference_loss(
        nan_logp, torch.where(mask, ref, torch.nan), nan_ids, pairs, mask=mask, nll_weight=1.0
    )
    torch.testing.assert_close(masked_loss, loss)
    assert {k: float(v) for k, v in masked.items()} == pytest.approx({k: float(v) for k, v in metrics.items()})
    (grad,) = torch.autograd.grad(masked_loss, nan_logp)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, logp)[0])
    assert torch.equal(grad[~mask], torch.zeros(4, dtype=torch.float64))


def test_segments_may_come_in_any_order_with_any_ids() -> None:
    logp, ref, ids, lengths = batch()
    pairs = torch.tensor([[0, 1], [3, 2]])
    plain, _ = preference_loss(logp, ref, ids, pairs, nll_weight=1.0)
    order = [4, 1, 5, 0, 3, 2]
    index = torch.cat([torch.arange(17).split(lengths)[i] for i in order])
    renamed = torch.tensor([70, 3, 900, 41, 5, 6])
    shuffled, _ = preference_loss(logp[index], ref[index], renamed[ids][index], renamed[pairs], nll_weight=1.0)
    torch.testing.assert_close(shuffled, plain)


def test_micro_batches_with_global_counts_add_up_to_the_whole() -> None:
    logp, ref, ids, _ = batch()
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    options: dict[str, Any] = {"nll_weight": 0.5, "nll_mode": "token", "num_chosen_tokens": 12}
    whole, whole_metrics = preference_loss(logp, ref, ids, pairs, **options)
    parts = []
    for keep, some in ((ids < 2, pairs[:1]), (ids >= 2, pairs[1:])):
        parts.append(preference_loss(logp[keep], ref[keep], ids[keep], some, num_pairs=torch.tensor(3), **options))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_empty_completions_and_no_pairs_are_legal() -> None:
    logp, ref, ids = one_pair(1.0)
    loss, metrics = preference_loss(logp, ref, ids, torch.tensor([[0, 9]]), beta=1.0, nll_weight=1.0)
    assert float(metrics["logps/rejected"]) == 0
    assert float(loss.detach()) == pytest.approx(
        float(-F.logsigmoid(torch.tensor(1.0, dtype=torch.float64))) + 0.5 * 2.0
    )
    loss, metrics = preference_loss(logp, ref, ids, torch.zeros(0, 2, dtype=torch.int64), nll_weight=1.0)
    assert float(loss.detach()) == 0 and all(float(value) == 0 for value in metrics.values())
    assert torch.equal(torch.autograd.grad(loss, logp)[0], torch.zeros(4, dtype=torch.float64))
    empty = torch.zeros(0, requires_grad=True)
    loss, _ = preference_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.int64), PAIR)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    loss.backward()


def test_reference_gets_no_gradient_and_half_precision_is_summed_in_fp32() -> None:
    logp, ref, ids, _ = batch()
    ref.requires_grad_()
    loss, _ = preference_loss(logp.to(torch.bfloat16), ref.to(torch.bfloat16), ids, PAIR)
    assert loss.dtype == torch.float32
    loss.backward()
    assert ref.grad is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logp": torch.zeros(4, 1)}, "logp must have 1 dimensions"),
        ({"logp": torch.zeros(4, dtype=torch.int64)}, "logp must be floating point"),
        ({"ref_logp": torch.zeros(3)}, r"ref_logp must have shape \[4\]"),
        ({"ref_logp": None}, "ref_logp must be a tensor; got NoneType"),
        ({"segment_ids": torch.zeros(4)}, "segment_ids must be int64 or int32"),
        ({"segment_ids": torch.tensor([0, 1, 0, 1])}, "segment id 0 appears in several places"),
        ({"pairs": torch.tensor([0, 1])}, r"pairs must be an integer tensor \[P, 2\]"),
        ({"pairs": torch.tensor([[0, 1, 2]])}, r"pairs must have shape \[1, 2\]"),
        ({"mask": torch.ones(4)}, r"mask must be a bool tensor \[N\]"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must have shape \[4\]"),
        ({"ref_logp": torch.zeros(4, device="meta")}, "must be on one device"),
        ({"kind": "ipo"}, "kind 'ipo' is not known; allowed: 'sigmoid'"),
        ({"nll_mode": "mean"}, "nll_mode 'mean' is not known; allowed: 'sequence', 'token'"),
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5; got 0.5"),
        ({"nll_weight": -1.0}, "nll_weight must be a finite number of at least 0"),
        ({"num_pairs": 0}, "num_pairs must be a finite number above 0; got 0"),
        ({"num_pairs": torch.ones(2)}, "num_pairs must be a number or a 0-d tensor"),
        ({"num_chosen_tokens": 3}, 'num_chosen_tokens has no use with nll_mode="sequence"'),
        ({"backend": "chunked"}, "preference_loss has no backend 'chunked' here; allowed: 'auto', 'reference'"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logp": torch.zeros(4),
        "ref_logp": torch.zeros(4),
        "segment_ids": torch.tensor([0, 0, 1, 1]),
        "pairs": PAIR,
        **changes,
    }
    inputs = [arguments.pop(name) for name in ("logp", "ref_logp", "segment_ids", "pairs")]
    with pytest.raises(ValueError, match=message):
        preference_loss(*inputs, **arguments)

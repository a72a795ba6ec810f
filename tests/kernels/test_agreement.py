"""Agreement with the functions of TRL (1.16) and Liger (0.8.5) that trainers call today, imported, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import linear_logprob, linear_loss, preference_loss, selective_logprob

trl_utils = pytest.importorskip("trl.trainer.utils")
liger = pytest.importorskip("liger_kernel.chunked_loss")
liger_ppo = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo")
trl_chunked = pytest.importorskip("trl.kernels.chunked_logprob")

VOCAB, DIM = 37, 8


def make(count: int = 12, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, DIM, generator=generator, requires_grad=True)
    weight = (scale * torch.randn(VOCAB, DIM, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (count,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trls_functions_of_logits(temperature: float) -> None:
    hidden, weight, target = make()
    logits = (hidden @ weight.T).detach().requires_grad_()
    ours = selective_logprob(logits, target, temperature=temperature, return_entropy=True)
    theirs = trl_utils.selective_log_softmax_and_entropy(logits, target, temperature=temperature)
    assert ours.entropy is not None
    torch.testing.assert_close(ours.logp, theirs[0])
    torch.testing.assert_close(ours.entropy, theirs[1])
    torch.testing.assert_close(ours.logp, trl_utils.selective_log_softmax(logits, target, temperature=temperature))
    torch.testing.assert_close(ours.entropy, trl_utils.entropy_from_logits(logits / temperature))
    grads = [
        torch.autograd.grad(logp.sum() + ent.sum(), logits)[0] for logp, ent in ((ours.logp, ours.entropy), theirs)
    ]
    torch.testing.assert_close(*grads, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_trls_chunked_log_probs_from_hidden_states(softcap: float | None) -> None:
    hidden, weight, target = make()
    ours = linear_logprob(
        hidden, weight, target, temperature=0.7, softcap=softcap, logit_scale=1.5, return_entropy=True
    )
    logp, entropy, *_ = trl_chunked.ChunkedLogProbFunction.apply(
        hidden, weight, None, target, 0.7, 16, softcap, 1.5, ("entropy",)
    )
    torch.testing.assert_close(ours.logp, logp)
    torch.testing.assert_close(ours.entropy, entropy)
    assert ours.entropy is not None
    for a, b in zip(
        torch.autograd.grad(ours.logp.sum() + ours.entropy.sum(), (hidden, weight)),
        torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_ligers_selected_log_probs() -> None:
    hidden, weight, target = make()
    bias = torch.randn(VOCAB, requires_grad=True)
    ours = linear_logprob(hidden, weight, target, bias=bias, temperature=0.7).logp
    theirs = liger_ppo.LigerFusedLinearPPOBase.chunk_forward(
        hidden[None], weight, target[None], bias=bias, temperature=0.7
    )[0]
    torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1, 12)
    inputs = (hidden, weight, bias)
    for a, b in zip(
        torch.autograd.grad((weights * ours).sum(), inputs),
        torch.autograd.grad((weights * theirs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_ligers_fused_dpo_equals_linear_loss_over_pairs() -> None:
    """Two pairs of padded sequences; Liger averages over pairs, chosen sequences first."""
    hidden, weight, target = make(4 * 5)
    target[[4, 9, 13, 14]] = -100
    reference = torch.randn(4 * 5, DIM)
    loss_fn = liger.LigerFusedLinearDPOLoss(compiled=False, beta=0.3, average_log_prob=False)
    theirs = loss_fn(
        weight,
        hidden.view(4, 5, DIM),
        target.view(4, 5),
        ref_input=reference.view(4, 5, DIM),
        ref_weight=weight.detach(),
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    # In our order a pair is contiguous: chosen 0, rejected 0, chosen 1, rejected 1.
    order = torch.tensor([0, 2, 1, 3])
    rows = (order[:, None] * 5 + torch.arange(5)).flatten()
    sequence = torch.arange(4).repeat_interleave(5)
    ref_logp = linear_logprob(reference, weight.detach(), target)[0][rows]

    def pair_loss(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
        ratio = logp - ref_logp[index]
        sums = torch.zeros(4).index_add(0, sequence[index], ratio)
        seen = sequence[index].unique()
        margins = (sums[0::2] - sums[1::2])[seen[::2] // 2]
        return -F.logsigmoid(0.3 * margins).sum() / 2

    ours, _, _ = linear_loss(hidden, weight, target[rows], pair_loss, sequence // 2, rows=rows)
    torch.testing.assert_close(ours.detach(), theirs.detach())
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_linear_loss_with_our_own_preference_loss() -> None:
    """The library's losses are loss functions: the whole batch as one group, or by hand per pair."""
    hidden, weight, target = make(20)
    segments = torch.arange(4).repeat_interleave(5)
    reference = torch.randn(20)
    pairs = torch.tensor([[0, 1], [2, 3]])

    def loss_fn(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Any:
        return preference_loss(logp, reference[index], segments[index], pairs)

    loss, _, metrics = linear_loss(hidden, weight, target, loss_fn, torch.zeros(20, dtype=torch.long))
    exact, expected = preference_loss(linear_logprob(hidden, weight, target).logp, reference, segments, pairs)
    torch.testing.assert_close(loss, exact)
    assert set(expected) < set(metrics)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)

"""Mean logit and top-1 against the dense logits."""

from __future__ import annotations

import pytest
import torch

from specs_fast.integrations import logit_metrics
from specs_fast.integrations.logit_metrics import mean_and_top1


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("slice_elements", [1 << 23, 40])
def test_mean_and_top1_equal_those_of_dense_logits(
    softcap: float | None, with_bias: bool, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_metrics, "_SLICE_ELEMENTS", slice_elements)
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 8), torch.randn(31, 8)
    bias = torch.randn(31) if with_bias else None
    z = 0.7 * hidden @ weight.T + (0.0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    target = torch.where(torch.arange(40) % 2 == 0, z.argmax(1), torch.randint(0, 31, (40,)))
    temperature = 0.3
    logp = (z / temperature).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    top1 = z.argmax(1) == target
    assert ((logp > -0.6931) & top1).any() and ((logp < -0.6931) & top1).any() and (~top1).any()
    got_mean, got_top1 = mean_and_top1(hidden, weight, bias, target, logp, softcap=softcap, logit_scale=0.7)
    torch.testing.assert_close(got_mean, z.mean(1))
    assert got_top1.equal(top1)


def test_of_equal_scores_the_first_is_the_argmax() -> None:
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    logp = torch.full((2,), -1.6)
    assert mean_and_top1(hidden, weight, None, torch.tensor([0, 3]), logp)[1].tolist() == [True, False]


def test_no_tokens_give_empty_results() -> None:
    mean, top1 = mean_and_top1(
        torch.ones(0, 3), torch.ones(5, 3), None, torch.zeros(0, dtype=torch.long), torch.zeros(0)
    )
    assert mean.shape == top1.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_token_without_scores_is_not_right(softcap: float | None) -> None:
    hidden = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.nan, 0.0]])
    weight, target = torch.eye(2), torch.tensor([0, 0, 1])
    logp = (hidden @ weight.T).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    assert mean_and_top1(hidden, weight, None, target, logp, softcap=softcap)[1].tolist() == [True, False, False]

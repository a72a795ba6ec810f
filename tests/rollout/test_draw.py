"""Drawing tokens: the right distribution, truncation as transformers does it, randomness that belongs to the row."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from specs_fast.rollout.draw import Truncation, draw, row_uniforms


def support(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """How often each token is drawn on a fine grid of uniforms: its probability, to 1 / 20000."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens = draw(logits.expand(len(grid), -1), grid, truncation)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / len(grid)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (0.8, 6), (0.01, 0), (1.0, 1), (1.0, 99)])
def test_draws_follow_the_truncated_distribution(top_p: float, top_k: int) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 20))(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = support(logits, Truncation(top_p, top_k))
    torch.testing.assert_close(got, expected.softmax(-1)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_forbidden_tokens_are_never_drawn_even_at_the_ends(uniform: float) -> None:
    logits = torch.full((4, 9), -torch.inf)
    logits[:, 3] = torch.tensor([0.0, 30.0, -30.0, 1.0])
    logits[1, 5] = -60.0
    tokens = draw(logits, torch.full((4,), uniform, dtype=torch.float64), Truncation())
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_a_rows_stream_is_its_own() -> None:
    rows = [(0, 0), (0, 1), (3, 0)]
    together = row_uniforms(5, rows, 8)
    assert torch.equal(row_uniforms(5, [(3, 0)], 8)[0], together[2])
    assert torch.equal(row_uniforms(5, rows, 4), together[:, :4])
    assert not torch.equal(row_uniforms(6, rows, 8), together)
    assert len(together.unique()) == together.numel()


@pytest.mark.parametrize("settings", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Truncation(**settings)

"""Windows of a vision tower, as one batch per size and as one packed row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from separate_runs import relative_error, separate_scores, weighted_gradients
from tiny_models import VISION_MODELS, make_model, mixed_trees
from torch import Tensor, nn

from specs_fast.models import attention, score
from specs_fast.models.attention import forest_windows, grouped_windows, vision_varlen_attention, windows_layout
from specs_fast.models.load import enable_gradient_checkpointing
from specs_kernels import dispatch

SIZES = [3, 7, 0, 7, 1, 16, 5]
needs_native = pytest.mark.skipif(
    dispatch.unavailable("native") is not None, reason=str(dispatch.unavailable("native"))
)


def make(sizes: list[int], heads: int = 2, dim: int = 10) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(sizes), heads, dim, generator=generator).requires_grad_() for _ in range(3)]
    return rows, torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each packed call that sees both ways."""
    calls: list[int] = []
    run = attention.packed_attention

    def counting(query: Tensor, key: Tensor, value: Tensor, layout: Any, **options: Any) -> Any:
        if layout.bidirectional:
            calls.append(layout.num_tokens)
        return run(query, key, value, layout, **options)

    monkeypatch.setattr(attention, "packed_attention", counting)
    return calls


@pytest.mark.parametrize("windows", [forest_windows, grouped_windows])
@pytest.mark.parametrize("sizes", [SIZES, [4, 4, 4], [9]])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_each_patch_sees_its_window_and_nothing_else(windows: Any, sizes: list[int], scale: float | None) -> None:
    rows, cu_seq_lens = make(sizes)
    query, key, value = (row.double() for row in rows)
    of_patch = torch.repeat_interleave(torch.tensor(sizes))
    scores = torch.einsum("ihd,jhd->hij", query, key) * (10**-0.5 if scale is None else scale)
    scores = scores.masked_fill(of_patch[:, None] != of_patch[None, :], -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
    out = windows(*rows, cu_seq_lens, scale)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad((expected * upstream).sum(), rows)
    for ours, true in zip(torch.autograd.grad((out * upstream).sum(), rows), exact, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("sizes, calls", [([5] * 20, []), (SIZES, [sum(SIZES)])])
def test_windows_that_differ_in_size_run_as_one_call(
    sizes: list[int], calls: list[int], packed_calls: list[int]
) -> None:
    rows, cu_seq_lens = make(sizes)
    inputs = [row.transpose(0, 1)[None] for row in rows]
    out, _ = vision_varlen_attention(nn.Identity(), *inputs, None, cu_seq_lens_q=cu_seq_lens)
    torch.testing.assert_close(out[0], grouped_windows(*rows, cu_seq_lens, None))
    assert packed_calls == calls
    assert windows_layout(cu_seq_lens) is windows_layout(cu_seq_lens)


@pytest.mark.parametrize("kind", VISION_MODELS)
def test_towers_without_the_native_library_equal_separate_runs(
    kind: str, packed_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_as_forest", lambda *_: False)
    model, trees = make_model(kind), mixed_trees(kind)
    expected, logp = separate_scores(model, trees)[0], score(model, trees, packing="shared").logp
    assert packed_calls == []
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert relative_error(weighted_gradients(model, logp), weighted_gradients(model, expected)) < 1e-5


@needs_native
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_towers_on_packed_windows_equal_separate_runs(kind: str, checkpointing: bool, packed_calls: list[int]) -> None:
    model, trees = make_model(kind), mixed_trees(kind)
    expected = separate_scores(model, trees)[0]
    expected_gradients = weighted_gradients(model, expected)
    assert packed_calls == []
    if checkpointing:
        enable_gradient_checkpointing(model)
    logp = score(model, trees, packing="shared").logp
    assert packed_calls == [52] * len(model.model.visual.blocks)  # 24 + 24 + 4 patches
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert relative_error(weighted_gradients(model, logp), expected_gradients) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(score(model, trees, packing="shared").logp, expected, atol=0.3, rtol=0)

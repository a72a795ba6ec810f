"""The Triton kernels of packed_attention against its definition in fp64: forests, options, head dims, isolation, strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forests import Forest, forests
from torch import Tensor

from specs_kernels import PackedLayout, packed_attention
from specs_kernels.packed_attention import library, triton_blocks
from specs_kernels.packed_attention import triton as kernels

HALVES = (torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative Frobenius error: a few roundings of the dtype."""
BLOCKS = {"forward": (16, 32), "query": (16, 16), "key": (16, 32), "value": (32, 16)}

Blocks = Callable[..., None]


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """Small blocks, so that short rows have several; a test may ask for others, or for another number classified at once."""

    def use(sizes: dict[str, tuple[int, int]], scan: int = 128) -> None:
        monkeypatch.setattr(kernels, "tile_for", lambda kernel, *_: kernels.Tile(*sizes[kernel], 4, 1))
        monkeypatch.setattr(kernels, "_SCAN", scan)

    use(BLOCKS)
    return use


def make_inputs(
    layout: PackedLayout, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def evaluate(
    inputs: list[Tensor], layout: PackedLayout, backend: str, parts: tuple[str, ...] = ("out", "lse"), **options: Any
) -> list[Tensor]:
    """out, lse, and the three gradients for fixed upstream gradients of the outputs named."""
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for name, part in (("out", out), ("lse", lse)):
        upstream = torch.randn(part.shape, generator=generator).bfloat16()
        if name in parts:
            total = total + (part * upstream.to(part.dtype)).double().sum()
    grads = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def check(inputs: list[Tensor], layout: PackedLayout, parts: tuple[str, ...] = ("out", "lse"), **options: Any) -> None:
    ours = evaluate(inputs, layout, "triton", parts, **options)
    exact = evaluate([x.detach().double().requires_grad_() for x in inputs], layout, "reference", parts, **options)
    assert [x.dtype for x in ours] == [inputs[0].dtype, torch.float32, *(x.dtype for x in inputs)]
    bound = BOUNDS[inputs[0].dtype]
    for name, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        # A gradient may cancel to nearly 0: errors are measured against rows of ordinary size.
        scale = max(float(reference.norm()), 0.1 * math.sqrt(reference.numel()))
        assert mine.shape == reference.shape
        assert float((mine.double() - reference).norm()) <= (1e-6 if name == "lse" else bound) * scale, name


def layout_of(forest: Forest) -> PackedLayout:
    return PackedLayout.from_segments(forest.lengths, forest.parents, bidirectional=forest.spans)


TREE = PackedLayout.from_segments(
    [21, 18, 0, 9, 11, 25, 1, 13], [-1, 0, 1, 2, 1, 0, -1, 6], bidirectional=[(3, 11), (39, 45), (60, 84), (84, 85)]
)
"""98 tokens: spans across blocks of 16 and 32, an empty segment, a root of one token."""


@settings(max_examples=10, deadline=None)
@given(
    forest=forests(max_segments=7, max_length=20),
    fold=st.sampled_from([1, 3]),
    softcap=st.sampled_from([None, 1.5]),
    window=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 99),
)
def test_random_forests(forest: Forest, fold: int, softcap: float | None, window: int | None, seed: int) -> None:
    layout = layout_of(forest)
    check(make_inputs(layout, fold, 1, 4, seed=seed), layout, softcap=softcap, window=window, scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": 17}, {"softcap": 2.0}, {"softcap": 2.0, "window": 30, "scale": -0.4}], ids=str
)
def test_options_and_dtypes(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_inputs(TREE, 2, 1, 16, dtype), TREE, **options)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2), (5, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    layout = PackedLayout.from_segments([20, 9, 7], [-1, 0, 0])
    check(make_inputs(layout, heads, kv_heads, 8), layout)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [
        *((d, torch.float16) for d in (1, 32, 64, 72, 80, 96, 128, 192, 256)),
        *((d, torch.float32) for d in (24, 64, 80, 128)),
    ],
    ids=str,
)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """fp32 is padded in memory, half precision is masked; beyond 128, dK and dV are two launches."""
    layout = PackedLayout.from_segments([12, 9], [-1, 0])
    check(make_inputs(layout, 1, 1, head_dim, dtype), layout)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33])
def test_row_lengths_around_the_blocks(num_tokens: int) -> None:
    prompt = num_tokens // 2
    layout = PackedLayout.from_segments([prompt, num_tokens - prompt], [-1, 0])
    check(make_inputs(layout, 1, 1, 8), layout)


@pytest.mark.parametrize("scan", [1, 2, 4])
def test_runs_of_blocks_longer_than_what_is_classified_at_once(blocks: Blocks, scan: int) -> None:
    blocks(dict.fromkeys(BLOCKS, (16, 16)), scan)
    layout = PackedLayout.from_segments([50, 35, 34, 10], [-1, 0, 0, -1])
    check(make_inputs(layout, 1, 1, 8), layout, window=60)


@pytest.mark.parametrize("lengths, parents", [([], []), ([0], [-1])])
def test_a_row_without_tokens(lengths: list[int], parents: list[int]) -> None:
    layout = PackedLayout.from_segments(lengths, parents)
    inputs = make_inputs(layout, 4, 2, 8)
    out, lse, *grads = evaluate(inputs, layout, "triton")
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("parts", [("out",), ("lse",)], ids=str)
def test_each_upstream_gradient_alone(parts: tuple[str, ...]) -> None:
    layout = PackedLayout.from_segments([20, 9, 7], [-1, 0, 0])
    check(make_inputs(layout, 2, 1, 8), layout, parts, softcap=3.0)


@pytest.mark.parametrize("leaf", [0, 2])
def test_gradients_that_nobody_asks_for_are_not_made(leaf: int) -> None:
    layout = PackedLayout.from_segments([20, 9], [-1, 0])
    inputs = make_inputs(layout, 1, 1, 8)
    everything = evaluate(inputs, layout, "triton")
    alone = [x if i == leaf else x.detach() for i, x in enumerate(inputs)]
    out, lse = packed_attention(*alone, layout, return_lse=True, backend="triton")
    generator = torch.Generator().manual_seed(5)
    total = sum((part * torch.randn(part.shape, generator=generator).bfloat16()).sum() for part in (out, lse))
    assert isinstance(total, Tensor)
    torch.testing.assert_close(torch.autograd.grad(total, alone[leaf])[0], everything[2 + leaf])


@pytest.mark.parametrize("damage", [3.0, torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"window": 12, "softcap": 2.0}], ids=str)
def test_siblings_and_other_trees_are_isolated_bit_for_bit(options: dict[str, Any], damage: float) -> None:
    """Whatever they hold, outputs and gradients of the others do not change by one bit; all share blocks with each other."""
    layout = PackedLayout.from_segments([9, 5, 7, 6, 5, 8], [-1, 0, 0, 2, 0, -1])
    clean = make_inputs(layout, 2, 1, 8)
    hurt = (layout.segment_ids == 1) | (layout.segment_ids == 4)
    unrelated = ~hurt & (layout.segment_ids != 0)
    dirty = [torch.where(hurt[:, None, None], damage, x.detach()).requires_grad_() for x in clean]
    results = []
    for inputs in (clean, dirty):
        out, lse = packed_attention(*inputs, layout, return_lse=True, backend="triton", **options)
        upstream = torch.where(hurt, damage, 1.0)[:, None]
        grads = torch.autograd.grad(
            (out, lse), inputs, (upstream[..., None].expand(out.shape), upstream.expand(lse.shape))
        )
        results.append((out, lse, *grads))
    for n, (before, after) in enumerate(zip(*results, strict=True)):
        others = ~hurt if n < 3 else unrelated  # the prompt's keys get gradients from its responses
        assert torch.equal(before[others], after[others])
        if damage != 3.0:
            assert after[hurt].flatten(1).isnan().any(1).all()


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("damage", [torch.nan, -torch.inf])
def test_a_bad_token_is_seen_by_those_that_see_it_and_stays_in_its_tree(name: str, damage: float) -> None:
    layout = PackedLayout.from_segments([30, 10, 20, 5], [-1, 0, 0, -1])
    inputs = make_inputs(layout, 2, 1, 8)
    index = ("query", "key", "value").index(name)
    with torch.no_grad():
        inputs[index][14, 0, 3] = damage
    out, lse, *grads = evaluate(inputs, layout, "triton", softcap=2.0)
    rows = torch.arange(65)
    sees = (rows == 14) if name == "query" else (rows >= 14) & (rows < 60)
    head = out[:, :1] if name == "query" else out
    assert head[sees].isnan().flatten(1).any(1).all() and head[~sees].isfinite().all()
    assert all(x[60:].isfinite().all() for x in (out, lse, *grads))
    assert grads[1][14].isnan().any() and grads[0][14].isnan().any()


def test_repeats_are_bitwise_equal() -> None:
    inputs = make_inputs(TREE, 2, 1, 16, torch.bfloat16)
    first, again = (evaluate(inputs, TREE, "triton", window=40) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["heads first", "inner", "expanded"])
def test_any_strides(kind: str) -> None:
    layout = PackedLayout.from_segments([20, 9], [-1, 0])
    inputs = [x.detach() for x in make_inputs(layout, 2, 2, 8)]
    views = {
        "heads first": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs],
        "inner": [x.repeat_interleave(2, 2)[..., ::2] for x in inputs],
        "expanded": [x[:, :1].expand(x.shape) for x in inputs],
    }[kind]
    assert not any(x.is_contiguous() for x in views)
    check([x.requires_grad_() for x in views], layout)


def test_offsets_beyond_32_bits() -> None:
    """A stride that needs 64 bits; the storage is committed only where it is touched."""
    stride = 2**31 + 64
    storage = torch.empty(stride + 16, dtype=torch.float16)
    far = storage.as_strided((2, 1, 16), (stride, 16, 1))
    layout = PackedLayout.from_segments([2], [-1])
    plain = [x.detach() for x in make_inputs(layout, 1, 1, 16, torch.float16)]
    far.copy_(plain[0])
    options = kernels.Options(layout, 0.25, None, None)
    out, lse, sound = kernels.attention_forward(far, far, far, options)
    near = [plain[0].clone().requires_grad_() for _ in range(3)]
    expected = packed_attention(*near, layout, scale=0.25, backend="triton")
    assert torch.equal(out, expected)
    grads = kernels.attention_backward(far, far, far, sound, out, lse, far, None, options)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, near, plain[0]), strict=True):
        assert ours is not None and torch.equal(ours, theirs)


def test_scores_far_from_0() -> None:
    layout = PackedLayout.from_segments([20, 9], [-1, 0])
    query, key, value = make_inputs(layout, 1, 1, 8)
    for shift in (-1e4, 1e4):  # q . k shifts by a constant per row
        moved = [
            torch.cat([x.detach(), torch.ones(29, 1, 1) * y], 2) for x, y in ((query, 1.0), (key, shift), (value, 0.0))
        ]
        out, lse = packed_attention(*moved, layout, scale=1.0, return_lse=True, backend="triton")
        exact, exact_lse = packed_attention(
            *(x.double() for x in moved), layout, scale=1.0, return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)


def test_fp64_and_wide_heads_are_refused_by_name() -> None:
    layout = PackedLayout.from_segments([3], [-1])
    with pytest.raises(ValueError, match='"triton" takes fp16, bf16 or fp32; got torch.float64'):
        packed_attention(*make_inputs(layout, 1, 1, 8, torch.float64), layout, backend="triton")
    with pytest.raises(ValueError, match='"triton" takes heads of at most 256 in torch.bfloat16; query has 257'):
        packed_attention(*make_inputs(layout, 1, 1, 257, torch.bfloat16), layout, backend="triton")
    with pytest.raises(ValueError, match='"triton" takes heads of at most 128 in torch.float32; query has 129'):
        packed_attention(*make_inputs(layout, 1, 1, 129), layout, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (2,)], ids=str)
def test_the_operator_that_graphs_hold_equals_the_call(wanted: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = PackedLayout.from_segments([40, 9, 0, 20], [-1, 0, 0, 0], bidirectional=[(3, 30)])
    inputs = make_inputs(layout, 4, 2, 20, dtype)
    leaves = [tensor if n in wanted else tensor.detach() for n, tensor in enumerate(inputs)]
    ours = library.OPERATOR(*leaves, layout.description, 0.3, 2.0, 25, "triton")
    call = packed_attention(*leaves, layout, scale=0.3, softcap=2.0, window=25, return_lse=True, backend="triton")
    asked = [inputs[n] for n in wanted]
    upstream = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for results in zip(
        (*ours, *torch.autograd.grad((ours[0] * upstream).sum(), asked)),
        (*call, *torch.autograd.grad((call[0] * upstream).sum(), asked)),
        strict=True,
    ):
        assert torch.equal(*results)


def test_second_derivative_is_refused() -> None:
    layout = PackedLayout.from_segments([3], [-1])
    query, key, value = make_inputs(layout, 1, 1, 8)
    out = packed_attention(query, key, value, layout, backend="triton")
    with pytest.raises(RuntimeError, match="packed_attention is differentiable once"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


@settings(max_examples=60, deadline=None)
@given(forest=forests(max_length=30), block=st.sampled_from([1, 4, 16]))
def test_bounds_of_blocks_hold_for_their_tokens(forest: Forest, block: int) -> None:
    layout = layout_of(forest)
    num_tokens = layout.num_tokens
    if num_tokens == 0:
        return
    bounds = triton_blocks.block_bounds(layout, block)
    assert bounds is triton_blocks.block_bounds(layout, block) and bounds.dtype == torch.int32
    mask = forest.visible(None)
    seen, sees = mask.any(0), mask.any(1)
    assert seen.all() and sees.all()
    count = -(-num_tokens // block)
    for order in (triton_blocks.QUERY_ORDER, triton_blocks.KEY_ORDER):
        assert bounds[order.value].sort().values.tolist() == list(range(count))
    for n in range(count):
        tokens = slice(n * block, (n + 1) * block)
        queries, keys = mask[:, tokens].any(1).nonzero(), mask[tokens].any(0).nonzero()
        assert bounds[triton_blocks.FIRST_FROM.value, n] == int(queries.min())
        assert bounds[triton_blocks.LAST_UNTIL.value, n] == int(queries.max()) + 1
        assert bounds[triton_blocks.FIRST_KEY.value, n] <= int(keys.min())
        assert bounds[triton_blocks.END_KEY.value, n] >= int(keys.max()) + 1

"""packed_attention in C++: every instruction set, how the row is cut, threads, memory, odd head sizes."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from packed_forests import Forest, forests
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specs_kernels import PackedLayout, native, packed_attention
from specs_kernels.packed_attention import native_plan

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
WIDEST = 3


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs with each instruction set this processor has."""
    wanted = ("portable", "avx2", "avx512").index(request.param)
    try:
        if torch.ops.specs_kernels.native_limit_isa(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        torch.ops.specs_kernels.native_limit_isa(WIDEST)


def inputs_of(layout: PackedLayout, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout.num_tokens, h, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def everything(inputs: list[Tensor], layout: PackedLayout, backend: str, **options: float | int | None) -> list[Tensor]:
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in (out, lse)
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 64, 72, 80, 96, 128, 192, 256])
def test_every_head_size_and_instruction_set_in_fp64(instruction_set: str, head_dim: int) -> None:
    layout = PackedLayout.from_segments(
        [70, 20, 9, 31, 0, 40], [-1, 0, 1, 1, 0, -1], bidirectional=[(10, 40), (130, 139)]
    )
    inputs = inputs_of(layout, 6, 2, head_dim, torch.float64)
    for options in ({}, {"softcap": 3.0, "window": 25, "scale": 0.4}):
        exact = everything(inputs, layout, "reference", **options)
        for ours, theirs in zip(everything(inputs, layout, "native", **options), exact, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 100}], ids=["plain", "softcap", "window"])
def test_fp32_error_is_within_twice_that_of_plain_pytorch(instruction_set: str, options: dict[str, float]) -> None:
    layout = PackedLayout.from_segments([300, 90, 77, 150, 64], [-1, 0, 0, -1, 3])
    inputs = inputs_of(layout, 4, 2, 64, torch.float32)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = everything(doubles, layout, "reference", **options)
    plain = everything(inputs, layout, "reference", **options)
    ours = everything(inputs, layout, "native", **options)
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        error, allowed = (mine - truth).norm(), 2 * (torchs - truth).norm() + 1e-6 * truth.norm()
        assert error <= allowed


def test_sums_over_many_queries_and_keys_are_as_exact_as_plain_pytorchs(instruction_set: str) -> None:
    """Terms of one sign: one running sum over 1,500 keys, or 12,000 queries, would lose an order of magnitude."""
    layout = PackedLayout.from_segments([1500], [-1])
    query, key, value = inputs_of(layout, 8, 1, 16, torch.float32)
    with torch.no_grad():
        query.mul_(0.1), value.add_(1.0)

    def run(inputs: list[Tensor], backend: str) -> list[Tensor]:
        out = packed_attention(*inputs, layout, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), inputs[2])]

    exact = run([x.detach().double().requires_grad_() for x in (query, key, value)], "chunked")
    plain, ours = run([query, key, value], "reference"), run([query, key, value], "native")
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (torchs - truth).norm()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0, 1e4])
def test_exp_and_softmax_over_the_whole_range(instruction_set: str, sharpness: float) -> None:
    """Equal scores, ordinary ones, and ones so sharp that all but one probability underflow."""
    layout = PackedLayout.from_segments([130, 40], [-1, 0])
    query, key, value = inputs_of(layout, 2, 2, 16, torch.float32)
    with torch.no_grad():
        query.mul_(sharpness)
    ours = everything([query, key, value], layout, "native")
    exact = everything([x.detach().double().requires_grad_() for x in (query, key, value)], layout, "reference")
    for index in (0, 1):
        torch.testing.assert_close(ours[index].double(), exact[index], rtol=2e-5, atol=2e-5 * max(1.0, sharpness))
    assert all(torch.isfinite(x).all() for x in ours)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """A tree that is cut into several parts (more than 2^18 visible pairs) beside small ones."""
    layout = PackedLayout.from_segments([700, 300, 300, 20, 1, 9], [-1, 0, 0, -1, 3, 3])
    inputs = inputs_of(layout, 4, 2, 16, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(inputs, layout, "native")
        torch.set_num_threads(3)
        together = everything(inputs, layout, "native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_parts_of_a_large_tree_add_up_to_the_definition() -> None:
    layout = PackedLayout.from_segments([500, 400, 390], [-1, 0, 0])
    inputs = inputs_of(layout, 2, 1, 16, torch.float64)
    for ours, exact in zip(everything(inputs, layout, "native"), everything(inputs, layout, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-11, rtol=1e-11)


def test_order_of_siblings_does_not_matter_bit_for_bit() -> None:
    one = PackedLayout.from_segments([33, 5, 18], [-1, 0, 0])
    two = PackedLayout.from_segments([33, 18, 5], [-1, 0, 0])
    moved = torch.cat([torch.arange(33), torch.arange(38, 56), torch.arange(33, 38)])
    inputs = inputs_of(one, 4, 2, 16, torch.float32)
    swapped = [x.detach()[moved].requires_grad_() for x in inputs]
    out, lse = packed_attention(*inputs, one, return_lse=True, backend="native")
    out_two, lse_two = packed_attention(*swapped, two, return_lse=True, backend="native")
    assert torch.equal(out[moved], out_two) and torch.equal(lse[moved], lse_two)


@pytest.mark.parametrize("short", [0, 2, 64])
@settings(max_examples=60, deadline=None)
@given(forest=forests(max_segments=14, max_length=5))
def test_runs_cover_the_row_and_lead_to_the_whole_path(short: int, forest: Forest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_plan, "SHORT", short)
        plan = native_plan.native_plan(
            PackedLayout.from_segments(forest.lengths, forest.parents, bidirectional=forest.spans)
        )
    order = list(range(forest.num_tokens)) if plan.order is None else plan.order.tolist()
    assert sorted(order) == list(range(forest.num_tokens)) and (short or plan.order is None)
    if plan.places is not None:
        assert [order[place] for place in plan.places.tolist()] == list(range(forest.num_tokens))
    runs = plan.runs.tolist()
    assert [start for start, *_ in runs] == [0, *(end for _, end, *_ in runs)][: len(runs)]
    assert (runs[-1][1] if runs else 0) == forest.num_tokens
    visible = forest.visible(None)
    for index, (start, end, _, _) in enumerate(runs):
        for place in range(start, end):
            run, position = index, runs[index][3]
            seen = [order[at] for at in range(start, end) if plan.visible_from[at] <= place]
            while (above := runs[run][2]) >= 0:
                seen += order[runs[above][0] : runs[above][0] + position - runs[above][3]]
                run, position = above, runs[above][3]
            assert sorted(seen) == visible[order[place]].nonzero().flatten().tolist()


def test_a_chain_of_segments_is_one_run_and_empty_ones_leave_no_trace() -> None:
    def table(lengths: list[int], parents: list[int]) -> list[list[int]]:
        return native_plan.native_plan(PackedLayout.from_segments(lengths, parents)).runs.tolist()

    assert table([3, 0, 2, 4], [-1, 0, 1, 2]) == [[0, 9, -1, 0]]
    branched = table([3, 0, 2, 4, 1], [-1, 0, 1, 1, -1])
    assert branched == [[0, 3, -1, 0], [3, 5, 0, 3], [5, 9, 0, 3], [9, 10, -1, 0]]


def caterpillar(depth: int, length: int = 1) -> PackedLayout:
    """A path of short segments, each with a sibling that has no child: a search over single tokens."""
    parents = [-1]
    for level in range(depth):
        parents += [2 * level, 2 * level]  # 2 level is on the path: the second of its pair
    return PackedLayout.from_segments([length] * len(parents), parents)


def test_short_runs_go_on_into_their_largest_child_and_prompts_stay() -> None:
    plan = native_plan.native_plan(caterpillar(1000))
    assert plan.runs.shape[0] == 1002  # the path, and what ends beside it and at its end
    assert plan.runs[0].tolist() == [0, 1000, -1, 0] and set(plan.runs[1:, 2].tolist()) == {0}
    assert native_plan.native_plan(PackedLayout.from_segments([5, 3, 4, 90], [-1, 0, 0, 0])).order is None
    long = PackedLayout.from_segments([64, 64, 9, 9, 3], [-1, 0, 1, 1, 0])
    assert native_plan.native_plan(long).order is None


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "window": 70}], ids=["plain", "softcap and window"])
def test_deep_trees_of_short_segments_are_exact_and_a_sibling_stays_by_itself(
    instruction_set: str, options: dict[str, float]
) -> None:
    layout = caterpillar(90, 2)
    inputs = inputs_of(layout, 4, 2, 16, torch.float64)
    ours = everything(inputs, layout, "native", **options)
    for mine, exact in zip(ours, everything(inputs, layout, "reference", **options), strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=1e-11)
    hurt = layout.segment_ids == 41  # beside the path
    assert layout.subtree_ends[41] == layout.segment_starts[42]
    dirty = [torch.where(hurt[:, None, None], torch.nan, x.detach()).requires_grad_() for x in inputs]
    out, lse = packed_attention(*dirty, layout, return_lse=True, backend="native", **options)
    assert torch.equal(out[~hurt], ours[0][~hurt]) and torch.equal(lse[~hurt], ours[1][~hurt])
    assert out[hurt].isnan().all()


def test_memory_is_linear_in_tokens() -> None:
    """70,000 tokens in one segment with a window: the dense scores would be 20 GB, the process grows by far less."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = PackedLayout.from_segments([70_000], [-1])
    inputs = [torch.randn(70_000, 1, 16).requires_grad_() for _ in range(3)]
    packed_attention(*inputs, layout, window=64, backend="native").sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_ten_thousand_segments() -> None:
    layout = PackedLayout.from_segments([2] * 10_000, [-1 if i % 10 == 0 else i - i % 10 for i in range(10_000)])
    inputs = inputs_of(layout, 2, 1, 16, torch.float32)
    out = packed_attention(*inputs, layout, backend="native")
    small = PackedLayout.from_segments([2] * 10, [-1] + [0] * 9)
    last = [x[-20:] for x in inputs]
    assert torch.equal(out[-20:], packed_attention(*last, small, backend="native"))


def test_seventy_thousand_tokens_of_many_segments() -> None:
    """100 trees of a prompt and 8 responses; the last one has the bits that it has alone."""
    prompt, response, group, trees = 300, 50, 8, 100
    parents = [p for t in range(trees) for p in [-1] + [t * (group + 1)] * group]
    layout = PackedLayout.from_segments(([prompt] + [response] * group) * trees, parents)
    assert layout.num_tokens == 70_000
    inputs = inputs_of(layout, 2, 1, 16, torch.float32)
    size = layout.num_tokens // trees
    small = PackedLayout.from_segments([prompt] + [response] * group, [-1] + [0] * group)
    last = [x[-size:].detach().requires_grad_() for x in inputs]
    out, alone = (packed_attention(*x, to, backend="native") for x, to in ((inputs, layout), (last, small)))
    assert torch.equal(out[-size:], alone)
    grads, own = (torch.autograd.grad(x.square().sum(), of) for x, of in ((out, inputs), (alone, last)))
    assert all(torch.equal(ours[-size:], theirs) for ours, theirs in zip(grads, own, strict=True))


@pytest.mark.parametrize("head_dim", [8, 16])
def test_an_empty_row_of_any_strides_has_empty_gradients(head_dim: int) -> None:
    layout = PackedLayout.from_segments([0], [-1])
    rows = torch.empty(0, 2, 2 * head_dim)[..., ::2].requires_grad_()
    out, lse = packed_attention(rows, rows, rows, layout, return_lse=True, backend="native")
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), rows)
    assert out.shape == grad.shape == (0, 2, head_dim)


def test_a_layout_met_while_tracing_still_serves_real_tensors() -> None:
    layout = PackedLayout.from_segments([5, 3], [-1, 0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = packed_attention(*(torch.zeros(8, 1, 16) for _ in range(3)), layout, backend="native")
    assert fake.shape == (8, 1, 16)
    with torch.device("meta"):
        out = packed_attention(*(torch.zeros(8, 1, 16, device="cpu") for _ in range(3)), layout, backend="native")
    assert out.device.type == "cpu" and not out.any()


@pytest.mark.parametrize("head_dim", [8, 16])
def test_outputs_are_contiguous_and_writing_into_them_is_safe(head_dim: int) -> None:
    layout = PackedLayout.from_segments([5, 3], [-1, 0])
    inputs = inputs_of(layout, 2, 1, head_dim, torch.float32)
    expected = torch.autograd.grad((packed_attention(*inputs, layout, backend="native") * 2).sum(), inputs)
    out = packed_attention(*inputs, layout, backend="native")
    assert out.is_contiguous()
    total = out.mul_(2).sum()
    if head_dim == 16:  # the backward needs it
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, inputs)
    else:
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(total, inputs), expected, strict=True))


def test_ops_refuse_what_would_read_out_of_bounds() -> None:
    query = torch.randn(4, 2, 16)
    seen = torch.arange(4, dtype=torch.int32)
    op = torch.ops.specs_kernels.packed_attention_forward
    for runs in ([[0, 5, -1, 0]], [[0, 2, -1, 0], [3, 4, -1, 0]], [[0, 4, 0, 0]], [[0, 4, -2, 0]]):
        with pytest.raises(RuntimeError, match="runs must cover"):
            op(query, query, query, seen, torch.tensor(runs), 1.0, 0.0, 0)
    for runs in ([[0, 1, -1, 0], [1, 2, -1, 0], [2, 4, 0, 1]], [[0, 2, -1, 0], [2, 4, 0, 3]], [[0, 4, -1, 9]]):
        with pytest.raises(RuntimeError, match="a run must be below one of its own tree and begin where"):
            op(query, query, query, seen, torch.tensor(runs), 1.0, 0.0, 0)
    with pytest.raises(RuntimeError, match="D a multiple of 16"):
        op(
            query[..., :8].contiguous(),
            query[..., :8],
            query[..., :8],
            seen,
            torch.tensor([[0, 4, -1, 0]]),
            1.0,
            0.0,
            0,
        )
    with pytest.raises(RuntimeError, match="float32 or float64"):
        half = query.half()
        op(half, half, half, seen, torch.tensor([[0, 4, -1, 0]]), 1.0, 0.0, 0)

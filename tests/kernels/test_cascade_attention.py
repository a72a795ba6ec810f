"""The cascade of packed_attention on the stand-in for its pieces: exact over any forest, calls by depth, what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forests import Forest, forests, make_inputs
from torch import Tensor

from specs_kernels import PackedLayout, dispatch, packed_attention, varlen, verify
from specs_kernels.packed_attention import cascade_plan as plans
from specs_kernels.packed_attention.cascade_plan import cascade_plan

DEEP = ([9, 4, 7, 0, 5, 3, 1, 8, 6, 2], [-1, 0, 0, 2, 3, 4, 4, 2, -1, 8])
"""Two trees; three runs above some tokens, an empty segment, single tokens."""


@pytest.fixture(autouse=True)
def on_the_stand_in() -> Iterator[None]:
    with varlen.use("stand-in"):
        yield


def evaluate(inputs: tuple[Tensor, ...], layout: PackedLayout, backend: str, **options: Any) -> list[Tensor]:
    """out, lse, and the three gradients for a fixed upstream gradient of out."""
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend=backend, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out, lse, *torch.autograd.grad((out * upstream).sum(), inputs)]


class Calls:
    """Counts the calls of the stand-in and keeps their arguments and results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = varlen.choose("cpu")
        self.forward: list[tuple[Any, ...]] = []
        self.backward: list[tuple[Any, ...]] = []
        self.parts: list[tuple[Tensor, ...]] = []
        """Results of either, before the cascade adds to them."""

        def run(calls: list[tuple[Any, ...]], function: Any, *args: Any) -> tuple[Tensor, ...]:
            calls.append(args)
            results = function(*args)
            self.parts.append(tuple(x.clone() for x in results))
            return results

        counting = library._replace(
            forward=partial(run, self.forward, library.forward), backward=partial(run, self.backward, library.backward)
        )
        monkeypatch.setitem(varlen._LIBRARIES, "stand-in", lambda: counting)


@settings(max_examples=100, deadline=None)
@given(
    forest=forests(max_segments=12, max_length=15, spans=False),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2)]),
    head_dim=st.sampled_from([1, 4, 8]),
    scale=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 99),
)
def test_random_forests_equal_the_dense_definition(
    forest: Forest, heads: tuple[int, int], head_dim: int, scale: float | None, seed: int
) -> None:
    layout = PackedLayout.from_segments(forest.lengths, forest.parents)
    inputs = make_inputs(layout, *heads, head_dim, seed)
    ours = evaluate(inputs, layout, "cascade", scale=scale)
    for mine, exact in zip(ours, evaluate(inputs, layout, "reference", scale=scale), strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("trees", [1, 3])
def test_binary_trees_take_one_call_for_each_run_of_the_longest_path(
    monkeypatch: pytest.MonkeyPatch, depth: int, trees: int
) -> None:
    calls = Calls(monkeypatch)
    parents: list[int] = []

    def grow(parent: int, below: int) -> None:
        segment = len(parents)
        parents.append(parent)
        for _ in range(2 if below else 0):
            grow(segment, below - 1)

    for _ in range(trees):
        grow(-1, depth - 1)
    lengths = [1 + (5 * i) % 7 for i in range(len(parents))]
    layout = PackedLayout.from_segments(lengths, parents)
    inputs = make_inputs(layout, 4, 2, 8)
    ours = evaluate(inputs, layout, "cascade")
    assert len(calls.forward) == len(calls.backward) == depth
    for mine, exact in zip(ours, evaluate(inputs, layout, "reference"), strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=1e-11)


def test_prompts_and_responses_take_two_calls_and_flat_rows_and_chains_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, parents, expected in (
        (([5] + [3] * 4) * 6, [p for tree in range(6) for p in [-1] + [5 * tree] * 4], 2),
        ([4, 1, 6], [-1, -1, -1], 1),
        ([4, 0, 1, 6], [-1, 0, 1, 2], 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch)
            layout = PackedLayout.from_segments(lengths, parents)
            evaluate(make_inputs(layout, 2, 1, 4), layout, "cascade")
            assert (len(calls.forward), len(calls.backward)) == (expected, expected)


def test_every_piece_of_the_backward_gets_the_final_out_and_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    layout = PackedLayout.from_segments(*DEEP)
    inputs = make_inputs(layout, 4, 2, 8)
    out, lse, *_ = evaluate(inputs, layout, "cascade")
    own, *above = calls.backward
    assert torch.equal(own[4], out) and torch.equal(own[5], lse.t())
    assert len(above) == len(cascade_plan(layout).above) == 3
    for call, prefixes in zip(above, cascade_plan(layout).above, strict=True):
        tokens = torch.arange(layout.num_tokens)[prefixes.query_rows]
        assert torch.equal(call[4], out[tokens]) and torch.equal(call[5], lse.t()[:, tokens])
        assert call[5].is_contiguous()


@settings(max_examples=150, deadline=None)
@given(forest=forests(max_segments=12, max_length=6, spans=False))
def test_pieces_hold_every_visible_pair_once_and_no_empty_sequence(forest: Forest) -> None:
    layout = PackedLayout.from_segments(forest.lengths, forest.parents)
    if layout.num_tokens == 0:
        return
    plan = cascade_plan(layout)
    pairs = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    everything = slice(0, layout.num_tokens)
    for queries, keys, sequences in ((everything, everything, plan.own), *plan.above):
        query_rows, key_rows = (torch.arange(layout.num_tokens)[rows] for rows in (queries, keys))
        starts = [starts.tolist() for starts in (sequences.query_starts, sequences.key_starts)]
        sizes = [torch.tensor(s).diff() for s in starts]
        assert [s[-1] for s in starts] == [len(query_rows), len(key_rows)]
        assert [int(size.min()) for size in sizes] >= [1, 1]
        assert [int(size.max()) for size in sizes] == [sequences.max_queries, sequences.max_keys]
        assert sequences.query_starts.dtype == sequences.key_starts.dtype == torch.int32
        for s in range(sequences.number):
            q, k = query_rows[starts[0][s] : starts[0][s + 1]], key_rows[starts[1][s] : starts[1][s + 1]]
            pairs[q[:, None], k] += torch.ones(len(q), len(k), dtype=torch.int64).tril() if sequences is plan.own else 1
    assert torch.equal(pairs, layout.dense_mask().long())
    assert plan.longest_path == int(layout.position_ids.max()) + 1


@pytest.mark.parametrize("lengths, parents", [([6, 1, 9, 4], [-1] * 4), ([3, 4, 5, 6], [-1, 0, 1, -1])])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_window_where_nothing_is_shared(lengths: list[int], parents: list[int], window: int) -> None:
    layout = PackedLayout.from_segments(lengths, parents)
    inputs = make_inputs(layout, 4, 2, 8)
    ours = evaluate(inputs, layout, "cascade", window=window)
    for mine, exact in zip(ours, evaluate(inputs, layout, "reference", window=window), strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-11, rtol=1e-11)


def test_window_as_long_as_the_longest_path_is_no_window() -> None:
    layout = PackedLayout.from_segments(*DEEP)
    longest = int(layout.position_ids.max()) + 1
    assert longest < layout.num_tokens - 1
    inputs = make_inputs(layout, 4, 2, 8)
    whole = evaluate(inputs, layout, "cascade")
    for window in (longest, longest + 1):
        assert all(map(torch.equal, evaluate(inputs, layout, "cascade", window=window), whole))
    with pytest.raises(
        ValueError, match=f"no window across segments; window is {longest - 1}, the longest path has {longest}"
    ):
        evaluate(inputs, layout, "cascade", window=longest - 1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"softcap": 3.0}, 'backend "cascade" has no softcap; it is 3.0; use backend "triton"'),
        ({"scale": 0.0}, "no scale of 0 or less; it is 0.0"),
        ({"scale": -0.5}, "no scale of 0 or less; it is -0.5"),
        ({"window": 4}, "window is 4, .* and a prefix is shared"),
    ],
)
def test_options_that_pieces_lack_raise_by_name(options: dict[str, Any], words: str) -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    with pytest.raises(ValueError, match=words):
        packed_attention(*make_inputs(layout, 2, 1, 8), layout, backend="cascade", **options)


def test_spans_raise_unless_they_are_single_tokens() -> None:
    spans = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0], bidirectional=[(0, 1), (6, 8)])
    with pytest.raises(ValueError, match=r"no bidirectional spans; the layout has one at \(6, 8\)"):
        packed_attention(*make_inputs(spans, 2, 1, 8), spans, backend="cascade")
    single = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0], bidirectional=[(0, 1)])
    inputs = make_inputs(single, 2, 1, 8)
    for mine, exact in zip(*(evaluate(inputs, single, name) for name in ("cascade", "reference")), strict=True):
        torch.testing.assert_close(mine, exact)


def test_gradient_of_lse_raises_and_lse_itself_does_not() -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 2, 1, 8)
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend="cascade")
    for loss in (lse.sum(), out.sum() + lse.sum()):
        with pytest.raises(RuntimeError, match='backend "cascade" has no gradient of lse.*use lse.detach'):
            torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.autograd.grad(out.sum() + lse.detach().sum(), inputs)


def test_a_cpu_has_no_pieces_and_auto_never_takes_the_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 2, 1, 8)
    assert "cascade" in dispatch.backends("packed_attention")
    assert dispatch.choose("packed_attention").backend != "cascade"
    assert "the stand-in" in dispatch.choose("packed_attention", "cascade").reason
    monkeypatch.setattr(varlen, "_asked", None)
    with pytest.raises(ValueError, match="no backend 'cascade' here .varlen attention of .* not on cpu"):
        packed_attention(*inputs, layout, backend="cascade")
    assert "cascade" not in dispatch.backends("packed_attention")
    assert dispatch.choose("packed_attention", "cascade", "cuda").reason.endswith(f"of torch {torch.__version__})")
    on_gpu = dispatch.choose("packed_attention", device="cuda")
    assert on_gpu.backend == "chunked" and "cascade runs by name" in on_gpu.reason


@pytest.mark.parametrize("damage", [3.0, torch.nan, torch.inf])
def test_siblings_and_other_trees_are_isolated_bit_for_bit(damage: float) -> None:
    layout = PackedLayout.from_segments([9, 4, 7, 5, 3, 8, 2], [-1, 0, 0, 2, 0, -1, 5])
    clean = make_inputs(layout, 4, 2, 8, dtype=torch.float32)
    for hurt, spared in (
        (layout.segment_ids == 1, layout.segment_ids != 1),  # a response: all but itself
        (layout.segment_ids == 0, layout.segment_ids >= 5),  # a prompt: the other tree
    ):
        dirty = tuple(torch.where(hurt[:, None, None], torch.full_like(x, damage), x.detach()) for x in clean)
        results = []
        for inputs in (clean, tuple(x.requires_grad_() for x in dirty)):
            out, lse = packed_attention(*inputs, layout, return_lse=True, backend="cascade")
            results.append((out, lse, *torch.autograd.grad(out[spared].sum(), inputs)))
        out, lse, grad_query, grad_key, grad_value = zip(*results, strict=True)
        for before, after in (out, lse, grad_query):
            assert torch.equal(before[spared], after[spared])
        below = layout.segment_ids > 0 if hurt[9] else layout.segment_ids >= 5  # a prefix's sums hold its responses'
        for before, after in (grad_key, grad_value):
            assert torch.equal(before[spared & below], after[spared & below])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_errors_of_results(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_segments(*DEEP)
    inputs = make_inputs(layout, 4, 2, 8, dtype=dtype)
    results = evaluate(inputs, layout, "cascade")
    exact = evaluate(tuple(x.detach().double().requires_grad_() for x in inputs), layout, "reference")
    assert [x.dtype for x in results] == [dtype, torch.float32, dtype, dtype, dtype]
    bound = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[dtype]
    for mine, reference in zip(results, exact, strict=True):
        assert float((mine.detach().double() - reference.detach()).norm() / reference.detach().norm()) < bound / 2
        torch.testing.assert_close(mine.double(), reference, atol=bound, rtol=bound)


def test_results_of_several_pieces_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, what the pieces return is merged and summed in fp32: half a unit in the last place from exact merges of them."""
    calls = Calls(monkeypatch)
    layout = PackedLayout.from_segments([20] * 7, [-1, 0, 1, 2, 2, 1, 0])
    inputs = make_inputs(layout, 4, 2, 16, dtype=torch.bfloat16)
    out, _, *grads = evaluate(inputs, layout, "cascade")
    plan = cascade_plan(layout)
    assert len(plan.above) == 3
    everything = slice(0, layout.num_tokens)
    rows = [(everything, everything), *((queries, keys) for queries, keys, _ in plan.above)]

    scores = torch.full((4, layout.num_tokens, 4), -torch.inf, dtype=torch.float64)
    parts = torch.zeros(4, *out.shape, dtype=torch.float64)
    sums = [torch.zeros(x.shape, dtype=torch.float64) for x in grads]
    for n, (queries, keys) in enumerate(rows):
        part, lse = calls.parts[n]
        parts[n, queries], scores[n, queries] = part.detach().double(), lse.detach().t().double()
        for total, grad, where in zip(sums, calls.parts[4 + n], (queries, keys, keys), strict=True):
            total[where] += grad.double()
    exact = (torch.softmax(scores, 0)[..., None] * parts).sum(0)
    for mine, merged in zip((out.detach(), *grads), (exact, *sums), strict=True):
        assert bool(((mine.double() - merged).abs() <= 2**-8 * 1.001 * merged.abs() + 1e-6).all())


def test_results_are_bitwise_repeatable_and_inputs_stay_as_they_are() -> None:
    layout = PackedLayout.from_segments(*DEEP)
    inputs = make_inputs(layout, 4, 2, 8, dtype=torch.bfloat16)
    before = [x.detach().clone() for x in inputs]
    first = evaluate(inputs, layout, "cascade")
    assert all(map(torch.equal, evaluate(inputs, layout, "cascade"), first))
    assert all(map(torch.equal, inputs, before))


def test_strided_inputs_and_upstream_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, misaligned and expanded ones; what the kernels could not load is copied."""
    calls = Calls(monkeypatch)
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    query, key, value = make_inputs(layout, 4, 2, 8)
    plain = packed_attention(query, key, value, layout, backend="cascade")
    wanted = torch.autograd.grad(plain, (query, key, value), torch.ones_like(plain))
    padded = torch.randn(12, 2, 24, dtype=torch.float64)
    padded[..., 1:9] = key.detach()
    strided = [
        query.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        padded[..., 1:9].requires_grad_(),
        value.detach().mT.contiguous().mT.requires_grad_(),
    ]
    out = packed_attention(strided[0], strided[1], strided[2], layout, backend="cascade")
    grads = torch.autograd.grad(out, strided, torch.ones((), dtype=torch.float64).expand(out.shape))
    for ours, exact in zip((out, *grads), (plain, *wanted), strict=True):
        torch.testing.assert_close(ours, exact)
    for tensor in (
        tensor for call in (*calls.forward, *calls.backward) for tensor in call if isinstance(tensor, Tensor)
    ):
        if tensor.dim() == 3:
            token, head, element = tensor.stride()
            assert (
                element == 1 and token > 0 and head > 0 and not (token % 8 or head % 8 or tensor.storage_offset() % 8)
            )
    shared = key.detach()[:, :1].expand(12, 2, 8)
    torch.testing.assert_close(
        packed_attention(query, shared, shared, layout, backend="cascade"),
        packed_attention(query, shared, shared, layout, backend="reference"),
    )


@pytest.mark.parametrize("lengths, parents", [([], []), ([0], [-1]), ([0, 0], [-1, 0])])
def test_a_row_without_tokens_calls_nothing(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], parents: list[int]
) -> None:
    calls = Calls(monkeypatch)
    layout = PackedLayout.from_segments(lengths, parents)
    inputs = make_inputs(layout, 4, 2, 8, dtype=torch.float32)
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend="cascade")
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4) and not calls.forward
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), inputs)] == [(0, 4, 8), (0, 2, 8), (0, 2, 8)]


def test_single_tokens() -> None:
    layout = PackedLayout.from_segments([1, 1, 1, 1], [-1, 0, 0, -1])
    inputs = make_inputs(layout, 4, 2, 8)
    for mine, exact in zip(*(evaluate(inputs, layout, name) for name in ("cascade", "reference")), strict=True):
        torch.testing.assert_close(mine, exact)


def test_plan_is_made_once_per_layout_even_if_first_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    make = plans._make
    monkeypatch.setattr(plans, "_make", lambda *args: built.append(args) or make(*args))
    layout = PackedLayout.from_segments(*DEEP)
    inputs = make_inputs(layout, 4, 2, 8)
    with torch.inference_mode():
        packed_attention(*(x.detach() for x in inputs), layout, backend="cascade")
    for _ in range(3):
        packed_attention(*inputs, layout, backend="cascade").sum().backward()
    assert len(built) == 1


def test_host_work_of_a_plan_does_not_grow_with_tokens() -> None:
    """The same lines run for segments a thousand times as long."""
    counts = []

    def count_lines(frame: FrameType, event: str, arg: Any) -> Any:
        counts[-1] += event == "line"
        return count_lines

    before = sys.gettrace()
    for factor in (1, 1000):
        layout = PackedLayout.from_segments([factor * length for length in DEEP[0]], DEEP[1])
        counts.append(0)
        sys.settrace(count_lines)
        try:
            cascade_plan(layout)
        finally:
            sys.settrace(before)
    assert counts[0] == counts[1] > 0


def test_ten_thousand_segments() -> None:
    layout = PackedLayout.from_segments([6, *[3] * 9] * 1000, [p for t in range(1000) for p in [-1] + [10 * t] * 9])
    plan = cascade_plan(layout)
    assert plan.own.number == 10_000 and len(plan.above) == 1
    assert plan.above[0].sequences.number == 1000 and plan.above[0].sequences.max_queries == 27
    rows = plan.above[0].query_rows
    assert isinstance(rows, Tensor) and torch.equal(rows, (layout.position_ids >= 6).nonzero().squeeze(1))


def test_autocast_does_not_lower_the_precision() -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 4, 2, 8, dtype=torch.float32)
    plain = packed_attention(*inputs, layout, backend="cascade")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = packed_attention(*inputs, layout, backend="cascade")
        grads = torch.autograd.grad(inside.sum(), inputs)
    assert torch.equal(inside, plain)
    assert all(map(torch.equal, grads, torch.autograd.grad(plain.sum(), inputs)))


def test_second_derivative_is_refused() -> None:
    layout = PackedLayout.from_segments([3], [-1])
    inputs = make_inputs(layout, 1, 1, 2)
    out = packed_attention(*inputs, layout, backend="cascade")
    with pytest.raises(RuntimeError, match="packed_attention is differentiable once"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_compiled_callers_break_their_graph_here_and_agree() -> None:
    layout = PackedLayout.from_segments(*DEEP)
    inputs = make_inputs(layout, 4, 2, 8)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(2 * query, key, value, layout, backend="cascade") * 3

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend="eager")(*inputs), run(*inputs))


def test_the_choice_of_another_backend_stays_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces it for every call of packed_attention, whatever runs."""
    monkeypatch.setattr(varlen, "_asked", None)

    def run(x: Tensor) -> Tensor:
        return x * (2 if varlen.missing(x.device) else 3)

    torch._dynamo.reset()
    assert float(torch.compile(run, fullgraph=True, backend="eager")(torch.ones(()))) == 2


def test_verify_covers_the_cascade_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_asked", None)
    results = [result for result in verify.verify(["packed_attention"]) if result.backend == "cascade"]
    assert varlen._asked is None
    assert all(result.passed for result in results)
    cases = {"deep, gradient of out alone", "flat, window, gradient of out alone"}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    heads = {f"heads of {size}" for size in (64, 72, 80, 96, 128, 192, 256)}
    assert {(r.case, r.dtype) for r in results} == {
        *((case, dtype) for case in cases for dtype in dtypes),
        *((case, dtype) for case in heads for dtype in dtypes[:3]),
    }

"""packed_attention: random forests against dense fp64, separate runs, sibling isolation, memory, errors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forests import Forest, forests, make_inputs
from torch import Tensor

from specs_kernels import PackedLayout, native, packed_attention
from specs_kernels.packed_attention import chunked, plan

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())))
each_backend = pytest.mark.parametrize("backend", ["chunked", NATIVE])
each_and_reference = pytest.mark.parametrize("backend", ["reference", "chunked", NATIVE])

LIMITS = {
    (plan, "BLOCK_TOKENS"): [256, 2, 5],
    (plan, "JOIN_TOKENS"): [96, 0, 3],
    (plan, "GROUP_COST"): [50_000, 0, 100],
    (plan, "MASK_ENTRIES"): [1 << 22, 0],
    (chunked, "TILE_SCORES"): [1 << 19, 1, 17, 100],
}


@dataclass(frozen=True)
class Problem:
    forest: Forest
    kv_heads: int
    fold: int
    head_dim: int
    options: dict[str, Any]
    limits: dict[tuple[Any, str], int]
    seed: int


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    options = {
        "scale": draw(st.sampled_from([None, 0.7])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "window": draw(st.sampled_from([None, None, 1, 2, 5])),
    }
    limits = {key: draw(st.sampled_from(values)) for key, values in LIMITS.items()}
    sizes = [draw(st.sampled_from(values)) for values in ([1, 2], [1, 3], [1, 4])]
    return Problem(draw(forests(max_length=20)), *sizes, options, limits, draw(st.integers(0, 99)))


def evaluate(inputs: tuple[Tensor, ...], layout: PackedLayout, backend: str, **options: Any) -> list[Tensor]:
    """out, lse, and the three gradients for fixed upstream gradients of both outputs."""
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for part in (out, lse):
        total = total + (part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum()
    return [out, lse, *torch.autograd.grad(total, inputs)]


@each_backend
@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_random_forests_equal_the_dense_definition(backend: str, problem: Problem) -> None:
    forest = problem.forest
    layout = PackedLayout.from_segments(forest.lengths, forest.parents, bidirectional=forest.spans)
    inputs = make_inputs(layout, problem.kv_heads * problem.fold, problem.kv_heads, problem.head_dim, problem.seed)
    exact = evaluate(inputs, layout, "reference", **problem.options)
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in problem.limits.items():
            patch.setattr(module, name, value)
        ours = evaluate(inputs, layout, backend, **problem.options)
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-11, rtol=1e-11)


@each_and_reference
@pytest.mark.parametrize("window", [None, 4])
def test_equals_each_path_run_separately(backend: str, window: int | None) -> None:
    """Log-sum-exp and output of a response equal plain causal attention over its own path, key heads repeated."""
    forest = Forest([5, 3, 4, 0, 2, 6], [-1, 0, 1, 0, 3, -1], [])
    layout = PackedLayout.from_segments(forest.lengths, forest.parents)
    query, key, value = make_inputs(layout, 4, 2, 8)
    out = packed_attention(query, key, value, layout, window=window, backend=backend)
    for segment in range(6):
        path = forest.path_tokens(segment)
        q, k, v = (x[path].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(len(path))[:, None] - torch.arange(len(path))
        mask = (distance >= 0) & (distance < (window or len(path) + 1))
        separate = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), attn_mask=mask
        ).transpose(0, 1)
        torch.testing.assert_close(out[forest.tokens(segment)], separate[len(path) - forest.lengths[segment] :])


@each_backend
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(backend: str, return_lse: bool, softcap: float | None) -> None:
    layout = PackedLayout.from_segments([3, 2, 2], [-1, 0, 0], bidirectional=[(0, 2)])
    inputs = make_inputs(layout, 2, 1, 2)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return packed_attention(query, key, value, layout, softcap=softcap, return_lse=return_lse, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)


@each_backend
def test_gradient_of_lse_alone(backend: str) -> None:
    layout = PackedLayout.from_segments([3, 2, 2], [-1, 0, 0])
    inputs = make_inputs(layout, 2, 1, 2)
    grads = []
    for name in (backend, "reference"):
        _, lse = packed_attention(*inputs, layout, return_lse=True, backend=name)
        grads.append(torch.autograd.grad(lse.square().sum(), inputs, allow_unused=True, materialize_grads=True))
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact)


@each_backend
@pytest.mark.parametrize("damage", [3.0, torch.nan, torch.inf])
@pytest.mark.parametrize("window", [None, 6])
def test_siblings_are_isolated_bit_for_bit(backend: str, damage: float, window: int | None) -> None:
    """Whatever a sibling (or another tree) holds, outputs and input gradients of the others do not change by one bit."""
    layout = PackedLayout.from_segments([9, 4, 7, 5, 3, 8], [-1, 0, 0, 2, 0, -1])
    clean = make_inputs(layout, 4, 2, 8, dtype=torch.float32)
    hurt = layout.segment_ids == 1
    dirty = tuple(torch.where(hurt[:, None, None], torch.full_like(x, damage), x.detach()) for x in clean)
    dirty = tuple(x.requires_grad_() for x in dirty)
    results = []
    for inputs in (clean, dirty):
        out, lse = packed_attention(*inputs, layout, return_lse=True, window=window, backend=backend)
        others = out[~hurt].sum() + lse[~hurt].sum()
        results.append((out, lse, torch.autograd.grad(others, inputs)[0]))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[~hurt], after[~hurt])


@each_backend
def test_bidirectional_windows_of_a_vision_tower_are_separate_full_attention(backend: str) -> None:
    lengths = [4, 6, 4, 9, 4]
    starts = [sum(lengths[:i]) for i in range(5)]
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    layout = PackedLayout.from_segments(lengths, [-1] * 5, bidirectional=spans)
    query, key, value = make_inputs(layout, 2, 2, 4)
    out = packed_attention(query, key, value, layout, backend=backend)
    for start, end in spans:
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        torch.testing.assert_close(out[start:end], F.scaled_dot_product_attention(q, k, v).transpose(0, 1))


@pytest.mark.parametrize("lengths, parents", [([], []), ([0], [-1]), ([0, 0], [-1, 0])])
@each_and_reference
def test_a_row_without_tokens(lengths: list[int], parents: list[int], backend: str) -> None:
    layout = PackedLayout.from_segments(lengths, parents)
    inputs = make_inputs(layout, 4, 2, 3)
    out, lse, *grads = evaluate(inputs, layout, backend)
    assert out.shape == (0, 4, 3) and lse.shape == (0, 4)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]


@each_backend
def test_strided_inputs(backend: str) -> None:
    layout = PackedLayout.from_segments([5, 3], [-1, 0])
    query, key, value = make_inputs(layout, 4, 2, 6)
    plain = packed_attention(query, key, value, layout, backend=backend)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    assert torch.equal(packed_attention(strided[0], strided[1], strided[2], layout, backend=backend), plain)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_results(backend: str, dtype: torch.dtype) -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 4, 2, 8, dtype=dtype)
    out, lse = packed_attention(*inputs, layout, return_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact, exact_lse = packed_attention(*(x.double() for x in inputs), layout, return_lse=True, backend="reference")
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), exact, atol=bound, rtol=bound)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    assert all(grad.dtype == dtype for grad in torch.autograd.grad(out.float().sum(), inputs))


@each_backend
def test_results_are_bitwise_repeatable(backend: str) -> None:
    layout = PackedLayout.from_segments([60, 30, 41, 17, 60, 33], [-1, 0, 0, 0, -1, 4])
    inputs = make_inputs(layout, 4, 2, 16, dtype=torch.float32)
    first = evaluate(inputs, layout, backend)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(inputs, layout, backend), first, strict=True))


def test_nothing_of_size_t_by_t_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long segment, a prompt with many responses and a window: every tensor stays far below T x T."""
    monkeypatch.setattr(plan, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(chunked, "TILE_SCORES", 2048)
    monkeypatch.setattr(plan, "GROUP_COST", 1000)
    monkeypatch.setattr(plan, "MASK_ENTRIES", 2048)
    layout = PackedLayout.from_segments([160, 32] + [12] * 10, [-1, -1] + [1] * 10)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    inputs = make_inputs(layout, 2, 1, 4)
    for window in (None, 40):
        with Watch():
            out = packed_attention(*inputs, layout, window=window, backend="chunked")
            torch.autograd.grad(out.sum(), inputs)
    assert layout.num_tokens == 312
    assert largest < layout.num_tokens**2 / 15


def test_plan_is_made_once_per_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = plan._build
    monkeypatch.setattr(plan, "_build", lambda *args: built.append(args) or build(*args))
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 4, 2, 8)
    with torch.inference_mode():
        packed_attention(*(x.detach() for x in inputs), layout, backend="chunked")
    for _ in range(3):
        packed_attention(*inputs, layout, backend="chunked").sum().backward()
    assert len(built) == 1
    packed_attention(*inputs, layout, window=3, backend="chunked")
    assert len(built) == 2


@each_backend
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    layout = PackedLayout.from_segments([5, 3, 4], [-1, 0, 0])
    inputs = make_inputs(layout, 4, 2, 8, dtype=torch.float32)
    plain = packed_attention(*inputs, layout, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = packed_attention(*inputs, layout, backend=backend)
        grads = torch.autograd.grad(inside.sum(), inputs)
    assert torch.equal(inside, plain)
    for ours, exact in zip(grads, torch.autograd.grad(plain.sum(), inputs), strict=True):
        assert torch.equal(ours, exact)


@each_backend
def test_second_derivative_is_refused(backend: str) -> None:
    layout = PackedLayout.from_segments([3], [-1])
    query, key, value = make_inputs(layout, 1, 1, 2)
    out = packed_attention(query, key, value, layout, backend=backend)
    with pytest.raises(RuntimeError, match="packed_attention is differentiable once"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


@each_backend
def test_transforms_of_torch_func_are_refused_by_name_and_the_reference_takes_them(backend: str) -> None:
    layout = PackedLayout.from_segments([3, 2], [-1, 0])
    inputs = [x.detach() for x in make_inputs(layout, 2, 1, 2)]
    several = [torch.stack([x, 2 * x]) for x in inputs]

    def run(query: Tensor, key: Tensor, value: Tensor, name: str = backend) -> Tensor:
        return packed_attention(query, key, value, layout, backend=name)

    for transformed in (lambda: torch.vmap(run)(*several), lambda: torch.func.grad(lambda *x: run(*x).sum())(*inputs)):
        with pytest.raises(
            RuntimeError, match='packed_attention: transforms of torch.func .* backend="reference" alone'
        ):
            transformed()
    ours = torch.vmap(lambda *x: run(*x, name="reference"))(*several)
    torch.testing.assert_close(ours[1], run(*(x[1] for x in several)))


@each_and_reference
def test_a_used_layout_can_be_copied_and_pickled(backend: str) -> None:
    layout = PackedLayout.from_segments([5, 1, 1, 2, 1], [-1, 0, 1, 1, 0], bidirectional=[(1, 4)])
    inputs = make_inputs(layout, 2, 1, 4)
    expected = packed_attention(*inputs, layout, backend=backend)
    for again in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert torch.equal(again.description, layout.description)
        assert torch.equal(packed_attention(*inputs, again, backend=backend), expected)


def test_equal_pieces_share_one_group_and_prefix_is_multiplied_once() -> None:
    """8 prompts of 86 tokens with 8 responses of 40: three products in all, and only the scores that are needed."""
    layout = PackedLayout.from_segments(([86] + [40] * 8) * 8, [p for t in range(8) for p in [-1] + [9 * t] * 8])
    made = plan.plan_for(layout, 6, 2, None)
    assert [len(level.groups) for level in made.levels] == [2, 1]
    assert made.num_scores == 8 * (86 * 86 + 8 * 40 * 40 + 8 * 40 * 86)
    assert all(level.padded_queries is None for level in made.levels)


def test_short_only_children_join_their_parent_and_long_segments_are_cut_outside_spans() -> None:
    chain = plan.cut_blocks(PackedLayout.from_segments([10, 5, 0, 7], [-1, 0, 1, 2]))
    assert [(b.start, b.end, b.subtree_end, b.level) for b in chain] == [(0, 22, 22, 0)]
    long = plan.cut_blocks(PackedLayout.from_segments([600, 10, 10], [-1, 0, 0], bidirectional=[(190, 210)]))
    assert [(b.start, b.end, b.level) for b in long] == [
        (0, 190, 0),
        (190, 395, 1),
        (395, 600, 2),
        (600, 610, 3),
        (610, 620, 3),
    ]
    span = plan.cut_blocks(PackedLayout.from_segments([700], [-1], bidirectional=[(100, 500)]))
    assert [(b.start, b.end) for b in span] == [(0, 100), (100, 500), (500, 700)]


LAYOUT = PackedLayout.from_segments([3], [-1])


@each_backend
@pytest.mark.parametrize("window", [3, 2**31, 2**63 - 1, 2**70])
def test_a_window_beyond_every_path_is_no_window(backend: str, window: int) -> None:
    inputs = [torch.randn(3, 2, 8) for _ in range(3)]
    plain = packed_attention(*inputs, LAYOUT, backend=backend)
    assert torch.equal(packed_attention(*inputs, LAYOUT, window=window, backend=backend), plain)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.zeros(3, 4)}, "query must have 3 dimensions"),
        ({"key": torch.zeros(3, 2, 8, dtype=torch.int64)}, "key must be floating point"),
        ({"query": torch.zeros(4, 4, 8)}, "query has 4 tokens but the layout has 3"),
        ({"key": torch.zeros(2, 2, 8)}, r"key must have shape \[3, 2, 8\]; got \[2, 2, 8\]"),
        ({"value": torch.zeros(3, 2, 4)}, r"value must have shape \[3, 2, 8\]; got \[3, 2, 4\]"),
        ({"query": torch.zeros(3, 3, 8)}, "query has 3 heads of 8 and key 2"),
        ({"query": torch.zeros(3, 0, 8)}, "query has 0 heads"),
        ({"value": torch.zeros(3, 2, 8, dtype=torch.bfloat16)}, "dtypes must agree"),
        ({"value": torch.zeros(3, 2, 8, device="meta")}, "must be on one device"),
        ({"layout": [3]}, "layout must be a PackedLayout; got list"),
        ({"layout": LAYOUT.to("meta")}, "layout on meta"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0"),
        ({"softcap": 1e-46}, "softcap 1e-46: the sums are float32"),
        ({"softcap": 1e39}, r"softcap 1e\+39: the sums are float32"),
        ({"scale": -1e39}, r"scale is -1e\+39 and softcap None: the sums are float32"),
        ({"window": 0}, "window must be an int of at least 1"),
        ({"window": 2.0}, "window must be an int of at least 1"),
        ({"backend": "flash"}, "packed_attention has no backend 'flash' here; allowed: 'auto'"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(3, 2, 8),
        "value": torch.zeros(3, 2, 8),
        "layout": LAYOUT,
        **changes,
    }
    inputs = [arguments.pop(name) for name in ("query", "key", "value", "layout")]
    with pytest.raises(ValueError, match=message):
        packed_attention(*inputs, **arguments)

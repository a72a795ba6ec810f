"""``packed_attention`` as a PyTorch operator: opcheck, graphs that serve every layout, meta tensors, autocast, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specs_kernels import PackedLayout, dispatch, packed_attention
from specs_kernels.packed_attention import library

HEADS, KV_HEADS, DIM = 4, 2, 6
LAYOUTS = [
    PackedLayout.from_segments([6, 3, 0, 4], [-1, 0, 0, 0], bidirectional=[(1, 4)]),
    PackedLayout.from_segments([2, 6, 3, 3, 1], [-1, 0, 1, 1, -1]),
    PackedLayout.from_segments([9, 2, 31], [-1, 0, -1], bidirectional=[(0, 9), (12, 20)]),
    PackedLayout.from_segments([7], [-1]),
]
DEEP = PackedLayout.from_segments([1, 2, 1, 1, 3, 1, 2, 1], [-1, 0, 0, 2, 2, 4, 4, 0])
"""Short segments below each other: the C++ kernel takes their tokens in another order."""
BACKENDS = [name for name in ("native", "chunked") if dispatch.unavailable(name) is None]


def make(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, DIM, generator=generator, dtype=dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def loss(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, **options: Any) -> Tensor:
    out, lse = packed_attention(2 * query, key, value, layout, return_lse=True, **options)
    return (out.float() * torch.arange(DIM, device=out.device)).sum() + lse.sin().sum()


def assert_same(got: Any, expected: Any, inputs: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, **tolerance)
    for ours, exact in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, exact, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap, window", [(None, None), (2.0, 3)])
def test_opcheck(backend: str, softcap: float | None, window: int | None) -> None:
    layout = LAYOUTS[0]
    arguments = (*make(layout.num_tokens, torch.float64), layout.description, 0.4, softcap, window, backend)
    torch.library.opcheck(library.OPERATOR, arguments)


@pytest.mark.parametrize(
    "backend, options",
    [("auto", {}), *((backend, {"softcap": 1.5, "window": 8}) for backend in (*BACKENDS, "reference"))],
)
def test_one_graph_without_breaks_serves_every_layout_and_equals_eager(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled_for: list[PackedLayout] = []

    def note(graph: Any, example: Any) -> Any:
        compiled_for.append(layout)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def run(*inputs: Any) -> Tensor:
        return loss(*inputs, backend=backend, **options)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=note)
    for layout in LAYOUTS:
        inputs = make(layout.num_tokens)
        assert_same(compiled(*inputs, layout), run(*inputs, layout), inputs)
    assert set(compiled_for) == {LAYOUTS[0]}


def test_automatic_dynamic_shapes_settle_after_two_layouts() -> None:
    torch._dynamo.reset()
    compiled_for: list[PackedLayout] = []

    def note(graph: Any, example: Any) -> Any:
        compiled_for.append(layout)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(loss, fullgraph=True, backend=note)
    for layout in LAYOUTS:
        inputs = make(layout.num_tokens)
        assert_same(compiled(*inputs, layout), loss(*inputs, layout), inputs)
    assert set(compiled_for) == set(LAYOUTS[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1])
def test_the_operator_in_another_order_of_tokens_equals_the_definition(backend: str, output: int) -> None:
    inputs = make(DEEP.num_tokens, torch.float64)
    ours = library.OPERATOR(*inputs, DEEP.description, 0.4, 2.0, 4, backend)[output]
    exact = packed_attention(*inputs, DEEP, scale=0.4, softcap=2.0, window=4, return_lse=True, backend="reference")[
        output
    ]
    used = inputs if output == 0 else inputs[:2]
    assert_same(ours.sin().sum(), exact.sin().sum(), used)


def test_the_layout_may_be_gone_before_the_backward() -> None:
    torch._dynamo.reset()
    inputs, lengths = make(12), [5, 3, 4]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = compiled(*inputs, PackedLayout.from_segments(lengths, [-1, 0, 0]))
    for other in range(20):  # more than are kept
        compiled(*make(12), PackedLayout.from_segments([other % 12, 12 - other % 12], [-1, -1]))
    assert_same(ours, loss(*inputs, PackedLayout.from_segments(lengths, [-1, 0, 0])), inputs)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_gradients_of_some_inputs(wanted: list[int]) -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[1]
    inputs = [tensor if n in wanted else tensor.detach() for n, tensor in enumerate(make(layout.num_tokens))]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs, layout), loss(*inputs, layout), [inputs[n] for n in wanted])


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output(output: int) -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[1]
    inputs = make(layout.num_tokens)

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, layout, return_lse=True)[output].sin().sum()

    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), one(*inputs)
    torch.testing.assert_close(got, expected)
    used = inputs if output == 0 else inputs[:2]  # the log-sum-exp does not read the values
    for ours, exact in zip(torch.autograd.grad(got, used), torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_in_a_graph(backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[2]
    inputs = make(layout.num_tokens, dtype)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(loss(*exact, layout), exact)
    ours = torch.autograd.grad(compiled(*inputs, layout, backend=backend), inputs)
    eager = torch.autograd.grad(loss(*inputs, layout, backend=backend), inputs)
    for in_graph, outside, true in zip(ours, eager, expected, strict=True):
        assert in_graph.dtype == dtype
        error, eager_error = ((grad.double() - true).norm() for grad in (in_graph, outside))
        assert error <= 2 * eager_error + 1e-3 * true.norm()


def relative_errors(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> list[float]:
    """Of the gradients of two losses."""
    pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True)
    return [float((ours - exact).norm() / exact.norm()) for ours, exact in pairs]


def test_autocast_inside_a_graph() -> None:
    """Projections in bf16, as in a model: a graph is as near to fp32 as the same calls outside of one."""
    torch._dynamo.reset()
    layout = LAYOUTS[2]
    inputs = make(layout.num_tokens)
    weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)) / DIM**0.5

    def projected(query: Tensor, key: Tensor, value: Tensor, enabled: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = packed_attention(query @ weight, key @ weight, value @ weight, layout)
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            return out.float().square().sum()

    compiled = torch.compile(projected, fullgraph=True, backend="aot_eager")
    in_graph = relative_errors(compiled(*inputs), projected(*inputs, enabled=False), inputs)
    outside = relative_errors(projected(*inputs), projected(*inputs, enabled=False), inputs)
    assert all(ours < 2 * eager < 0.1 for ours, eager in zip(in_graph, outside, strict=True)), (in_graph, outside)


def test_autocast_around_a_graph_leaves_fp32_inputs_in_fp32() -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[2]
    inputs = make(layout.num_tokens)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, layout, backend="chunked").square().sum()

    exact = plain(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.compile(plain, fullgraph=True, backend="aot_eager")(*inputs)
        assert_same(ours, exact, inputs)


def test_checkpointing_inside_a_graph() -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[0]
    inputs = make(layout.num_tokens)

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query.sin(), key.cos(), value * 2, layout, window=4).square().sum()

    def checkpointed(*args: Tensor) -> Tensor:
        loss = checkpoint(block, *args, use_reentrant=False)
        assert isinstance(loss, Tensor)
        return loss

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), block(*inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_meta_and_fake_tensors_get_shapes_without_values(dtype: torch.dtype) -> None:
    layout = LAYOUTS[0]
    inputs = [tensor.detach().to("meta").requires_grad_() for tensor in make(layout.num_tokens, dtype)]
    out, lse = packed_attention(*inputs, layout.to("meta"), return_lse=True)
    assert out.is_meta and out.shape == inputs[0].shape and out.dtype == dtype
    assert lse.shape == out.shape[:2] and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), inputs)] == [tensor.shape for tensor in inputs]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in make(layout.num_tokens, dtype)]
        assert packed_attention(*fake, layout).shape == out.shape


def test_what_cannot_run_raises_inside_a_graph_too() -> None:
    torch._dynamo.reset()
    layout = LAYOUTS[0]
    with pytest.raises(Exception, match="packed_attention has no backend 'triton' here"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*make(layout.num_tokens), layout, backend="triton")
    with pytest.raises(RuntimeError, match="packed_attention is differentiable once"):
        inputs = make(layout.num_tokens)
        out, _ = library.OPERATOR(*inputs, layout.description, 1.0, None, None, "auto")
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_description_is_the_whole_layout() -> None:
    for layout in [*LAYOUTS, PackedLayout.from_segments([], []), PackedLayout.from_segments([0], [-1])]:
        again = library._described(tuple(layout.description.tolist()), torch.device("cpu"))
        assert torch.equal(again.dense_mask(), layout.dense_mask())
        for name in ("lengths", "parents", "subtree_ends", "bidirectional"):
            assert getattr(again, name) == getattr(layout, name)
        assert layout.to("meta").description.device.type == "cpu"

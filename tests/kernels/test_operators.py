"""The registered PyTorch operators: opcheck, torch.compile without graph breaks and with dynamic N, errors inside graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import linear_logprob, linear_loss, selective_logprob
from specs_kernels.linear_logprob import library
from specs_kernels.linear_logprob.autograd import Inputs, Options
from specs_kernels.selective_logprob import autograd as selective

DIM, VOCAB = 4, 11


def make(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, DIM, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randint(0, VOCAB, (n,), generator=generator)
    target[1::4] = -100
    return hidden, weight, target


@pytest.mark.parametrize(
    "mode, cached, entropy", [("recompute", 0, True), ("cache", 9, False), ("cache", 9, True), ("frozen", 0, True)]
)
def test_opcheck(mode: str, cached: int, entropy: bool) -> None:
    hidden, weight, target = make(9, torch.float64)
    extra: list[Tensor | None] = [None, None, None]
    if mode == "frozen":
        weight = weight.detach()
    else:
        extra = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((VOCAB,), (2, DIM), (VOCAB, 2))]
    inputs = Inputs(hidden, weight, extra[0], extra[1], extra[2], target, None, None)
    options = Options(1.0, None, 1.0, -100, entropy, entropy, mode, cached, True, False, True, False, "auto")
    torch.library.opcheck(library.OPERATOR, library.arguments(inputs, options))


def test_fullgraph_with_dynamic_n_compiles_once_and_equals_eager() -> None:
    torch._dynamo.reset()
    compiled_for: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled_for.append(n)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result = linear_logprob(hidden, weight, target, return_entropy=True, temperature=0.7, softcap=5.0)
        assert result.entropy is not None
        return result.logp.sum() + 0.1 * result.entropy.sum() + result.lse.mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9, 300, 33):
        inputs = make(n, seed=n)
        ours, exact = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(ours, exact)
        for a, b in zip(torch.autograd.grad(ours, inputs[:2]), torch.autograd.grad(exact, inputs[:2]), strict=True):
            torch.testing.assert_close(a, b)
    assert set(compiled_for) == {5}


def test_every_mode_under_compile() -> None:
    torch._dynamo.reset()
    hidden, weight, target = make(9)
    modes: list[dict[str, Any]] = [
        {"mode": "recompute"},
        {"mode": "cache", "logit_cache_bytes": 1 << 20},
        {"mode": "frozen", "return_entropy": True},
    ]
    for mode in modes:
        head = weight.detach() if mode["mode"] == "frozen" else weight
        wanted = [hidden] if mode["mode"] == "frozen" else [hidden, weight]

        def loss(hidden: Tensor, mode: dict[str, Any] = mode, head: Tensor = head) -> Tensor:
            return linear_logprob(hidden, head, target, rows=torch.arange(9), **mode).logp.sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            torch.autograd.grad(compiled(hidden), wanted), torch.autograd.grad(loss(hidden), wanted), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_values_are_checked_inside_a_graph() -> None:
    torch._dynamo.reset()
    hidden, weight, target = make(9)
    compiled = torch.compile(lambda t: linear_logprob(hidden, weight, t).logp, fullgraph=True, backend="aot_eager")
    compiled(target)
    with pytest.raises(ValueError, match=r"target\[2\] is 99"):
        compiled(torch.where(torch.arange(9) == 2, 99, target))


def test_compact_cannot_be_traced() -> None:
    torch._dynamo.reset()
    hidden, weight, target = make(9)
    compiled = torch.compile(
        lambda h: linear_logprob(h, weight, target, compact=True).logp, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="compact=True waits for the device"):
        compiled(hidden)


def test_linear_loss_is_a_graph_break_and_raises_under_fullgraph() -> None:
    torch._dynamo.reset()
    hidden, weight, target = make(9)

    def loss(hidden: Tensor) -> Tensor:
        return 2 * linear_loss(2 * hidden, weight, target, lambda logp, entropy, lse, index: -logp.sum())[0]

    expected = torch.autograd.grad(loss(hidden), hidden)[0]
    broken = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(broken(hidden), hidden)[0], expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="linear_loss calls the user's loss function"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)


def test_fake_tensors_get_shapes_without_values() -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        hidden, weight = (
            mode.from_tensor(torch.empty(*shape, requires_grad=True)) for shape in ((9, DIM), (VOCAB, DIM))
        )
        target = mode.from_tensor(torch.zeros(9, dtype=torch.long))
        result = linear_logprob(hidden, weight, target, return_entropy=True)
    assert [tuple(values.shape) for values in result if values is not None] == [(9,)] * 3
    assert result.logp.requires_grad and result.logp.dtype == torch.float32


@pytest.mark.parametrize("entropy", [True, False])
def test_opcheck_of_selective_logprob(entropy: bool) -> None:
    _, _, target = make(9)
    logits = torch.randn(9, VOCAB, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(selective.OPERATOR, (logits, target, None, 0.7, -100, entropy, True, "auto"))


def test_selective_logprob_under_compile() -> None:
    torch._dynamo.reset()
    compiled_for: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled_for.append(n)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        result = selective_logprob(2 * logits, target, return_entropy=True)
        assert result.entropy is not None
        return result.logp.sum() - result.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9, 33):
        logits, target = torch.randn(n, VOCAB, requires_grad=True), make(n)[2]
        ours, exact = (torch.autograd.grad(f(logits, target), logits)[0] for f in (compiled, loss))
        torch.testing.assert_close(ours, exact)
    assert set(compiled_for) == {5}
    with pytest.raises(Exception, match="in_place=True overwrites its input"):
        torch.compile(
            lambda z: selective_logprob(z * 1, target, in_place=True).logp, fullgraph=True, backend="aot_eager"
        )(logits)


def test_meta_tensors_get_shapes_without_values() -> None:
    hidden, weight = torch.empty(9, DIM, device="meta"), torch.empty(VOCAB, DIM, device="meta")
    target = torch.zeros(9, dtype=torch.long, device="meta")
    for result in (linear_logprob(hidden, weight, target), selective_logprob(hidden, target)):
        assert result.logp.shape == result.lse.shape == (9,) and result.logp.is_meta


def test_a_tensor_subclass_keeps_its_gradient_and_cannot_be_compacted() -> None:
    class Tagged(Tensor):
        pass

    hidden, weight, target = make(9)
    tagged = hidden.detach().as_subclass(Tagged).requires_grad_()
    expected = torch.autograd.grad(linear_logprob(hidden, weight, target).logp.sum(), hidden)[0]
    assert torch.autograd.grad(linear_logprob(tagged, weight, target).logp.sum(), tagged)[0].equal(expected)
    with pytest.raises(RuntimeError, match="compact=True waits for the device; tensor subclasses go without it"):
        linear_logprob(tagged, weight, target, compact=True)


def test_a_sharded_weight_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    hidden, weight, target = make(9)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight.detach(), DeviceMesh("cpu", [0]), [Shard(0)])
        message = r"weight is a DTensor \[\d+, \d+\], spread over ranks; .* fully_shard .* weight.full_tensor\(\)"
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, sharded, target)
        with pytest.raises(ValueError, match=message):
            linear_loss(hidden, sharded, target, lambda logp, *_: logp.sum())
        with pytest.raises(ValueError, match="logits is a DTensor"):
            selective_logprob(sharded, target[: len(sharded)])
    finally:
        torch.distributed.destroy_process_group()

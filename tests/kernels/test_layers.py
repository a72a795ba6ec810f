"""rms_norm and swiglu: both backends against the definition and transformers' own modules, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import native, rms_norm, swiglu

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())))
each_backend = pytest.mark.parametrize("backend", ["reference", NATIVE])
SHAPES = [(0, 5), (1, 1), (3, 7), (2, 3, 32), (5, 130), (300, 128), (7, 1, 16)]


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad((out * draw(tuple(out.shape), 9).to(out.dtype)).sum(), leaves)]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_equals_the_formula(backend: str, shape: tuple[int, ...]) -> None:
    x, other, weight = draw(shape, 0), draw(shape, 1), draw(shape[-1:], 2)
    pairs = (
        (lambda *a: rms_norm(*a, 1e-5, backend=backend), plain_norm, [x, weight]),
        (lambda *a: swiglu(*a, backend=backend), plain_swiglu, [x, other]),
    )
    for op, plain, inputs in pairs:
        for ours, exact in zip(results(op, inputs), results(plain, inputs), strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


@each_backend
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_lower_precision_keeps_its_dtype_and_rounds_once(backend: str, dtype: torch.dtype, bound: float) -> None:
    x, other, weight = draw((40, 96), 0, dtype), draw((40, 96), 1, dtype), draw((96,), 2, dtype)
    for op, plain, inputs in (
        (lambda *a: rms_norm(*a, 1e-5, backend=backend), plain_norm, [x, weight]),
        (lambda *a: swiglu(*a, backend=backend), plain_swiglu, [x, other]),
    ):
        ours, exact = results(op, inputs), results(plain, [value.double() for value in inputs])
        assert ours[0].dtype == dtype
        for mine, truth in zip(ours, exact, strict=True):
            assert float((mine.double() - truth).norm() / truth.norm()) < bound


@each_backend
def test_gradcheck(backend: str) -> None:
    x, other, weight = (draw(shape, seed).requires_grad_() for seed, shape in enumerate(((3, 5), (3, 5), (5,))))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3, backend=backend), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: swiglu(*a, backend=backend), (x, other))


@each_backend
def test_extreme_gates_neither_overflow_nor_lose_the_sign(backend: str) -> None:
    gate = torch.tensor([-torch.inf, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4]).requires_grad_()
    out = swiglu(gate, torch.ones(7), backend=backend)
    torch.testing.assert_close(out[1:], torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 1e4]), atol=1e-30, rtol=0)
    (grad,) = torch.autograd.grad(out[1:].sum(), gate)
    torch.testing.assert_close(grad[1:], torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0]), atol=1e-6, rtol=0)


@each_backend
def test_a_nan_row_stays_alone(backend: str) -> None:
    x = draw((6, 32), 0, torch.float32)
    clean = rms_norm(x, torch.ones(32), backend=backend)
    x[2, 5] = torch.nan
    dirty = rms_norm(x, torch.ones(32), backend=backend)
    rest = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(dirty[rest], clean[rest]) and dirty[2].isnan().all()


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_weight_gradient_does_not_depend_on_the_number_of_threads() -> None:
    x, weight = draw((5000, 48), 0, torch.float32), draw((48,), 1, torch.float32)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outcomes.append(results(lambda *a: rms_norm(*a, 1e-6, backend="native"), [x, weight]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@each_backend
def test_strided_inputs(backend: str) -> None:
    x, other = draw((8, 6), 0).t(), draw((6, 16), 1)[:, ::2]
    torch.testing.assert_close(swiglu(x, other, backend=backend), plain_swiglu(x, other))
    weight = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, backend=backend), plain_norm(x, weight))


def test_second_derivative_is_refused() -> None:
    if native.missing():
        pytest.skip(str(native.missing()))
    x = draw((2, 3), 0).requires_grad_()
    for out, name in ((rms_norm(x, torch.ones(3, dtype=torch.float64)), "rms_norm"), (swiglu(x, x), "swiglu")):
        with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rms_norm(torch.zeros(()), torch.zeros(1)), "last dimension of at least 1"),
        (lambda: rms_norm(torch.zeros(2, 0), torch.zeros(0)), "last dimension of at least 1"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(4)), r"weight must have shape \[3\]; got \[4\]"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(3).half()), "dtypes must agree"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(3), -1.0), "eps must be a finite number of at least 0"),
        (lambda: rms_norm(torch.zeros(2, 3), torch.zeros(3), backend="cuda"), "rms_norm has no backend 'cuda'"),
        (lambda: rms_norm([1.0], torch.zeros(1)), "x must be a tensor; got list"),
        (lambda: swiglu(torch.zeros(2), torch.zeros(3)), r"up must have shape \[2\]; got \[3\]"),
        (lambda: swiglu(torch.zeros(2).int(), torch.zeros(2).int()), "gate must be floating point"),
        (lambda: swiglu(torch.zeros(2), torch.zeros(2, device="meta")), "must be on one device"),
    ],
)
def test_errors_name_the_argument_and_its_value(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

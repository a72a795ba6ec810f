"""The Triton kernels of selective_logprob against its definition in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specs_kernels.selective_logprob import triton as kernels
from specs_kernels.selective_logprob.reference import selective_logprob_reference

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)
VALUES = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-6, torch.bfloat16: 5e-6}
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(("logp", "entropy", "lse"), size)]


def make_inputs(n: int, v: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 10000 + v)
    logits = (scale * torch.randn(n, v, generator=generator)).to(dtype)
    target = torch.randint(0, v, (n,), generator=generator)
    target[2::5] = -100
    return logits, target


def upstream(n: int, names: tuple[str, ...]) -> list[Tensor | None]:
    values = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return [values[i] if name in names else None for i, name in enumerate(("logp", "entropy", "lse"))]


def reference(
    logits: Tensor, target: Tensor, temperature: float | Tensor, grads: list[Tensor | None], ignore_index: int = -100
) -> tuple[list[Tensor], Tensor]:
    exact = logits.detach().double().requires_grad_()
    kept = (target != ignore_index).nonzero()[:, 0]
    result = selective_logprob_reference(exact, target, temperature, True, kept)
    values = [result.logp, result.entropy, result.lse]
    total = sum((v * g).sum() for v, g in zip(values, grads, strict=True) if v is not None and g is not None)
    assert isinstance(total, Tensor)
    return [v.detach() for v in values if v is not None], torch.autograd.grad(total, exact)[0]


def check(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    names: tuple[str, ...] = ("logp", "entropy", "lse"),
    ignore_index: int = -100,
) -> None:
    grads = upstream(target.shape[0], names)
    expected, expected_grad = reference(logits, target, temperature, grads, ignore_index)
    *values, statistics = kernels.forward(logits, target, temperature, ignore_index, True)
    tolerance = VALUES[logits.dtype]
    for ours, exact in zip(values, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    grad = kernels.backward(logits, target, temperature, ignore_index, statistics, *grads)
    assert grad.dtype == logits.dtype
    step = ROUNDING[logits.dtype]
    scale = 1.0 if grad.numel() == 0 else max(1.0, float(expected_grad.abs().max()))
    torch.testing.assert_close(grad.double(), expected_grad, rtol=step, atol=max(VALUES[logits.dtype], 6e-8) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 31, 127, 128, 129, 1000, 1025, 4097])
def test_values_and_gradients_at_any_vocabulary(v: int, dtype: torch.dtype) -> None:
    check(*make_inputs(4, v, dtype))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17])
def test_any_number_of_rows(n: int) -> None:
    check(*make_inputs(n, 33, torch.float32))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_each_upstream_gradient_alone_and_together(names: tuple[str, ...]) -> None:
    check(*make_inputs(4, 70, torch.float64), 0.7, names)


def test_no_upstream_gradient_is_a_zero_gradient() -> None:
    logits, target = make_inputs(3, 70, torch.float32)
    *_, statistics = kernels.forward(logits, target, 1.0, -100, False)
    assert statistics.mean is None
    assert torch.equal(
        kernels.backward(logits, target, 1.0, -100, statistics, None, None, None), torch.zeros_like(logits)
    )
    with pytest.raises(ValueError, match="grad_entropy needs the statistics of a forward with return_entropy=True"):
        kernels.backward(logits, target, 1.0, -100, statistics, None, torch.ones(3), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 10.0, "rows"])
def test_temperature(temperature: float | str, dtype: torch.dtype) -> None:
    logits, target = make_inputs(6, 300, dtype)
    check(logits, target, torch.linspace(0.1, 10, 6) if isinstance(temperature, str) else temperature)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_0(shift: float) -> None:
    logits, target = make_inputs(3, 500, torch.float32)
    logits = logits + shift
    expected, expected_grad = reference(logits, target, 1.0, upstream(3, ("logp", "entropy")))
    logp, entropy, lse, statistics = kernels.forward(logits, target, 1.0, -100, True)
    assert entropy is not None
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    grads = upstream(3, ("logp", "entropy"))
    grad = kernels.backward(logits, target, 1.0, -100, statistics, *grads)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_confident_targets(dtype: torch.dtype) -> None:
    """p = 1 - 1e-3: a target column rounded before the subtraction is off by 100 %."""
    logits = torch.zeros(2, 64, dtype=dtype)
    logits[0, 5], logits[1, 9] = 11.0, 30.0
    target = torch.tensor([5, 9])
    *_, statistics = kernels.forward(logits, target, 1.0, -100, False)
    grad = kernels.backward(logits, target, 1.0, -100, statistics, torch.ones(2), None, None)
    p = logits.double().softmax(1)
    expected = 1 - p[0, 5]
    assert 1e-4 < float(expected) < 2e-3
    torch.testing.assert_close(grad[0, 5].double(), expected, rtol=2**-8, atol=0)
    assert float(grad[1].abs().max()) < 1e-7


def test_ignored_rows_may_hold_anything_and_are_zero() -> None:
    logits, target = make_inputs(5, 130, torch.float32)
    logits[1], logits[3] = torch.nan, torch.inf
    target[:] = torch.tensor([4, 77, 5, 77, 129])
    check(logits[::2], target[::2])
    *values, statistics = kernels.forward(logits, target, 0.5, 77, True)
    grad = kernels.backward(logits, target, 0.5, 77, statistics, torch.ones(5), torch.ones(5), torch.ones(5))
    for value in (*values, grad):
        assert torch.equal(value[[1, 3]], torch.zeros_like(value[[1, 3]])) and value.isfinite().all()


def test_all_rows_ignored() -> None:
    logits, target = make_inputs(3, 20, torch.float32)
    *values, statistics = kernels.forward(logits, torch.full_like(target, -100), 1.0, -100, True)
    assert not any(value.any() for value in values)


def test_a_bad_row_is_nan_and_stays_alone() -> None:
    """A NaN logit, targets outside the vocabulary, temperatures that are not above 0; nothing out of bounds is read."""
    logits, _ = make_inputs(7, 200, torch.float32)
    logits[1, 150] = torch.nan
    target = torch.tensor([3, 3, 200, -1, 2**31 + 5, 3, 199])
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 2.0])
    logp, entropy, lse, statistics = kernels.forward(logits, target, temperature, -100, True)
    assert entropy is not None
    assert logp[1:6].isnan().all() and entropy[[1, 5]].isnan().all() and lse[[1, 5]].isnan().all()
    grad = kernels.backward(logits, target, temperature, -100, statistics, torch.ones(7), None, None)
    assert grad[1:6].isnan().any(1).all()
    good = [0, 6]
    exact, exact_grad = reference(
        logits[good], target[good], temperature[good], [torch.ones(2, dtype=torch.float64), None, None]
    )
    torch.testing.assert_close(logp[good].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[good].double(), exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [-1.0, 0.0, torch.nan, torch.inf])
def test_a_bad_temperature_is_nan_also_where_every_lane_has_a_logit(temperature: float) -> None:
    logits = torch.zeros(1, 2048)
    logp, entropy, lse, _ = kernels.forward(logits, torch.tensor([3]), torch.tensor([temperature]), -100, True)
    assert entropy is not None and logp.isnan() and entropy.isnan() and lse.isnan()


def test_minus_inf_forbids_a_column() -> None:
    logits, target = make_inputs(2, 3000, torch.float32)
    masked = logits.clone()
    masked[:, 100:] = -torch.inf
    target[:] = torch.tensor([7, 99])
    exact, exact_grad = reference(logits[:, :100], target, 1.0, upstream(2, ("logp", "entropy", "lse")))
    *values, statistics = kernels.forward(masked, target, 1.0, -100, True)
    for ours, value in zip(values, exact, strict=True):
        torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-5)
    grad = kernels.backward(masked, target, 1.0, -100, statistics, *upstream(2, ("logp", "entropy", "lse")))
    torch.testing.assert_close(grad[:, :100].double(), exact_grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(grad[:, 100:], torch.zeros(2, 2900))


@pytest.mark.parametrize("kind", ["rows", "columns", "expanded", "every other column"])
def test_any_strides(kind: str) -> None:
    logits, target = make_inputs(6, 150, torch.float32)
    view = {
        "rows": torch.cat([logits, logits], 1)[:, :150],
        "columns": logits.T.contiguous().T,
        "expanded": logits[:1].expand(6, 150),
        "every other column": logits.repeat_interleave(2, 1)[:, ::2],
    }[kind]
    assert not view.is_contiguous()
    check(view, target)


def test_gradient_in_place() -> None:
    logits, target = make_inputs(4, 5000, torch.bfloat16)
    grads = upstream(4, ("logp", "entropy", "lse"))
    *_, statistics = kernels.forward(logits, target, 0.7, -100, True)
    apart = kernels.backward(logits, target, 0.7, -100, statistics, *grads)
    given = logits.data_ptr()
    inside = kernels.backward(logits, target, 0.7, -100, statistics, *grads, out=logits)
    assert inside.data_ptr() == given and torch.equal(inside, apart)


def test_repeats_are_bitwise_equal_and_a_row_alone_equals_the_row_in_a_batch() -> None:
    logits, target = make_inputs(6, 3000, torch.bfloat16)
    first, again, alone = (
        kernels.forward(logits[rows], target[rows], 0.7, -100, True) for rows in (slice(0, 6), slice(0, 6), slice(4, 5))
    )
    for many, same, one in zip(first[:3], again[:3], alone[:3], strict=True):
        assert many is not None and same is not None and one is not None
        assert torch.equal(many, same) and torch.equal(many[4:5], one)


def test_int32_targets() -> None:
    logits, target = make_inputs(4, 60, torch.float32)
    check(logits, target.int())


@pytest.mark.parametrize("rows, stride", [(2, 2**31 + 64), (2**11 + 1, 2**20)])
def test_offsets_beyond_32_bits(rows: int, stride: int) -> None:
    """A stride that needs 64 bits, and one that does not while row * stride does."""
    storage = torch.empty((rows - 1) * stride + 32, dtype=torch.bfloat16)  # committed only where it is touched
    logits = storage.as_strided((rows, 32), (stride, 1))
    last, _ = make_inputs(1, 32, torch.bfloat16)
    logits[-1] = last[0]
    target = torch.full((rows,), -100)
    target[-1] = 9
    grads: list[Tensor | None] = [torch.ones(rows, dtype=torch.float64), None, None]
    logp, _, _, statistics = kernels.forward(logits, target, 1.0, -100, False)
    exact, exact_grad = reference(last, target[-1:], 1.0, [torch.ones(1, dtype=torch.float64), None, None])
    torch.testing.assert_close(logp[-1:].double(), exact[0], rtol=1e-5, atol=1e-5)
    tail = kernels.Statistics(statistics.maximum[-1:], statistics.log_total[-1:], None)
    grad = kernels.backward(logits[-1:], target[-1:], 1.0, -100, tail, torch.ones(1), None, None, out=logits[-1:])
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-8, atol=1e-7)
    assert grads[0] is not None

"""selective_logprob in C++: every instruction set, ragged rows, hard values, strides, half precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specs_kernels import TokenLogprobs, native, selective_logprob
from specs_kernels.selective_logprob import native as selective

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
WIDEST = 3
HALVES = [torch.bfloat16, torch.float16]
NOWHERE = -1
"""A target in none of the columns: the row has statistics and a gradient, but no column of its own."""


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


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient_of_lse(z: Tensor, upstream: Tensor, out: Tensor) -> Tensor:
    """``upstream * exp(z)``: the gradient of rows whose maximum and sum are given as 0 and 1."""
    nothing = torch.zeros(z.shape[0])
    target = torch.full((z.shape[0],), NOWHERE)
    given = selective.Statistics(nothing, nothing, None)
    return selective.backward(z, target, 1.0, -100, given, None, None, upstream, out=out)


WIDTHS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 127, 129, 1000, 2049, 4200]
TEMPERATURES = {"1": 1.0, "0.7": 0.7, "per row": torch.linspace(0.5, 2.0, 4, dtype=torch.float64)}


@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("forbidden", [False, True])
def test_statistics_and_gradients_of_every_width_in_fp64(
    instruction_set: str, temperature: float | Tensor, forbidden: bool
) -> None:
    """Against the definition, with every upstream gradient."""
    late = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    for columns in WIDTHS[1:] if forbidden else WIDTHS:
        x = 3 * normal(4, columns, seed=columns)
        if forbidden:
            x[:, ::3] = -torch.inf
        target = torch.tensor([columns - 1, 0, NOWHERE, columns // 2])
        z = x / late
        log_p = torch.log_softmax(z, dim=1)
        before = x.clone()
        logp, entropy, lse, statistics = selective.forward(x, target, temperature, -100, True)
        assert torch.equal(x, before) and entropy is not None
        mean = (log_p.exp() * torch.where(z == -torch.inf, 0, z)).sum(1)
        torch.testing.assert_close(lse, torch.logsumexp(z, 1), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(lse - entropy, mean, atol=1e-12, rtol=1e-12)
        expected = torch.where(target >= 0, log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1), torch.nan)
        torch.testing.assert_close(logp, expected, atol=1e-12, rtol=1e-12, equal_nan=True)
        for g, q, r in (normal(3, 4, seed=1).unbind(), (None, None, normal(4, seed=1))):
            dx = selective.backward(x, target, temperature, -100, statistics, g, q, r)
            dz = log_p.exp() * ((r if g is None else r - g)[:, None])
            if g is not None and q is not None:
                around = torch.where(z == -torch.inf, 0.0, z - mean[:, None])
                dz -= log_p.exp() * q[:, None] * around
                dz += torch.nn.functional.one_hot(target.clamp(min=0), columns) * (g * (target >= 0))[:, None]
            torch.testing.assert_close(dx, dz / late, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_fp32_error_is_within_twice_that_of_plain_pytorch(instruction_set: str, sharpness: float, shift: float) -> None:
    """From flat rows to p(target) -> 1, near 0 and far from it."""
    logits = (sharpness * normal(60, 3001, seed=2) + shift).float()
    target = torch.cat((logits[:30].argmax(1), torch.arange(30)))
    upstream = normal(3, 60, seed=3).float()

    def everything(x: Tensor, run: Any) -> list[Tensor]:
        x = x.clone().requires_grad_()
        outputs = run(x)
        total = sum((u.to(v.dtype) * v).sum() for u, v in zip(upstream, outputs, strict=True))
        return [*(v.detach() for v in outputs), *torch.autograd.grad(total, x)]

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(x, 1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)
        return logp, -(log_p.exp() * log_p).sum(1), torch.logsumexp(x, 1)

    exact, torchs = everything(logits.double(), plain), everything(logits, plain)
    ours = everything(logits, lambda x: selective_logprob(x, target, return_entropy=True, backend="native"))
    for mine, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()
    assert ours[0].max() <= 0


def test_exp_over_its_whole_range(instruction_set: str) -> None:
    """The weight of a column 0, -0.01, ... -130 below the maximum, as the gradient of the log-sum-exp sees it."""
    below = torch.cat((torch.zeros(1), -torch.logspace(-8, 2.1, 20011, dtype=torch.float64).float()))[None]
    exact = below.double().exp()
    dx = gradient_of_lse(below, torch.ones(1), torch.empty_like(below))
    assert bool(((dx.double() - exact).abs() <= 1.3e-7 * exact + 1.2e-38).all())
    lse = selective_logprob(below, torch.zeros(1, dtype=torch.int64), backend="native").lse
    torch.testing.assert_close(lse.double(), exact.sum(1).log(), rtol=1e-6, atol=0.0)


def test_columns_count_after_a_whole_piece_of_minus_inf(instruction_set: str) -> None:
    x = torch.full((3, 2100), -torch.inf)
    x[:2, 2095] = torch.tensor([3.0, -1e30])
    ours = selective_logprob(x, torch.tensor([2095, 2095, 7]), return_entropy=True, backend="native")
    assert ours.entropy is not None
    assert torch.equal(ours.lse, torch.tensor([3.0, -1e30, -torch.inf]))
    assert torch.equal(ours.logp[:2], torch.zeros(2)) and torch.equal(ours.entropy[:2], torch.zeros(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_nan_or_inf_stays_alone(instruction_set: str, bad: float) -> None:
    logits = normal(9, 300, dtype=torch.float32)
    target = torch.arange(9)
    for column in (0, 17, 299):
        dirty = logits.clone()
        dirty[4, column] = bad
        results = []
        for x in (logits.clone().requires_grad_(), dirty.requires_grad_()):
            result = selective_logprob(x, target, return_entropy=True, backend="native")
            assert result.entropy is not None
            total = (result.logp + result.entropy + result.lse).sum()
            results.append([*(v.detach() for v in result), *torch.autograd.grad(total, x)])
        for clean, spoilt in zip(*results, strict=True):
            keep = torch.arange(9) != 4
            assert torch.equal(clean[keep], spoilt[keep])
            assert spoilt[4].isnan().all()


def test_skipped_rows_are_not_read_and_rows_without_gradient_give_zero(instruction_set: str) -> None:
    x = normal(5, 70, dtype=torch.float32)
    x[1], x[3] = torch.nan, torch.inf
    target = torch.tensor([3, -100, 69, -100, 7])
    x.requires_grad_()
    ours = selective_logprob(x, target, return_entropy=True, backend="native")
    for values in ours:
        assert torch.equal(values[[1, 3]], torch.zeros(2)) and values.isfinite().all()
    (dx,) = torch.autograd.grad(ours.logp, x, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    assert torch.equal(dx[1:4], torch.zeros(3, 70)) and (dx[[0, 4]] != 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_every_half_precision_number_is_read_and_written_as_pytorch_does(
    instruction_set: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Read: the gradient of half-precision scores equals that of the same numbers in fp32.
    below = every[every.isfinite() & (every <= 0) & (every > -80)][None]
    outs = [gradient_of_lse(x, torch.ones(1), torch.empty(below.shape)) for x in (below, below.float())]
    assert torch.equal(*outs)
    # Write: numbers between and on the ties of the format, its smallest, its overflow, and NaN.
    exact = every[every.isfinite()].float()
    some = torch.cat(
        (
            exact,
            (exact + exact.roll(1)) / 2,
            exact * 1.0001,
            exact * 0.9999,
            -torch.logspace(-45, 38, 9001, dtype=torch.float64).float(),
            torch.tensor([-65519.9, 65520.0, -1e9, -torch.inf, torch.nan]),
        )
    )
    some = some[some != 0]
    written = gradient_of_lse(torch.zeros(some.shape[0], 1), some, torch.empty(some.shape[0], 1, dtype=dtype))
    torch.testing.assert_close(written[:, 0], some.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_strided_and_half_precision_logits_equal_contiguous_ones(instruction_set: str, dtype: torch.dtype) -> None:
    base = normal(7, 2500, seed=4, dtype=dtype)
    layouts = {
        "columns apart": torch.empty(2500, 7, dtype=dtype).T,
        "every third column": torch.empty(7, 7500, dtype=dtype)[:, ::3],
        "unaligned rows": torch.empty(7, 2503, dtype=dtype)[:, 1:2501],
    }
    target = torch.tensor([0, 2499, 5, -100, 2047, 2048, 77])

    def everything(logits: Tensor, accurate: bool = False) -> list[Tensor]:
        logits = (logits.float() if accurate else logits).detach().requires_grad_()
        result = selective_logprob(logits, target, temperature=0.7, return_entropy=True, backend="native")
        assert result.entropy is not None
        total = (result.logp + 2 * result.entropy - result.lse).sum()
        return [*(v.detach() for v in result), *torch.autograd.grad(total, logits)]

    expected = everything(base)
    for name, view in layouts.items():
        for ours, exact in zip(everything(view.copy_(base)), expected, strict=True):
            assert torch.equal(ours, exact), name
    if dtype in HALVES:
        for ours, exact in zip(expected, everything(base, accurate=True), strict=True):
            assert torch.equal(ours, exact.to(ours.dtype))


def test_the_gradient_may_replace_the_logits(instruction_set: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = normal(6, 333, dtype=dtype)
        target = torch.tensor([0, 332, 16, -100, 5, 5])
        g, q, r = normal(3, 6, seed=1, dtype=torch.float32).unbind()
        *_, statistics = selective.forward(logits, target, 1.3, -100, True)
        apart = selective.backward(logits, target, 1.3, -100, statistics, g, q, r)
        assert selective.backward(logits, target, 1.3, -100, statistics, g, q, r, out=logits) is logits
        assert torch.equal(apart, logits)


def test_offsets_beyond_32_bits() -> None:
    """Two rows more than 2^31 elements apart; the memory between them is never touched."""
    try:
        memory = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    logits = memory.as_strided((2, 2000), (2**31 + 1000, 2))
    small = normal(2, 2000, dtype=torch.bfloat16)
    logits.copy_(small)
    target = torch.tensor([1999, 3])
    ours, exact = (selective_logprob(x, target, return_entropy=True, backend="native") for x in (logits, small))
    for mine, truth in zip(ours, exact, strict=True):
        assert torch.equal(mine, truth)
    *_, statistics = selective.forward(logits, target, 1.0, -100, False)
    one = torch.ones(2)
    expected = selective.backward(small, target, 1.0, -100, statistics, one, None, None)
    selective.backward(logits, target, 1.0, -100, statistics, one, None, None, out=logits)
    assert torch.equal(logits, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 300),
    entropy=st.booleans(),
    half=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    temperature=st.sampled_from([1.0, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    rows: int, columns: int, entropy: bool, half: torch.dtype, temperature: float, seed: int
) -> None:
    logits = (4 * normal(rows, columns, seed=seed)).to(half)
    target = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    target[1::3] = -100

    def everything(backend: str) -> list[Tensor]:
        x = logits.clone().requires_grad_()
        result: TokenLogprobs = selective_logprob(
            x, target, temperature=temperature, return_entropy=entropy, backend=backend
        )
        values = [value for value in result if value is not None]
        total = sum((value * (index + 1)).sum() for index, value in enumerate(values))
        return [*(v.detach() for v in values), *torch.autograd.grad(total, x)]

    loose = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[half]
    for ours, exact in zip(everything("native"), everything("reference"), strict=True):
        torch.testing.assert_close(ours, exact, atol=loose, rtol=loose)


def test_a_vocabulary_of_152064(instruction_set: str) -> None:
    logits = normal(3, 152064, dtype=torch.float32)
    target = torch.tensor([152063, 0, 70000])
    ours = selective_logprob(logits, target, return_entropy=True, backend="native")
    exact = selective_logprob(logits.double(), target, return_entropy=True, backend="reference")
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=2e-6, rtol=1e-6)


def test_the_library_refuses_what_would_read_out_of_bounds() -> None:
    x, vector, target = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    good: dict[str, Any] = {
        "x": x,
        "target": target,
        "inverse_temperature": None,
        "inverse": 1.0,
        "maximum": vector,
        "log_total": vector,
        "base": vector,
        "entropy": None,
        "target_gradient": None,
        "dx": x.clone(),
    }
    torch.ops.specs_kernels.row_pass_gradients(**good)
    for change in (
        {"x": torch.zeros(3, 4, dtype=torch.float64)},
        {"x": torch.zeros(3)},
        {"target": target.int()},
        {"target": target[:2]},
        {"base": torch.zeros(2)},
        {"inverse_temperature": vector.double()},
        {"dx": torch.zeros(4, 3)},
        {"dx": torch.zeros(3, 4, dtype=torch.int32)},
    ):
        with pytest.raises(RuntimeError, match="native row pass"):
            torch.ops.specs_kernels.row_pass_gradients(**(good | change))

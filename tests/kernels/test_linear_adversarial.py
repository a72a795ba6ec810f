"""linear_logprob where log-prob kernels have been wrong: confident targets, shifted scores, ragged vocabularies, bad rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specs_kernels import linear_logprob
from specs_kernels.dispatch import backends, unavailable

TRAINED: list[dict[str, Any]] = [{"mode": "recompute"}, {"mode": "cache", "logit_cache_bytes": 1 << 30}]


def hidden_gradient(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    hidden = hidden.detach().requires_grad_()
    return torch.autograd.grad(linear_logprob(hidden, weight, target, **options).logp.sum(), hidden)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [*TRAINED, {"mode": "frozen"}], ids=lambda options: options["mode"])
def test_the_gradient_survives_a_target_with_p_close_to_one(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """1 - p is 1e-3 and less; rounding the target's column before the subtraction would lose all of it in half precision."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    target = torch.randint(0, 50, (20,), generator=generator)
    hidden = weight[target] * (12.0 / weight[target].float().pow(2).sum(1, keepdim=True)).to(dtype)
    exact = hidden_gradient(hidden.double(), weight.double(), target, backend="reference")
    ours = hidden_gradient(hidden, weight, target, **options)
    bound = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    assert (ours.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("shift", [-3e4, 3e4])
@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_scores_far_from_zero(shift: float, mode: str) -> None:
    """A running maximum that starts at 0 would underflow every row far below it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(3000, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3000, (9,), generator=generator)
    bias = torch.full((3000,), shift, dtype=torch.float64)
    plain = linear_logprob(hidden, weight, target, return_entropy=True)
    moved = linear_logprob(hidden.requires_grad_(), weight, target, bias=bias, return_entropy=True, mode=mode)
    torch.testing.assert_close(moved.logp, plain.logp, atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.entropy, plain.entropy, atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.lse, plain.lse + shift, atol=1e-9, rtol=0)


@pytest.mark.parametrize("vocab", [1, 2, 31, 127, 128, 129, 1000, 2047, 2048, 2049, 4097])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_columns_beyond_the_vocabulary_do_not_exist(vocab: int, softcap: float | None) -> None:
    """All scores far below 0, so that a padded column of score 0 (or -softcap) would take all the mass."""
    hidden = torch.full((3, 4), -2.0, dtype=torch.float64, requires_grad=True)
    weight = (
        50 + torch.randn(vocab, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    target = torch.tensor([0, vocab // 2, vocab - 1])
    ours = linear_logprob(hidden, weight, target, softcap=softcap, return_entropy=True, mode="recompute")
    exact = linear_logprob(hidden, weight, target, softcap=softcap, return_entropy=True, backend="reference")
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours.logp.sum(), (hidden, weight)),
        torch.autograd.grad(exact.logp.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", ["recompute", "cache", "frozen"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_hidden_row_stays_alone(mode: str, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator)
    weight = torch.randn(2500, 4, generator=generator)
    target = torch.randint(0, 2500, (6,), generator=generator)
    options = {"mode": mode, "return_entropy": True} | ({"logit_cache_bytes": 1 << 30} if mode == "cache" else {})
    clean = linear_logprob(hidden.clone().requires_grad_(), weight, target, **options)
    dirty = hidden.clone()
    dirty[2] = value
    dirty.requires_grad_()
    result = linear_logprob(dirty, weight, target, **options)
    keep = torch.arange(6) != 2
    for a, b in zip(result, clean, strict=True):
        assert torch.isnan(a[2]) and torch.equal(a[keep], b[keep])
    (grad,) = torch.autograd.grad(result.logp[keep].sum(), dirty)
    assert torch.isfinite(grad[keep]).all()


def test_every_upstream_gradient_is_scaled_by_its_own_element() -> None:
    hidden, weight, target = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 3, 4])
    upstream = torch.tensor([1.0, 0.0, -2.0, 3.0, 0.5])
    together = hidden.clone().requires_grad_()
    linear_logprob(together, weight, target).logp.backward(upstream)
    for n in range(5):
        alone = hidden[n : n + 1].clone().requires_grad_()
        linear_logprob(alone, weight, target[n : n + 1]).logp.backward(upstream[n : n + 1])
        torch.testing.assert_close(together.grad[n], alone.grad[0])  # type: ignore[index]


def test_permuting_the_vocabulary_permutes_the_weights_gradient() -> None:
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(3000, 4, dtype=torch.float64)
    target, order = torch.randint(0, 3000, (9,)), torch.randperm(3000)
    place = torch.empty_like(order)
    place[order] = torch.arange(3000)

    def gradient(weight: Tensor, target: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(linear_logprob(hidden, weight, target, mode="recompute").logp.sum(), weight)[0]

    torch.testing.assert_close(gradient(weight[order], place[target]), gradient(weight, target)[order])


def test_weight_gradient_sums_to_the_log_sum_exps_share() -> None:
    """sum_j dz_j is r: log-prob and entropy move mass, only the log-sum-exp adds any."""
    hidden, target = torch.ones(5, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    weight = torch.randn(40, 1, dtype=torch.float64, requires_grad=True)
    result = linear_logprob(hidden, weight, target, return_entropy=True)
    assert result.entropy is not None
    for values, expected in ((result.logp, 0.0), (result.entropy, 0.0), (result.lse, 5.0)):
        (grad,) = torch.autograd.grad(values.sum(), weight, retain_graph=True)
        torch.testing.assert_close(grad.sum(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["recompute", "cache", "auto"])
def test_bitwise_repeatable(mode: str) -> None:
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(3000, 16, requires_grad=True)
    target = torch.randint(0, 3000, (300,))
    options = {"mode": mode} | ({"logit_cache_bytes": 3000 * 4 * 150} if mode == "cache" else {})
    runs = []
    for _ in range(3):
        result = linear_logprob(hidden, weight, target, return_entropy=True, **options)
        assert result.entropy is not None
        runs.append([result.logp, *torch.autograd.grad(result.logp.sum() + result.entropy.sum(), (hidden, weight))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_seventy_thousand_targets() -> None:
    hidden, weight = torch.randn(70_001, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    target = torch.randint(0, 3, (70_001,))
    ours = linear_logprob(hidden, weight, target, mode="recompute")
    exact = linear_logprob(hidden, weight, target, backend="reference")
    torch.testing.assert_close(ours.logp, exact.logp)
    for a, b in zip(
        torch.autograd.grad(ours.logp.sum(), (hidden, weight)),
        torch.autograd.grad(exact.logp.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


def test_hidden_rows_more_than_two_to_the_31_entries_apart() -> None:
    """A row stride of 2^31 entries over pages that are never touched."""
    stride = (1 << 31) + 8
    hidden = torch.empty(2 * stride, dtype=torch.bfloat16).as_strided((2, 4), (stride, 1))
    values = torch.randn(2, 4).bfloat16()
    hidden.copy_(values)
    weight, target = torch.randn(9, 4).bfloat16(), torch.tensor([3, 8])
    assert torch.equal(linear_logprob(hidden, weight, target).logp, linear_logprob(values, weight, target).logp)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 150),
    d=st.integers(1, 40),
    v=st.integers(1, 2100),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.3, 4.0]),
    mode=st.sampled_from(["auto", "recompute", "cache"]),
    compact=st.booleans(),
    dead=st.floats(0, 1),
)
def test_any_shape_and_mode_equals_the_reference(
    n: int, d: int, v: int, softcap: float | None, temperature: float, mode: str, compact: bool, dead: float
) -> None:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < dead / 2] = -100
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    upstream[torch.rand(n, generator=generator) < dead] = 0
    options: dict[str, Any] = {"softcap": softcap, "temperature": temperature}
    extra: dict[str, Any] = {"mode": mode, "compact": compact}
    if mode == "cache":
        extra["logit_cache_bytes"] = 128 * v * 8
    exact = linear_logprob(hidden, weight, target, backend="reference", **options)
    ours = linear_logprob(hidden, weight, target, **options, **extra)
    torch.testing.assert_close(ours.logp, exact.logp, atol=1e-10, rtol=1e-10)
    grads = [torch.autograd.grad((upstream * result.logp).sum(), (hidden, weight)) for result in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_a_bias_may_have_any_stride(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator)
    target = torch.tensor([0, 6, 2, 3, 1])
    wide = torch.randn(7, 2, generator=generator)
    for bias in (wide[:, 1], wide[:1, 0].expand(7)):
        strided = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True, backend=backend)
        dense = linear_logprob(hidden, weight, target, bias=bias.clone(), return_entropy=True, backend=backend)
        for a, b in zip(strided, dense, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("validate", [True, False])
def test_targets_without_any_hidden_row(backend: str, validate: bool) -> None:
    """A packed row of prompts alone: nothing to predict from, every target ignored."""
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, rows = torch.tensor([-100, -100]), torch.tensor([-1, -1])
    out = linear_logprob(hidden, weight, target, rows=rows, return_entropy=True, validate=validate, backend=backend)
    for values in out:
        assert values is not None and values.equal(torch.zeros(2))
    dhidden, dweight = torch.autograd.grad(out.logp.sum() + out.lse.sum(), (hidden, weight))
    assert dhidden.shape == (0, 3) and dweight.equal(torch.zeros(5, 3))
    if not validate:
        bad = linear_logprob(hidden, weight, torch.tensor([1]), rows=torch.tensor([0]), validate=False, backend=backend)
        assert bad.logp.isnan().all()


@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_scores_of_half_precision_keep_the_slope_of_a_saturated_softcap(backend: str, dtype: torch.dtype) -> None:
    if backend not in backends("linear_logprob"):
        pytest.skip(f"backend {backend} is not here: {unavailable(backend)}")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 16, generator=generator).to(dtype).requires_grad_()
    weight = (3 * torch.randn(2, 16, generator=generator)).to(dtype)
    target = torch.randint(2, (200,), generator=generator)

    def gradient(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        logp = linear_logprob(hidden, weight, target, softcap=1.5, **options).logp
        return torch.autograd.grad(logp.sum(), hidden)[0].double()

    exact = gradient(hidden.detach().double().requires_grad_(), weight.double(), backend="reference")
    error = {
        name: (gradient(hidden, weight, backend=backend, **options) - exact).norm() / exact.norm()
        for name, options in (
            ("again", {"mode": "recompute"}),
            ("kept", {"mode": "cache", "logit_cache_bytes": 1 << 20}),
        )
    }
    assert error["kept"] <= 1.5 * error["again"]

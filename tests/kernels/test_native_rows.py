"""The C++ row passes of linear_logprob and selective_logprob: every instruction set, ragged rows, hard values, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specs_kernels import TokenLogprobs, linear_logprob, native, selective_logprob
from specs_kernels.linear_logprob.native import NativeRowPass
from specs_kernels.linear_logprob.row_pass import NO_TARGET, SKIP_ROW, RowGradients, RowState, Transform
from specs_kernels.selective_logprob import native as selective

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
WIDEST = 3
LOWEST = torch.finfo(torch.float32).min
ROWS = NativeRowPass()
PLAIN = Transform(None, None, 1.0, False)
HALVES = [torch.bfloat16, torch.float16]


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


def empty_state(rows: int, dtype: torch.dtype, entropy: bool = True) -> RowState:
    weighted = torch.full((rows,), torch.nan, dtype=dtype) if entropy else None
    undefined = torch.full((2, rows), torch.nan, dtype=dtype)
    return RowState(undefined[0], undefined[1], weighted, torch.zeros(rows, dtype=dtype))


def transforms(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Transform]:
    bias = normal(columns, seed=7, dtype=dtype)
    forbidden = bias.clone()
    forbidden[::3] = -torch.inf
    temperature = torch.linspace(0.5, 2.0, rows, dtype=dtype)
    return {
        "plain": PLAIN,
        "bias of -inf": Transform(forbidden, None, 1.0, True),
        "temperature": Transform(None, None, 0.7, False),
        "temperature per row, bias": Transform(bias, None, temperature, True),
        "softcap": Transform(None, 2.0, 1.0, False),
        "everything": Transform(bias, 1.5, temperature, True),
    }


def scores(x_RC: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """z and the slope dz / dx of every column, by the definition in fp64."""
    y = x_RC.double() + (0 if transform.bias_C is None else transform.bias_C.double())
    inverse = transform.inverse_temperature
    late = inverse.double()[:, None] if isinstance(inverse, Tensor) else inverse
    if transform.softcap is None:
        return y * late, torch.ones_like(y) * late
    tanh = torch.tanh(y / transform.softcap)
    return transform.softcap * tanh * late, (1 - tanh**2) * late


def in_tiles(x_RC: Tensor, target: Tensor, transform: Transform, state: RowState, tile: int, **extra: Any) -> None:
    for first in range(0, x_RC.shape[1], tile):
        columns = slice(first, first + tile)
        ROWS.stats(x_RC[:, columns], target, first, cut(transform, columns), state, **extra)


def cut(transform: Transform, columns: slice) -> Transform:
    bias = None if transform.bias_C is None else transform.bias_C[columns]
    return Transform(bias, transform.softcap, transform.inverse_temperature, transform.maybe_minus_inf)


OPTIONS = list(transforms(2, 2, torch.float64))
WIDTHS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 127, 129, 1000, 2049, 4200]


@pytest.mark.parametrize("option", OPTIONS)
def test_statistics_and_gradients_of_every_width_in_fp64(instruction_set: str, option: str) -> None:
    """Against the definition, in one tile and in several, with every upstream gradient."""
    for columns in WIDTHS:
        rows = 4
        transform = transforms(rows, columns, torch.float64)[option]
        x = 3 * normal(rows, columns, seed=columns)
        target = torch.tensor([columns - 1, 0, NO_TARGET, columns // 2])
        z, slope = scores(x, transform)
        log_p = torch.log_softmax(z, dim=1)
        for tile in {columns, max(1, columns // 3)}:
            state = empty_state(rows, torch.float64)
            before = x.clone()
            in_tiles(x, target, transform, state, tile)
            assert torch.equal(x, before)
            if columns == 1 and option == "bias of -inf":
                assert torch.equal(state.maximum, torch.full_like(state.maximum, torch.finfo(torch.float64).min))
                assert torch.equal(state.total, torch.zeros(rows).double())
                continue
            assert state.weighted is not None
            lse, mean = torch.logsumexp(z, 1), (log_p.exp() * torch.where(z == -torch.inf, 0, z)).sum(1)
            torch.testing.assert_close(state.maximum + state.total.log(), lse, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(state.maximum + state.weighted / state.total, mean, atol=1e-12, rtol=1e-12)
            expected = torch.where(target >= 0, z.gather(1, target.clamp(min=0)[:, None]).squeeze(1), 0.0)
            torch.testing.assert_close(state.target, expected, atol=1e-13, rtol=1e-13)
            g, q, r = normal(3, rows, seed=1).unbind()
            base = (r - g) + q * state.weighted / state.total
            for entropy, on_target in ((q, g), (None, None)):
                gradients = RowGradients(state.maximum, state.total.log(), base, entropy, on_target)
                dx = torch.full_like(x, torch.nan)
                for first in range(0, columns, tile):
                    part = slice(first, first + tile)
                    ROWS.dscores(x[:, part], target, first, cut(transform, part), gradients, dx[:, part])
                shifted = torch.where(z == -torch.inf, 0.0, z - state.maximum[:, None])
                dz = log_p.exp() * (base[:, None] - (0 if entropy is None else entropy[:, None] * shifted))
                if on_target is not None:
                    dz += torch.nn.functional.one_hot(target.clamp(min=0), columns) * (g * (target >= 0))[:, None]
                torch.testing.assert_close(dx, dz * slope, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("option", OPTIONS)
def test_unnormalised_weights_in_tiles(instruction_set: str, option: str) -> None:
    """Weights of every tile are relative to the maximum so far and rescaled by what is returned; the target column is 0."""
    for columns, tile in ((5, 5), (5, 2), (37, 16), (130, 130), (130, 50)):
        rows = 3
        transform = transforms(rows, columns, torch.float64)[option]
        x = 3 * normal(rows, columns, seed=columns)
        target = torch.tensor([columns - 1, 0, NO_TARGET])
        z, slope = scores(x, transform)
        inverse = transform.inverse_temperature
        slope = slope / (inverse[:, None] if isinstance(inverse, Tensor) else inverse)
        state, first_sum, second_sum = empty_state(rows, torch.float64), torch.zeros(rows, 2), torch.zeros(rows, 2)
        first_sum, second_sum = first_sum.double(), second_sum.double()
        value = normal(columns, 2, seed=9)
        for first in range(0, columns, tile):
            part = slice(first, first + tile)
            scratch = x[:, part].clone()
            second = torch.full_like(scratch, torch.nan)
            change = ROWS.stats_exp(scratch, target, first, cut(transform, part), state, scratch, second)
            if first:
                second_sum = change.exp()[:, None] * (second_sum + change.clamp(min=-1e5)[:, None] * first_sum)
                first_sum = change.exp()[:, None] * first_sum
            first_sum, second_sum = first_sum + scratch @ value[part], second_sum + second @ value[part]
        shifted = z - state.maximum[:, None]
        weights = shifted.exp() * slope * (torch.nn.functional.one_hot(target.clamp(min=0), columns) == 0)
        weights[2] = (shifted.exp() * slope)[2]
        torch.testing.assert_close(first_sum, weights @ value, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(second_sum, (weights * shifted.clamp(min=-1e5)) @ value, atol=1e-12, rtol=1e-11)
        torch.testing.assert_close(state.maximum + state.total.log(), torch.logsumexp(z, 1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_state_has_the_same_bits_whatever_is_written(instruction_set: str, option: str) -> None:
    for columns in (3, 37, 130, 2048):
        x = normal(4, columns, dtype=torch.float32)
        target = torch.tensor([columns - 1, 0, NO_TARGET, 1])
        states = [empty_state(4, torch.float32) for _ in range(4)]
        for first in range(0, columns, 100):
            part = slice(first, first + 100)
            transform = cut(transforms(4, columns, torch.float32)[option], part)
            tile, out = x[:, part], torch.empty(2, 4, len(range(columns)[part]))
            ROWS.stats(tile, target, first, transform, states[0])
            ROWS.stats(tile, target, first, transform, states[1], keep_RC=out[0].bfloat16())
            ROWS.stats_exp(tile.clone(), target, first, transform, states[2], out[0], None)
            ROWS.stats_exp(tile.clone(), target, first, transform, states[3], out[0], out[1])
        for state in states[1:]:
            for name in RowState.__slots__:
                assert torch.equal(getattr(state, name), getattr(states[0], name))


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
    state = empty_state(1, torch.float32)
    target = torch.full((1,), NO_TARGET)
    ROWS.stats(below, target, 0, PLAIN, state)
    dx = torch.empty_like(below)
    one, zero = torch.ones(1), torch.zeros(1)
    ROWS.dscores(below, target, 0, PLAIN, RowGradients(zero, zero, one, None, None), dx)
    exact = below.double().exp()
    error = (dx.double() - exact).abs()
    assert bool((error <= 1.3e-7 * exact + 1.2e-38).all())
    torch.testing.assert_close(state.total.double(), exact.sum(1), rtol=1e-6, atol=0.0)


def test_a_row_of_minus_inf_keeps_a_finite_state_and_later_tiles_count(instruction_set: str) -> None:
    x = torch.full((2, 40), -torch.inf)
    x[:, 35] = torch.tensor([3.0, -1e30])
    state = empty_state(2, torch.float32)
    target = torch.tensor([35, 35])
    ROWS.stats(x[:, :20], target, 0, Transform(None, None, 1.0, True), state)
    assert torch.equal(state.maximum, torch.full((2,), LOWEST)) and torch.equal(state.total, torch.zeros(2))
    assert state.weighted is not None and torch.equal(state.weighted, torch.zeros(2))
    ROWS.stats(x[:, 20:], target, 20, Transform(None, None, 1.0, True), state)
    assert torch.equal(state.maximum, x[:, 35]) and torch.equal(state.total, torch.ones(2))
    assert torch.equal(state.weighted, torch.zeros(2)) and torch.equal(state.target, x[:, 35])


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
    target = torch.tensor([3, SKIP_ROW, 69, SKIP_ROW, NO_TARGET])
    for dtype in (torch.float32, *HALVES):
        kept = torch.full((5, 70), torch.nan, dtype=dtype)
        offset = ROWS.stats(x, target, 0, PLAIN, empty_state(5, torch.float32), keep_RC=kept)
        if offset is not None:
            assert torch.equal(kept[1::2], torch.zeros_like(kept[1::2])) and torch.equal(offset[1::2], torch.zeros(2))
        weights, weighted = torch.full((2, 5, 70), torch.nan, dtype=dtype)
        ROWS.stats_exp(x, target, 0, PLAIN, empty_state(5, torch.float32), weights, weighted)
        for out in (weights, weighted):
            assert torch.equal(out[1::2], torch.zeros_like(out[1::2])) and out.isfinite().all()
    dx = torch.full_like(x, torch.nan)
    zero = torch.zeros(5)
    base = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    ROWS.dscores(x, target, 0, PLAIN, RowGradients(zero, zero, base, None, torch.tensor([1.0, 1, 0, 1, 1])), dx)
    assert torch.equal(dx[1:4], torch.zeros(3, 70)) and (dx[[0, 4]] != 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_every_half_precision_number_is_read_and_written_as_pytorch_does(
    instruction_set: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite() & (every <= 0)]
    # Read: the gradient of half-precision scores equals that of the same numbers in fp32.
    below = finite[finite > -80][None]
    zero, one = torch.zeros(1), torch.ones(1)
    target = torch.zeros(1, dtype=torch.int64)
    outs = [torch.empty(1, below.shape[1]) for _ in range(2)]
    for x, out in zip((below, below.float()), outs, strict=True):
        ROWS.dscores(x, target, 0, PLAIN, RowGradients(zero, zero, one, one, one), out, offset_R=zero)
    assert torch.equal(*outs)
    # Write: numbers between and on the ties of the format, its smallest, its overflow, and NaN.
    exact = finite.float()
    some = torch.cat(
        (
            exact,
            (exact + exact.roll(1)) / 2,
            exact * 1.0001,
            exact * 0.9999,
            -torch.logspace(-45, 38, 9001, dtype=torch.float64).float(),
            torch.tensor([-65519.9, -65520.0, -1e9, -torch.inf]),
        )
    )
    some = some[~some.isnan()]
    x = torch.cat((some, torch.zeros(1)))[None]
    kept = torch.empty(x.shape, dtype=dtype)
    offset = ROWS.stats(x, target, 0, PLAIN, empty_state(1, torch.float32), keep_RC=kept)
    assert torch.equal(offset, zero)
    assert torch.equal(kept.view(torch.int16), (x - 0.0).to(dtype).view(torch.int16))
    ROWS.stats(torch.full((1, 3), torch.nan), target, 0, PLAIN, empty_state(1, torch.float32), keep_RC=kept[:, :3])
    assert kept[:, :3].isnan().all()


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


def run_head(rows: slice, threads: int, **options: Any) -> list[Tensor]:
    hidden = normal(300, 48, dtype=torch.float32)[rows].requires_grad_()
    weight = normal(2500, 48, seed=1, dtype=torch.float32).requires_grad_(not options.get("frozen"))
    target = (torch.arange(300) * 7 % 2500)[rows]
    options = {name: value for name, value in options.items() if name != "frozen"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = linear_logprob(hidden, weight, target, return_entropy=True, backend="native", **options)
        assert result.entropy is not None
        (result.logp + result.entropy * 0.3 - result.lse * 0.1).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert hidden.grad is not None
    return [result.logp.detach(), result.entropy.detach(), result.lse.detach(), hidden.grad]


MODES: dict[str, dict[str, Any]] = {
    "recompute": {"mode": "recompute"},
    "cache": {"mode": "cache", "logit_cache_bytes": 1 << 30},
    "frozen": {"mode": "frozen", "frozen": True},
    "softcap": {"mode": "recompute", "softcap": 4.0},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_results_do_not_depend_on_threads_or_on_other_rows(mode: dict[str, Any]) -> None:
    everyone = run_head(slice(0, 300), 1, **mode)
    for ours, again in zip(run_head(slice(0, 300), 2, **mode), everyone, strict=True):
        assert torch.equal(ours, again)
    for rows in (slice(7, 8), slice(120, 137)):
        for alone, together in zip(run_head(rows, 2, **mode)[:3], everyone[:3], strict=True):
            assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_whole_op_against_the_reference(instruction_set: str, mode: dict[str, Any], dtype: torch.dtype) -> None:
    """Error against fp64 from the same inputs at most that of the chunked backend's, with every option."""
    hidden, weight, bias = normal(40, 24, dtype=dtype), normal(1500, 24, seed=1, dtype=dtype), normal(1500, dtype=dtype)
    target = torch.arange(40) * 37
    target[::9] = -100
    temperature = torch.linspace(0.5, 2, 40)
    options = {name: value for name, value in mode.items() if name != "frozen"}

    def everything(dtype: torch.dtype, backend: str, **extra: Any) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        if mode.get("frozen"):
            leaves[1], leaves[2] = leaves[1].detach(), leaves[2].detach()
        result = linear_logprob(
            leaves[0],
            leaves[1],
            target,
            bias=leaves[2],
            temperature=temperature,
            softcap=mode.get("softcap"),
            return_entropy=True,
            backend=backend,
            **extra,
        )
        assert result.entropy is not None
        total = (result.logp + result.entropy * 0.5 - result.lse * 0.25).sum()
        return [*(v.detach() for v in result), *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])]

    extra = {name: value for name, value in options.items() if name != "softcap"}
    exact = everything(torch.float64, "reference")
    torchs = everything(dtype, "chunked", **extra)
    for mine, theirs, truth in zip(everything(dtype, "native", **extra), torchs, exact, strict=True):
        assert (mine - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-6 * truth.norm()


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
        "first": 0,
        "bias": None,
        "softcap": 0.0,
        "inverse_temperature": None,
        "inverse": 1.0,
        "maximum": vector,
        "log_total": vector,
        "base": vector,
        "entropy": None,
        "target_gradient": None,
        "offset": None,
        "dx": x.clone(),
    }
    torch.ops.specs_kernels.row_pass_gradients(**good)
    for change in (
        {"x": torch.zeros(3, 4, dtype=torch.float64)},
        {"x": torch.zeros(3)},
        {"target": target.int()},
        {"target": target[:2]},
        {"bias": torch.zeros(5)},
        {"bias": torch.zeros(8)[::2]},
        {"base": torch.zeros(2)},
        {"offset": vector.double()},
        {"dx": torch.zeros(4, 3)},
        {"dx": torch.zeros(3, 4, dtype=torch.int32)},
        {"softcap": -1.0},
    ):
        with pytest.raises(RuntimeError, match="native row pass"):
            torch.ops.specs_kernels.row_pass_gradients(**(good | change))

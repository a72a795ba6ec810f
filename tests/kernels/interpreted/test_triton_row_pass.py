"""The Triton row passes against their definition (``row_pass.py``) in fp64, over ragged tiles of a row."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import NO_TARGET, SKIP_ROW, RowGradients, RowState, Transform
from specs_kernels.linear_logprob.triton import TritonRowPass

PASS = TritonRowPass()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


class Row(NamedTuple):
    """Everything about some rows of products, by the definition, in fp64."""

    z: Tensor
    m: Tensor
    s: Tensor
    t: Tensor
    slope: Tensor


def make_rows(num_rows: int, columns: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows * 1000 + columns)
    return (scale * torch.randn(num_rows, columns, generator=generator)).to(dtype)


def definition(x: Tensor, bias: Tensor | None, softcap: float | None, inverse: float | Tensor) -> Row:
    y = x.double() if bias is None else x.double() + bias.double()
    slope = torch.ones_like(y)
    if softcap is not None:
        slope = 1 - torch.tanh(y / softcap) ** 2
        y = softcap * torch.tanh(y / softcap)
    z = y * (inverse[:, None].double() if isinstance(inverse, Tensor) else inverse)
    m = z.amax(1)
    shifted = z - m[:, None]
    product = torch.where(shifted == -torch.inf, 0.0, shifted.exp() * shifted)
    return Row(z, m, shifted.exp().sum(1), product.sum(1), slope)


def new_state(num_rows: int, dtype: torch.dtype, entropy: bool = True) -> RowState:
    """Undefined, as the interface says, but for the target."""
    m, s, t = torch.full((3, num_rows), torch.nan, dtype=dtype)
    return RowState(m, s, t if entropy else None, torch.zeros(num_rows, dtype=dtype))


def slices(columns: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def cut(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


def transform(bias: Tensor | None, softcap: float | None, inverse: float | Tensor) -> Transform:
    return Transform(bias, softcap, inverse, True)


OPTIONS = list(itertools.product((False, True), (None, 2.5), ("one", "number", "rows")))
SHAPES = [(1, 1), (31, 31), (2311, 2311)]
CASES = [(300, 128, *options) for options in OPTIONS] + [(*shape, True, 2.5, "rows") for shape in SHAPES]


def make_options(
    columns: int, rows: int, dtype: torch.dtype, bias: bool, kind: str
) -> tuple[Tensor | None, float | Tensor]:
    bias_C = None
    if bias:
        bias_C = make_rows(1, columns, dtype)[0]
        bias_C[columns // 3] = -torch.inf
    inverse: float | Tensor = {"one": 1.0, "number": 1 / 0.7}.get(kind, 0.0)
    return bias_C, inverse or torch.linspace(0.4, 2.5, rows, dtype=dtype)


def merged(x: Tensor, target: Tensor, width: int, options: Transform, state: RowState) -> None:
    for part in slices(x.shape[1], width):
        tile = Transform(cut(options.bias_C, part), options.softcap, options.inverse_temperature, True)
        PASS.stats(x[:, part], target, part.start, tile, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns, width, bias, softcap, kind", CASES)
def test_statistics_of_a_row_that_comes_in_tiles(
    columns: int, width: int, bias: bool, softcap: float | None, kind: str, dtype: torch.dtype
) -> None:
    x = make_rows(4, columns, dtype)
    bias_C, inverse = make_options(columns, 4, dtype, bias and columns > 1, kind)
    target = torch.tensor([0, columns - 1, NO_TARGET, columns // 2])
    state = new_state(4, dtype)
    merged(x, target, width, transform(bias_C, softcap, inverse), state)
    exact = definition(x, bias_C, softcap, inverse)
    tight = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(state.maximum.double() + state.total.double().log(), exact.m + exact.s.log(), **tight)
    torch.testing.assert_close(
        (state.weighted / state.total).double(), exact.t / exact.s, rtol=1e-5, atol=tight["atol"]
    )
    z_target = torch.where(target >= 0, exact.z.gather(1, target.clamp(min=0)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(state.target.double(), z_target, rtol=1e-5, atol=tight["atol"])


def test_a_skipped_row_is_neither_read_nor_written() -> None:
    x = make_rows(3, 70, torch.float32)
    x[1] = torch.nan
    state = new_state(3, torch.float32)
    state.total[1] = 7.0
    PASS.stats(x, torch.tensor([0, SKIP_ROW, 5]), 0, transform(None, None, 1.0), state)
    assert state.total[1] == 7.0 and state.maximum[1].isnan() and state.target[1] == 0
    assert state.total[[0, 2]].isfinite().all()


def test_without_entropy_the_weighted_sum_does_not_exist() -> None:
    x = make_rows(3, 70)
    state = new_state(3, torch.float64, entropy=False)
    merged(x, torch.tensor([0, 1, 2]), 64, transform(None, None, 1.0), state)
    exact = definition(x, None, None, 1.0)
    torch.testing.assert_close(state.maximum + state.total.log(), exact.m + exact.s.log())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_rows_far_from_0_lose_nothing(shift: float) -> None:
    """A running maximum that starts at 0 underflows below; exp without a maximum overflows above."""
    x = make_rows(2, 200, torch.float32) + shift
    target = torch.tensor([3, 150])
    state = new_state(2, torch.float32)
    merged(x, target, 96, transform(None, None, 1.0), state)
    exact = definition(x, None, None, 1.0)
    logp = (state.target - state.maximum) - state.total.log()
    expected = exact.z.gather(1, target[:, None])[:, 0] - (exact.m + exact.s.log())
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_minus_inf_stays_finite_and_a_nan_row_stays_alone() -> None:
    x = make_rows(4, 100, torch.float32)
    x[0] = -torch.inf
    x[1, 99] = torch.nan
    x[3, :50] = -torch.inf
    state = new_state(4, torch.float32)
    merged(x, torch.tensor([0, 1, 2, 60]), 40, transform(None, None, torch.tensor([2.0, 1.0, 1.0, 2.0])), state)
    assert state.maximum[0].isfinite() and state.total[0] == 0 and state.weighted is not None and state.weighted[0] == 0
    assert state.total[1].isnan()
    exact = definition(x[2:], None, None, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(state.maximum[2:].double() + state.total[2:].double().log(), exact.m + exact.s.log())
    torch.testing.assert_close(state.weighted[2:].double(), exact.t, rtol=1e-5, atol=1e-5)


def test_a_huge_score_after_a_tile_of_minus_inf() -> None:
    """The difference of the two maxima overflows; what it multiplies is 0."""
    x = torch.full((1, 80), -torch.inf)
    x[0, 40:] = torch.linspace(1e35, 1.1e35, 40)
    state = new_state(1, torch.float32)
    merged(x, torch.tensor([79]), 40, transform(None, None, 1.0), state)
    assert state.weighted is not None
    assert state.maximum[0] == x[0, 79] == state.target[0] and state.total[0] == 1 and state.weighted[0] == 0


def test_softcap_keeps_the_digits_of_small_scores() -> None:
    x = torch.tensor([[1e-4, -3e-3, 0.7, 5.9, -6.1, 200.0]])
    for column in range(6):
        state = new_state(1, torch.float32)
        PASS.stats(x, torch.tensor([column]), 0, transform(None, 30.0, 1.0), state)
        expected = 30 * torch.tanh(x[0, column].double() / 30)
        torch.testing.assert_close(state.target[0].double(), expected, rtol=1e-6, atol=0)


def gradients_of(row: Row, target: Tensor, g: Tensor | None, q: Tensor | None, r: Tensor | None) -> RowGradients:
    zero = torch.zeros_like(row.m)
    base = (zero if r is None else r) - (zero if g is None else g) + (zero if q is None else q * row.t / row.s)
    return RowGradients(row.m, row.s.log(), base, q, g)


def exact_dx(row: Row, inverse: float | Tensor, target: Tensor, grads: RowGradients) -> Tensor:
    shifted = row.z - row.m[:, None]
    p = (shifted - grads.log_total[:, None]).exp()
    zero = torch.zeros_like(row.m)
    q = zero if grads.entropy is None else grads.entropy
    dz = p * (grads.base[:, None] - q[:, None] * shifted.clamp(min=-1e9))
    if grads.target is not None:
        dz = dz + torch.where(torch.arange(row.z.shape[1]) == target[:, None], grads.target[:, None], 0.0)
    return dz * row.slope * (inverse[:, None].double() if isinstance(inverse, Tensor) else inverse)


def rounded_gradients(grads: RowGradients, dtype: torch.dtype) -> RowGradients:
    return RowGradients(
        grads.maximum.to(dtype),
        grads.log_total.to(dtype),
        grads.base.to(dtype),
        None if grads.entropy is None else grads.entropy.to(dtype),
        None if grads.target is None else grads.target.to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns, width, bias, softcap, kind", CASES)
def test_gradient_of_products(
    columns: int, width: int, bias: bool, softcap: float | None, kind: str, dtype: torch.dtype
) -> None:
    x = make_rows(4, columns, dtype)
    bias_C, inverse = make_options(columns, 4, dtype, bias and columns > 1, kind)
    target = torch.tensor([0, columns - 1, NO_TARGET, columns // 2])
    row = definition(x, bias_C, softcap, inverse)
    g, q, r = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = gradients_of(row, target, g, q, r)
    dx = torch.empty_like(x)
    for part in slices(columns, width):
        options = transform(cut(bias_C, part), softcap, inverse)
        PASS.dscores(x[:, part], target, part.start, options, rounded_gradients(grads, dtype), dx[:, part])
    expected = exact_dx(row, inverse, target, grads)
    scale = float(expected.abs().max())
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=10 * TOLERANCE[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("names", [n for k in (1, 2, 3) for n in itertools.combinations("gqr", k)], ids="".join)
def test_each_upstream_gradient_alone_and_together(names: tuple[str, ...]) -> None:
    x = make_rows(3, 90)
    target = torch.tensor([4, 89, 0])
    row = definition(x, None, None, 1.0)
    values = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g, q, r = (values[i] if name in names else None for i, name in enumerate("gqr"))
    grads = gradients_of(row, target, g, q, r)
    dx = torch.empty_like(x)
    PASS.dscores(x, target, 0, transform(None, None, 1.0), grads, dx)
    torch.testing.assert_close(dx, exact_dx(row, 1.0, target, grads))
    # Only the log-sum-exp moves with a common shift of the scores.
    torch.testing.assert_close(dx.sum(1), torch.zeros(3, dtype=torch.float64) if r is None else r)


def test_gradient_in_place_and_rows_that_pass_none_are_zero_without_being_read() -> None:
    x = make_rows(4, 5000, torch.float32)
    target = torch.tensor([1, SKIP_ROW, 3, 4])
    row = definition(x, None, None, 1.0)
    g = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    grads = gradients_of(row, target, g, None, None)
    expected = exact_dx(row, 1.0, target, grads)
    x[1], x[2] = torch.nan, torch.inf
    PASS.dscores(x, target, 0, transform(None, None, 1.0), rounded_gradients(grads, torch.float32), x)
    torch.testing.assert_close(x[[0, 3]].double(), expected[[0, 3]], rtol=1e-5, atol=1e-6)
    assert torch.equal(x[1:3], torch.zeros(2, 5000))


def test_the_target_column_is_formed_before_rounding() -> None:
    """At p close to 1, p rounded to bf16 is 1 and p - 1 rounded afterwards would be 0 or a whole bf16 step."""
    x = torch.zeros(1, 64)
    x[0, 5] = 11.0
    target = torch.tensor([5])
    row = definition(x, None, None, 1.0)
    grads = gradients_of(row, target, torch.ones(1, dtype=torch.float64), None, None)
    dx = torch.empty(1, 64, dtype=torch.bfloat16)
    PASS.dscores(x, target, 0, transform(None, None, 1.0), rounded_gradients(grads, torch.float32), dx)
    expected = exact_dx(row, 1.0, target, grads)
    assert 0 < float(expected[0, 5]) < 2**-9
    torch.testing.assert_close(dx[0, 5].double(), expected[0, 5], rtol=2**-8, atol=0)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("keep", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_from_kept_scores(keep: torch.dtype, softcap: float | None) -> None:
    x = make_rows(3, 700, torch.float32)
    inverse = torch.tensor([1.0, 0.5, 2.0])
    target = torch.tensor([1, SKIP_ROW, 600])
    options = transform(None, softcap, inverse)
    kept = torch.empty(3, 700, dtype=keep)
    state = new_state(3, torch.float32)
    offset = PASS.stats(x, target, 0, options, state, keep_RC=kept)
    row = definition(x, None, softcap, inverse)
    live = [0, 2]
    if keep == torch.float32:
        assert offset is None and torch.equal(kept, x)
    else:
        assert offset is not None and torch.equal(kept[1], torch.zeros(700, dtype=keep))
        exact = row.z[live] - offset[live, None].double()
        torch.testing.assert_close(kept[live], exact.to(keep), rtol=torch.finfo(keep).eps, atol=1e-5)
    g, q, r = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = gradients_of(row, target, g, q, r)
    dx = torch.empty(3, 700)
    PASS.dscores(kept, target, 0, options, rounded_gradients(grads, torch.float32), dx, offset_R=offset)
    expected = exact_dx(row, inverse, target, grads)[live]
    error = (dx[live].double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[keep]
    assert torch.equal(dx[1], torch.zeros(700))


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted, in_place", [(False, False), (True, False), (True, True)])
def test_unnormalised_weights_and_the_rescale_of_earlier_tiles(
    weighted: bool, in_place: bool, out: torch.dtype, softcap: float | None
) -> None:
    x = make_rows(3, 900, torch.float32)
    x[0] = x[0].sort().values
    target = torch.tensor([1, SKIP_ROW, 800])
    options = transform(None, softcap, 1 / 0.7)
    state = new_state(3, torch.float32)
    row = definition(x, None, softcap, 1 / 0.7)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in slices(900, 400):
        tile = x[:, part].clone()
        exp = tile if in_place and out == torch.float32 else torch.empty(tile.shape, dtype=out)
        extra = torch.empty(tile.shape, dtype=out) if weighted else None
        rescale = PASS.stats_exp(tile, target, part.start, options, state, exp, extra)
        assert part.start == 0 or bool((rescale[[0, 2]] <= 0).all())
        factor = rescale.double().exp() if part.start else torch.zeros(3, dtype=torch.float64)
        seen = row.z[:, : part.stop].amax(1)
        shifted = row.z[:, part] - seen[:, None]
        exact = shifted.exp() * row.slope[:, part]
        exact[torch.arange(part.start, part.stop) == target[:, None]] = 0.0
        step = max(torch.finfo(out).eps, 4e-6)
        torch.testing.assert_close(exp[[0, 2]].double(), exact[[0, 2]], rtol=step, atol=step * 1e-2)
        assert torch.equal(exp[1], torch.zeros_like(exp[1]))
        if extra is not None:
            torch.testing.assert_close(
                extra[[0, 2]].double(), (exact * shifted)[[0, 2]], rtol=2 * step, atol=max(step * 1e-2, 2e-6)
            )
        sums[0] = sums[0] * factor + exp.double().sum(1)
        sums[1] = sums[1] * factor + exact.sum(1)
    torch.testing.assert_close(sums[0, [0, 2]], _all_but_target(row, target)[[0, 2]], rtol=5e-3, atol=0)


def _all_but_target(row: Row, target: Tensor) -> Tensor:
    exact = (row.z - row.m[:, None]).exp() * row.slope
    exact[torch.arange(900) == target[:, None]] = 0.0
    return exact.sum(1)


def test_a_row_alone_equals_the_row_in_a_batch_bitwise() -> None:
    x = make_rows(5, 3000, torch.float32)
    target = torch.tensor([1, 2999, 7, SKIP_ROW, 100])
    together, alone = new_state(5, torch.float32), new_state(1, torch.float32)
    merged(x, target, 1000, transform(None, 3.0, 1.0), together)
    merged(x[2:3], target[2:3], 1000, transform(None, 3.0, 1.0), alone)
    for many, one in zip(
        (together.maximum, together.total, together.weighted, together.target),
        (alone.maximum, alone.total, alone.weighted, alone.target),
        strict=True,
    ):
        assert many is not None and one is not None and torch.equal(many[2:3], one)


@pytest.mark.parametrize("rows, stride", [(2, 2**31 + 64), (2**11 + 1, 2**20)])
def test_offsets_beyond_32_bits(rows: int, stride: int) -> None:
    """A stride that needs 64 bits, and one that does not while row * stride does."""
    storage = torch.empty((rows - 1) * stride + 32, dtype=torch.bfloat16)  # committed only where it is touched
    x = storage.as_strided((rows, 32), (stride, 1))
    values = make_rows(1, 32, torch.bfloat16)[0]
    x[-1] = values
    target = torch.full((rows,), SKIP_ROW)
    target[-1] = 9
    state = new_state(rows, torch.float32)
    PASS.stats(x, target, 0, transform(None, None, 1.0), state)
    exact = definition(values[None], None, None, 1.0)
    torch.testing.assert_close(
        state.maximum[-1].double() + state.total[-1].double().log(), exact.m[0] + exact.s[0].log()
    )
    grads = RowGradients(state.maximum, state.total.log(), -torch.ones(rows), None, torch.ones(rows))
    target[:-1] = SKIP_ROW
    PASS.dscores(x[-1:], target[-1:], 0, transform(None, None, 1.0), grads.rows(slice(rows - 1, rows)), x[-1:])
    p = (exact.z - exact.m).exp() / exact.s
    p[0, 9] -= 1
    torch.testing.assert_close(x[-1].double(), -p[0], rtol=2**-8, atol=1e-7)

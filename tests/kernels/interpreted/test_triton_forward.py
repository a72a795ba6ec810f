"""The fused forward of linear_logprob in Triton against its definition in fp64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specs_kernels import triton_common
from specs_kernels.linear_logprob.reference import head_scores, token_statistics
from specs_kernels.linear_logprob.row_pass import NO_TARGET, SKIP_ROW, RowState
from specs_kernels.linear_logprob.triton_forward import fused_statistics

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def make_inputs(n: int, v: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 100 * v + d)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (2.0 * torch.randn(v, d, generator=generator) / d**0.5).to(dtype)
    target = torch.randint(0, v, (n,), generator=generator)
    target[2::5] = SKIP_ROW
    return hidden, weight, target


class Result(NamedTuple):
    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    state: RowState


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = True,
) -> Result:
    """Outputs from the state that the kernels leave."""
    acc = torch.promote_types(hidden.dtype, torch.float32)
    state = RowState(
        *(
            torch.zeros(hidden.shape[0], dtype=acc, device=hidden.device) if wanted else None
            for wanted in (True, True, entropy, True)
        )
    )  # type: ignore[arg-type]
    inverse = (1 / temperature.double()).to(acc) if isinstance(temperature, Tensor) else 1 / temperature
    bias = None if bias is None else bias.to(acc)
    fused_statistics(hidden, weight, target, bias, inverse, softcap, scale, state)
    log_s = state.total.log()
    values = [state.target - state.maximum - log_s, state.maximum + log_s]
    if state.weighted is not None:
        values.append(log_s - state.weighted / state.total)
    values = [torch.where(target == SKIP_ROW, 0.0, value) for value in values]
    return Result(values[0], values[2] if entropy else None, values[1], state)


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    kept = (target != SKIP_ROW).nonzero()[:, 0]
    z = head_scores(
        hidden[kept].double(),
        weight.double(),
        None if bias is None else bias.double(),
        temperature[kept].double() if isinstance(temperature, Tensor) else temperature,
        softcap,
        scale,
    )
    expected = token_statistics(z, target[kept])
    result = run(hidden, weight, target, bias, temperature, softcap, scale)
    tolerance = 1e-12 if hidden.dtype == torch.float64 else 1e-5
    for ours, exact in zip(result[:3], expected, strict=True):
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours[kept].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v, d", [(1, 1), (2, 7), (31, 8), (127, 70), (1025, 64), (2100, 80)])
def test_ragged_vocabulary_and_hidden_size(v: int, d: int, dtype: torch.dtype) -> None:
    check(*make_inputs(5, v, d, dtype))


@pytest.mark.parametrize("n", [0, 1, 15, 31, 32, 33, 150])
def test_any_number_of_rows(n: int) -> None:
    check(*make_inputs(n, 300, 24))


@pytest.mark.parametrize("v", [255, 1023, 1025])
def test_softcap_with_ragged_vocabulary(v: int) -> None:
    """Columns past V that survive the softcap would count as scores of -cap each."""
    hidden, weight, target = make_inputs(6, v, 40)
    check(hidden, weight - 3, target, softcap=2.0)


@pytest.mark.parametrize("kind", ["scalar", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_all_options_together(kind: str, dtype: torch.dtype) -> None:
    hidden, weight, target = make_inputs(7, 1100, 72, dtype)
    bias = torch.randn(1100, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias[1050] = -torch.inf if kind == "scalar" else 1.0
    temperature = 1.3 if kind == "scalar" else torch.linspace(0.1, 10, 7, dtype=torch.float64)
    check(hidden, weight, target, bias, temperature, 5.0, 0.5)


def test_a_bias_of_minus_inf_forbids_a_column() -> None:
    hidden, weight, target = make_inputs(4, 1300, 16)
    bias = torch.zeros(1300)
    bias[1020:1290] = -torch.inf
    target[:] = torch.tensor([3, 1299, 7, 1000])
    check(hidden, weight, target, bias)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_far_from_0(shift: float) -> None:
    """An epilogue whose running maximum starts at 0 underflows when all scores are far below."""
    hidden, weight, target = make_inputs(4, 1100, 32)
    logp, entropy, lse, _ = run(hidden, weight, target)
    moved = run(hidden, weight, target, torch.full((1100,), shift))
    assert entropy is not None and moved[1] is not None
    torch.testing.assert_close(moved[0], logp, rtol=0, atol=4e-3)  # scores near 1e4 are 1e-3 apart in fp32
    torch.testing.assert_close(moved[1], entropy, rtol=0, atol=4e-3)
    torch.testing.assert_close(moved[2] - shift * (target != SKIP_ROW), lse, rtol=0, atol=4e-3)


def test_confident_targets() -> None:
    hidden, weight, target = make_inputs(3, 700, 32)
    target[:] = torch.tensor([5, 699, 0])
    hidden = 4 * weight[target]
    check(hidden, weight, target)
    assert float(run(hidden, weight, target)[0].max()) > -0.1


def test_ignored_rows_may_hold_anything_and_one_nan_row_stays_alone() -> None:
    hidden, weight, target = make_inputs(40, 600, 24)
    target[2], target[30] = SKIP_ROW, 8
    hidden[2] = torch.inf
    clean = run(hidden, weight, target)
    hidden[2], hidden[30, 3] = torch.nan, torch.nan
    dirty = run(hidden, weight, target)
    rest = torch.arange(40) != 30
    for before, after in zip(clean[:3], dirty[:3], strict=True):
        assert before is not None and after is not None
        assert torch.equal(before[rest], after[rest]) and before.isfinite().all() and after[30].isnan()


def test_a_row_whose_target_is_in_another_slice_of_the_vocabulary() -> None:
    hidden, weight, target = make_inputs(3, 1100, 16)
    here, elsewhere = run(hidden, weight, target), run(hidden, weight, torch.full_like(target, NO_TARGET))
    assert torch.equal(elsewhere.state.target, torch.zeros(3))
    kept = target != SKIP_ROW
    assert torch.equal(elsewhere.lse[kept], here.lse[kept])


def test_a_row_alone_equals_the_row_in_a_batch_bitwise() -> None:
    hidden, weight, target = make_inputs(70, 2100, 48, torch.bfloat16)
    together = run(hidden, weight, target)
    alone = run(hidden[65:66], weight, target[65:66])
    shuffled = run(hidden.flip(0), weight, target.flip(0))
    for many, one, back in zip(together[:3], alone[:3], shuffled[:3], strict=True):
        assert many is not None and one is not None and back is not None
        assert torch.equal(many[65:66], one) and torch.equal(many, back.flip(0))


def test_where_the_batch_lies_in_memory_changes_no_bit() -> None:
    hidden, weight, target = make_inputs(5, 300, 24, torch.bfloat16)
    moved = torch.empty(5 * 24 + 1, dtype=torch.bfloat16)[1:].view(5, 24).copy_(hidden)
    assert moved.data_ptr() % 16 != 0
    spread = torch.empty(5, 25, dtype=torch.bfloat16)[:, :24].copy_(hidden)
    for other in (moved, spread, hidden.T.contiguous().T):
        assert torch.equal(run(other, weight, target).logp, run(hidden, weight, target).logp)


def test_entropy_is_optional_and_changes_nothing_else() -> None:
    hidden, weight, target = make_inputs(5, 1500, 30)
    without, with_entropy = run(hidden, weight, target, entropy=False), run(hidden, weight, target)
    assert without.entropy is None and without.state.weighted is None
    assert torch.equal(without[0], with_entropy[0]) and torch.equal(without[2], with_entropy[2])


def test_strided_operands() -> None:
    hidden, weight, target = make_inputs(6, 300, 40)
    check(hidden.T.contiguous().T, weight.T.contiguous().T, target)
    check(torch.cat([hidden, hidden], 1)[:, :40], weight[::1, :].repeat_interleave(2, 0)[::2], target)


@pytest.mark.parametrize("d, described", [(64, True), (70, False), (72, True)])
def test_descriptors_where_aligned_and_pointers_otherwise(d: int, described: bool) -> None:
    with triton_common.recorded("sm90") as launches:
        hidden = torch.empty(256, d, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(4096, d, dtype=torch.bfloat16, device="meta")
        run(hidden, weight, torch.empty(256, dtype=torch.int64, device="meta"))
    assert launches[0].arguments["DESCRIPTOR"] is described


def test_slices_depend_on_the_vocabulary_only() -> None:
    shapes = set()
    for n in (1, 16, 70000):
        with triton_common.recorded("sm90") as launches:
            hidden = torch.empty(n, 64, dtype=torch.bfloat16, device="meta")
            weight = torch.empty(151936, 64, dtype=torch.bfloat16, device="meta")
            run(hidden, weight, torch.empty(n, dtype=torch.int64, device="meta"))
        shapes.add((launches[0].arguments["SLICE"], launches[1].arguments["slices"]))
    assert shapes == {(1024, 149)}


@pytest.mark.parametrize("dim", [16, 15], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("rows, stride", [(2, 2**31 + 64), (2**11 + 1, 2**20)])
def test_offsets_beyond_32_bits(rows: int, stride: int, dim: int) -> None:
    """A stride that needs 64 bits, and one that does not while row * stride does."""
    stride += dim % 2
    storage = torch.empty((rows - 1) * stride + dim, dtype=torch.bfloat16)  # committed only where it is touched
    far = storage.as_strided((rows, dim), (stride, 1))
    near, weight, target = make_inputs(1, 40, dim, torch.bfloat16)
    far[-1] = near[0]
    targets = torch.full((rows,), SKIP_ROW)
    targets[-1] = target[0]
    # Blocks of skipped rows are not read, so only the last block is touched.
    assert torch.equal(run(far, weight, targets)[0][-1:], run(near, weight, target)[0])
    weights = torch.randn(rows, dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    far.copy_(weights)
    last = torch.tensor([rows - 1])
    assert torch.equal(run(near, far, last)[0], run(near, weights, last)[0])

"""linear_logprob: values and gradients against the definition, tile borders, ignored rows, shared rows, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import PackedLayout, TokenLogprobs, linear_logprob, native
from specs_kernels.linear_logprob import head, modes

OUTPUTS = ("logp", "entropy", "lse")


def make_inputs(n: int, d: int, v: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(v, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, bias, target


def gradients(result: TokenLogprobs, inputs: tuple[Tensor, ...], names: tuple[str, ...] = OUTPUTS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=result.logp.dtype)
    for name in OUTPUTS:
        values = getattr(result, name)
        upstream = torch.randn(result.logp.shape, generator=generator, dtype=torch.float64)
        if name in names:
            total = total + (values * upstream.to(values.dtype)).sum()
    return list(torch.autograd.grad(total, inputs))


def set_tile(monkeypatch: pytest.MonkeyPatch, entries: int | None, rows: int = 6) -> None:
    """fp64 tiles of at most this many scores and rows, formed in blocks of up to two rows; no scores kept for the backward.

    "auto" is then the PyTorch backend, the only one with these tiles; with None it is the best one that can run.
    """
    if entries is None:
        return
    monkeypatch.setattr(native, "missing", lambda: "hidden from this test")
    block = min(2, rows, entries)
    columns = max(1, entries // rows)
    monkeypatch.setattr(head, "CPU_TILING", head.Tiling(block, rows, 2 * columns))
    monkeypatch.setattr(head, "CPU_TILE_BYTES", 8 * columns * rows)
    monkeypatch.setattr(modes, "KEPT_BYTES", 0)


def test_values_are_log_softmax_entropy_and_log_sum_exp() -> None:
    hidden, weight, bias, target = make_inputs(5, 4, 6)
    result = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    log_p = F.log_softmax(hidden @ weight.T + bias, dim=1)
    torch.testing.assert_close(result.logp, log_p[torch.arange(5), target])
    torch.testing.assert_close(result.entropy, torch.distributions.Categorical(logits=log_p).entropy())
    torch.testing.assert_close(result.lse, torch.logsumexp(hidden @ weight.T + bias, dim=1))


def test_order_of_scale_bias_softcap_and_temperature_by_hand() -> None:
    hidden, weight = torch.tensor([[2.0]]), torch.tensor([[1.0], [-1.0]])
    result = linear_logprob(
        hidden,
        weight,
        torch.tensor([0]),
        bias=torch.tensor([0.5, 0.0]),
        temperature=0.5,
        softcap=3.0,
        logit_scale=2.0,
    )
    z = [3 * torch.tanh(torch.tensor(4.5 / 3)) / 0.5, 3 * torch.tanh(torch.tensor(-4.0 / 3)) / 0.5]
    expected = torch.log_softmax(torch.stack(z), 0)[0]
    torch.testing.assert_close(result.logp, expected[None])


@pytest.mark.parametrize("tile", [None, 40, 12, 3, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per target"])
def test_chunked_equals_reference_across_tile_borders(
    monkeypatch: pytest.MonkeyPatch, tile: int | None, softcap: float | None, temperature: Any
) -> None:
    set_tile(monkeypatch, tile, rows=3)
    hidden, weight, bias, target = make_inputs(8, 3, 7)
    target[2] = -100
    rows = torch.tensor([0, 1, -1, 3, 3, 3, 7, 0])
    if temperature == "per target":
        temperature = torch.linspace(0.5, 2.0, 8)
    results = [
        linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=1.7,
            return_entropy=True,
            rows=rows,
            backend=backend,
        )
        for backend in ("reference", "chunked")
    ]
    for ours, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)
    reference = gradients(results[0], (hidden, weight, bias))
    for ours, exact in zip(gradients(results[1], (hidden, weight, bias)), reference, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-11, rtol=1e-11)


SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(OUTPUTS, size)]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("tile", [None, 5])
def test_gradcheck_of_each_output_alone_and_together(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], tile: int | None
) -> None:
    set_tile(monkeypatch, tile)
    hidden, weight, bias, target = make_inputs(4, 2, 5)
    target[1] = -100

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = linear_logprob(
            hidden, weight, target, bias=bias, temperature=0.8, softcap=4.0, return_entropy="entropy" in names
        )
        return tuple(getattr(result, name) for name in names)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_input_alone_gets_the_same_gradient(wanted: str) -> None:
    hidden, weight, bias, target = make_inputs(6, 3, 5)
    every = dict(
        zip(
            ("hidden", "weight", "bias"),
            gradients(linear_logprob(hidden, weight, target, bias=bias, return_entropy=True), (hidden, weight, bias)),
            strict=True,
        )
    )
    inputs = {"hidden": hidden.detach(), "weight": weight.detach(), "bias": bias.detach()}
    inputs[wanted].requires_grad_()
    result = linear_logprob(inputs["hidden"], inputs["weight"], target, bias=inputs["bias"], return_entropy=True)
    torch.testing.assert_close(gradients(result, (inputs[wanted],))[0], every[wanted])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("tile", [None, 4])
def test_ignored_rows_are_zero_and_get_zero_gradient_even_with_inf_and_nan_hidden(
    monkeypatch: pytest.MonkeyPatch, backend: str, tile: int | None
) -> None:
    set_tile(monkeypatch, tile)
    hidden, weight, _, target = make_inputs(6, 3, 5)
    clean = linear_logprob(hidden, weight, target, return_entropy=True)
    keep = torch.tensor([True, False, True, False, True, True])
    dirty = hidden.detach().clone()
    dirty[1], dirty[3] = torch.inf, torch.nan
    dirty.requires_grad_()
    result = linear_logprob(
        dirty, weight, torch.where(keep, target, -7), ignore_index=-7, return_entropy=True, backend=backend
    )
    for ours, exact in zip(result, clean, strict=True):
        assert torch.equal(ours[~keep], torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(ours[keep], exact[keep])
    grad_hidden, grad_weight = gradients(result, (dirty, weight))
    assert torch.equal(grad_hidden[~keep], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.isfinite(grad_hidden).all() and torch.isfinite(grad_weight).all()


def test_ignored_targets_do_not_read_their_temperature_or_row() -> None:
    hidden, weight, _, target = make_inputs(4, 3, 5)
    target[1] = -100
    temperature = torch.tensor([1.0, torch.nan, 2.0, 1.0])
    rows = torch.tensor([0, 999, 2, 3])
    result = linear_logprob(hidden, weight, target, temperature=temperature, rows=rows)
    assert torch.isfinite(result.logp).all() and result.logp[1] == 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_predictor_index_scores_every_response_from_the_shared_prompt(backend: str) -> None:
    layout = PackedLayout.from_segments([3, 2, 0, 2], [-1, 0, 0, 0])
    hidden, weight, _, tokens = make_inputs(7, 4, 6)
    target = tokens.masked_fill(layout.predictor_index < 0, -100)
    logp = linear_logprob(hidden, weight, target, rows=layout.predictor_index, backend=backend).logp
    log_p = F.log_softmax(hidden @ weight.T, dim=1).detach()
    expected = [0.0] + [float(log_p[row, tokens[i]]) for i, row in ((1, 0), (2, 1), (3, 2), (4, 3), (5, 2), (6, 5))]
    torch.testing.assert_close(logp, torch.tensor(expected, dtype=torch.float64))


def test_targets_that_share_a_row_sum_their_gradients() -> None:
    hidden, weight, _, _ = make_inputs(2, 3, 5)
    target = torch.tensor([0, 4, 2])
    shared = linear_logprob(hidden, weight, target, rows=torch.tensor([1, 1, 1])).logp.sum()
    alone = sum(linear_logprob(hidden[1:], weight, target[i : i + 1]).logp.sum() for i in range(3))
    for ours, exact in zip(
        torch.autograd.grad(shared, (hidden, weight)), torch.autograd.grad(alone, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, exact)


def test_gradients_are_bitwise_repeatable_with_shared_rows() -> None:
    hidden, weight, _, target = make_inputs(3000, 32, 50, dtype=torch.float32)
    rows = torch.arange(3000) // 10
    runs = []
    for _ in range(3):
        result = linear_logprob(hidden, weight, target, rows=rows, return_entropy=True)
        runs.append(gradients(result, (hidden, weight)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("n, d, v", [(0, 3, 4), (3, 1, 1), (1, 1, 2), (2, 7, 129), (17, 1, 31), (0, 1, 1)])
@pytest.mark.parametrize("tile", [None, 2])
def test_odd_shapes(monkeypatch: pytest.MonkeyPatch, n: int, d: int, v: int, tile: int | None) -> None:
    set_tile(monkeypatch, tile)
    hidden, weight, bias, target = make_inputs(n, d, v)
    pairs = [
        linear_logprob(hidden, weight, target, bias=bias, return_entropy=True, backend=backend)
        for backend in ("chunked", "reference")
    ]
    for ours, exact in zip(*pairs, strict=True):
        assert ours.shape == (n,)
        torch.testing.assert_close(ours, exact)
    exact_gradients = gradients(pairs[1], (hidden, weight, bias))
    for ours, exact in zip(gradients(pairs[0], (hidden, weight, bias)), exact_gradients, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_all_targets_ignored_keeps_the_graph_with_zero_gradients(backend: str) -> None:
    hidden, weight, bias, _ = make_inputs(3, 2, 4)
    result = linear_logprob(hidden, weight, torch.full((3,), -100), bias=bias, backend=backend)
    assert result.logp.requires_grad
    for grad in torch.autograd.grad(result.logp.sum(), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_entropy_and_logp_survive_a_large_common_shift_in_fp32(shift: float) -> None:
    hidden, weight, _, target = make_inputs(4, 3, 6, dtype=torch.float32)
    plain = linear_logprob(hidden, weight, target, return_entropy=True)
    moved = linear_logprob(hidden, weight, target, bias=torch.full((6,), shift), return_entropy=True)
    assert plain.entropy is not None and moved.entropy is not None
    torch.testing.assert_close(moved.logp, plain.logp, atol=2e-3, rtol=0)
    torch.testing.assert_close(moved.entropy, plain.entropy, atol=2e-3, rtol=0)


def test_confident_target_keeps_its_gradient() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[12.0], [0.0]])
    logp = linear_logprob(hidden, weight, torch.tensor([0])).logp
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    exact = 12.0 * torch.sigmoid(torch.tensor(-12.0, dtype=torch.float64))
    torch.testing.assert_close(grad.double().squeeze(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("tile", [None, 3, 1])
def test_bias_of_minus_inf_forbids_a_column(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    set_tile(monkeypatch, tile)
    hidden, weight, _, _ = make_inputs(4, 3, 5)
    target = torch.tensor([1, 2, 1, 3])
    bias = torch.tensor([-torch.inf, 0.0, 0.5, 0.0, -torch.inf], dtype=torch.float64)
    full = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    part = linear_logprob(hidden, weight[1:4], target - 1, bias=bias[1:4], return_entropy=True)
    for ours, exact in zip(full, part, strict=True):
        torch.testing.assert_close(ours, exact)
    for ours, exact in zip(gradients(full, (hidden, weight)), gradients(part, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_fp32_and_gradients_have_the_input_dtype(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = make_inputs(4, 8, 9, dtype=dtype)
    result = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    exact = linear_logprob(hidden.double(), weight.double(), target, bias=bias.double(), return_entropy=True)
    for ours, reference in zip(result, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)
    for grad in gradients(result, (hidden, weight, bias)):
        assert grad.dtype == dtype


def test_autocast_casts_what_the_heads_linear_layer_would_cast() -> None:
    hidden, weight, _, target = make_inputs(4, 8, 9, dtype=torch.float32)
    low = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprob(hidden, weight, target)
        mixed = linear_logprob(hidden.bfloat16(), weight, target)
        (grad,) = torch.autograd.grad(inside.logp.sum(), hidden)
    assert torch.equal(inside.logp, low.logp) and torch.equal(mixed.logp, low.logp)
    assert inside.logp.dtype == torch.float32 and grad.dtype == torch.float32
    double = [tensor.double() for tensor in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logprob(*double, target).logp.dtype == torch.float64


def test_non_contiguous_inputs_and_int32_targets() -> None:
    hidden, weight, _, target = make_inputs(6, 4, 5)
    strided = linear_logprob(hidden[::2, ::2], weight.T.contiguous().T[:, ::2], target[::2].int())
    plain = linear_logprob(hidden[::2, ::2].contiguous(), weight[:, ::2].contiguous(), target[::2])
    torch.testing.assert_close(strided.logp, plain.logp)


def test_entropy_is_none_unless_asked_for() -> None:
    hidden, weight, _, target = make_inputs(2, 2, 3)
    assert linear_logprob(hidden, weight, target).entropy is None
    assert linear_logprob(hidden, weight, target, backend="reference").entropy is None


def test_scores_beyond_the_budget_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tiles above the budget nor anything of N x V entries is made, forward or backward."""
    set_tile(monkeypatch, 64, rows=8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, _, target = make_inputs(50, 2, 40)
    with Watch():
        result = linear_logprob(hidden, weight, target, return_entropy=True, softcap=5.0)
        assert result.entropy is not None
        (result.logp.sum() + result.entropy.sum()).backward()
    assert largest <= 8 * 50  # hidden states on cache-line boundaries; N x V is 2000


def test_second_derivative_is_refused() -> None:
    hidden, weight, _, target = make_inputs(2, 2, 3)
    logp = linear_logprob(hidden, weight, target).logp
    with pytest.raises(RuntimeError, match="linear_logprob is differentiable once"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    logp = linear_logprob(hidden, weight, target, backend="reference").logp
    (grad,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    torch.autograd.grad(grad.square().sum(), hidden)


HIDDEN, WEIGHT, TARGET = torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(3, 2, dtype=torch.int64)}, "hidden must be floating point"),
        ({"hidden": torch.zeros(3)}, r"hidden must have 2 dimensions; got shape \[3\]"),
        ({"hidden": "x"}, "hidden must be a tensor; got str"),
        ({"hidden": torch.zeros(3, 5)}, "must share their last dimension"),
        ({"hidden": torch.zeros(4, 2)}, "hidden has 4 rows but there are 3 targets; pass rows="),
        ({"weight": torch.zeros(0, 2)}, "weight has 0 rows"),
        ({"weight": torch.zeros(4, 2, dtype=torch.bfloat16)}, "dtypes must agree"),
        ({"weight": torch.zeros(4, 2, device="meta")}, "one device; got hidden on cpu, weight on meta"),
        ({"target": torch.tensor([0.0, 1.0, 2.0])}, "target must be int64 or int32"),
        ({"target": torch.zeros(3, 1, dtype=torch.int64)}, "target must be a 1-d integer tensor"),
        ({"target": torch.tensor([0, 4, 2])}, r"target\[1\] is 4; targets are 0 to 3, or -100"),
        ({"target": torch.tensor([0, 1, -1])}, r"target\[2\] is -1"),
        ({"target": [0, 1, 2]}, r"target must be a 1-d integer tensor \[N\]; got list"),
        ({"weight": torch.zeros(4, 2).to_sparse()}, r"weight must be a dense tensor; got torch.sparse_coo"),
        ({"ignore_index": -100.0}, "ignore_index must be an int; got -100.0"),
        ({"ignore_index": None}, "ignore_index must be an int; got None"),
        ({"ignore_index": 1 << 70}, "ignore_index is 1180591620717411303424; torch.int64 targets hold"),
        (
            {"target": TARGET.int(), "ignore_index": 1 << 32},
            "ignore_index is 4294967296; torch.int32 targets hold -2147483648 to 2147483647",
        ),
        ({"return_entropy": "detach"}, "return_entropy must be True, False or 'detached'; got 'detach'"),
        ({"return_entropy": 1}, "return_entropy must be True, False or 'detached'; got 1"),
        ({"validate": "no"}, "validate must be True or False; got 'no'"),
        ({"backend": ["native"]}, r"linear_logprob has no backend \['native'\] here"),
        (
            {"bias": torch.tensor([0.0, 0.0, 0.0, -torch.inf]), "softcap": 5.0},
            r"bias\[3\] is -inf, which softcap=5.0 turns into a score of -5.0",
        ),
        (
            {"bias": torch.tensor([0.0, 0.0, 0.0, -torch.inf]), "softcap": 5.0, "backend": "reference"},
            r"bias\[3\] is -inf, which softcap=5.0",
        ),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[4\]; got \[3\]"),
        ({"rows": torch.tensor([0, 1])}, r"rows must have shape \[3\]"),
        ({"rows": torch.tensor([0, 3, 1])}, r"rows\[1\] is 3; hidden has rows 0 to 2"),
        ({"rows": torch.tensor([0, 1, -1])}, r"rows\[2\] is -1"),
        ({"rows": torch.tensor([0.0, 1.0, 2.0])}, "rows must be int64 or int32"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0; got 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, r"temperature\[1\] is 0.0"),
        ({"temperature": torch.tensor([1, 1, 1])}, "temperature must be a float or a floating point tensor"),
        ({"temperature": torch.ones(2)}, r"temperature must have shape \[3\]"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature gets no gradient"),
        ({"softcap": -1.0}, "softcap must be a finite number above 0; got -1.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number; got inf"),
        ({"backend": "fast"}, "linear_logprob has no backend 'fast' here; allowed: 'auto', 'reference', 'chunked'"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **changes}
    with pytest.raises(ValueError, match=message):
        linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments)

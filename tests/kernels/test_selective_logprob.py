"""selective_logprob: the same numbers as linear_logprob, from logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import linear_logprob, selective_logprob
from specs_kernels.selective_logprob import chunked

OUTPUTS = ("logp", "entropy", "lse")
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(OUTPUTS, size)]


def make_inputs(n: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, v, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("tile_bytes", [16 << 20, 8 * 5 * 2])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck_of_each_output_alone_and_together(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], tile_bytes: int, backend: str
) -> None:
    monkeypatch.setattr(chunked, "TILE_BYTES", tile_bytes)
    logits, target = make_inputs(5, 5)
    target[3] = -100

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        result = selective_logprob(logits, target, temperature=0.7, return_entropy="entropy" in names, backend=backend)
        return tuple(getattr(result, name) for name in names)

    assert torch.autograd.gradcheck(outputs, (logits,))


@pytest.mark.parametrize("n, v", [(0, 3), (1, 1), (7, 2), (33, 129)])
@pytest.mark.parametrize("tile_bytes", [16 << 20, 1])
def test_equals_linear_logprob_with_an_identity_head(
    monkeypatch: pytest.MonkeyPatch, n: int, v: int, tile_bytes: int
) -> None:
    monkeypatch.setattr(chunked, "TILE_BYTES", tile_bytes)
    logits, target = make_inputs(n, v)
    target[::4] = -100
    temperature = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    ours = selective_logprob(logits, target, temperature=temperature, return_entropy=True)
    head = linear_logprob(
        logits, torch.eye(v, dtype=torch.float64), target, temperature=temperature, return_entropy=True
    )
    for mine, exact in zip(ours, head, strict=True):
        torch.testing.assert_close(mine, exact)
    total = [
        r.logp.sum() + 2 * r.entropy.sum() + 3 * r.lse.square().sum() for r in (ours, head) if r.entropy is not None
    ]
    torch.testing.assert_close(torch.autograd.grad(total[0], logits)[0], torch.autograd.grad(total[1], logits)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ignored_rows_are_not_read(backend: str) -> None:
    logits, target = make_inputs(4, 5)
    dirty = logits.detach().clone()
    dirty[0], dirty[2] = torch.nan, torch.inf
    dirty.requires_grad_()
    target = torch.where(torch.tensor([False, True, False, True]), target, -100)
    result = selective_logprob(dirty, target, return_entropy=True, backend=backend)
    assert result.entropy is not None
    (grad,) = torch.autograd.grad(result.logp.sum() + result.entropy.sum() + result.lse.sum(), dirty)
    for values in (*result, grad):
        assert torch.equal(values[::2], torch.zeros_like(values[::2]))
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_logits_of_minus_inf_are_forbidden_columns(backend: str) -> None:
    logits, _ = make_inputs(3, 5)
    masked = logits.detach().clone()
    masked[:, 3:] = -torch.inf
    masked.requires_grad_()
    target = torch.tensor([0, 1, 2])
    full = selective_logprob(masked, target, return_entropy=True, backend=backend)
    part = selective_logprob(logits[:, :3], target, return_entropy=True)
    for ours, exact in zip(full, part, strict=True):
        torch.testing.assert_close(ours, exact)
    assert full.entropy is not None and part.entropy is not None
    (ours,) = torch.autograd.grad((full.logp + full.entropy).sum(), masked)
    (exact,) = torch.autograd.grad((part.logp + part.entropy).sum(), logits)
    torch.testing.assert_close(ours, exact)


def test_half_precision_logits_get_fp32_results_and_their_own_gradient_dtype() -> None:
    logits, target = make_inputs(4, 9, torch.bfloat16)
    result = selective_logprob(logits, target)
    exact = selective_logprob(logits.double(), target)
    assert result.logp.dtype == torch.float32
    torch.testing.assert_close(result.logp.double(), exact.logp, atol=1e-6, rtol=1e-6)
    assert torch.autograd.grad(result.logp.sum(), logits)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_the_default_device_does_not_matter(backend: str) -> None:
    logits, target = make_inputs(4, 9, torch.float32)
    expected = selective_logprob(logits, target, return_entropy=True, backend=backend)
    with torch.device("meta"):
        result = selective_logprob(logits, target, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(result.logp.sum() + result.lse.sum(), logits)
    assert result.logp.equal(expected.logp) and grad.device.type == "cpu"


def test_input_logits_are_not_modified() -> None:
    logits, target = make_inputs(4, 9, torch.float32)
    before = logits.detach().clone()
    selective_logprob(logits, target, return_entropy=True).logp.sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": torch.zeros(3)}, "logits must have 2 dimensions"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "logits must be floating point"),
        ({"logits": torch.zeros(3, 0)}, "logits have 0 columns"),
        ({"target": torch.tensor([0, 1])}, r"target must have shape \[3\]"),
        ({"target": torch.tensor([0, 1, 9])}, r"target\[2\] is 9"),
        ({"logits": torch.zeros(3, 4).to_sparse()}, "logits must be a dense tensor; got torch.sparse_coo"),
        ({"ignore_index": None}, "ignore_index must be an int; got None"),
        ({"target": torch.tensor([0, 1, 2]).int(), "ignore_index": 1 << 32}, "ignore_index is 4294967296"),
        ({"return_entropy": "detached"}, "return_entropy must be True or False; got 'detached'"),
        ({"in_place": 1}, "in_place must be True or False; got 1"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"backend": "fast"}, "selective_logprob has no backend 'fast'"),
    ],
)
def test_errors_name_the_argument_and_its_value(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(3, 4), "target": torch.tensor([0, 1, 2]), **changes}
    with pytest.raises(ValueError, match=message):
        selective_logprob(arguments.pop("logits"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_place_overwrites_the_logits_with_the_same_gradient(dtype: torch.dtype) -> None:
    leaf, target = make_inputs(6, 9, dtype)
    target[2] = -100
    expected = torch.autograd.grad(selective_logprob(leaf, target, return_entropy=True).logp.sum(), leaf)[0]
    logits = leaf * 1.0
    result = selective_logprob(logits, target, return_entropy=True, in_place=True).logp.sum()
    (grad,) = torch.autograd.grad(result, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="has overwritten its logits; a second backward needs in_place=False"):
        torch.autograd.grad(result, logits)


def test_in_place_reaches_the_layers_below() -> None:
    hidden, target = make_inputs(6, 9)
    weight = torch.randn(9, 9, dtype=torch.float64)
    grads = [
        torch.autograd.grad(selective_logprob(hidden @ weight, target, in_place=flag).logp.sum(), hidden)[0]
        for flag in (False, True)
    ]
    assert torch.equal(*grads)


def test_in_place_is_refused_where_it_would_do_harm() -> None:
    leaf, target = make_inputs(3, 5)
    with pytest.raises(ValueError, match="in_place=True would overwrite a leaf"):
        selective_logprob(leaf, target, in_place=True)
    with pytest.raises(ValueError, match="needs logits without shared memory; got strides"):
        selective_logprob((leaf[:1] * 1.0).expand(3, 5), target, in_place=True)
    with pytest.raises(ValueError, match="backend='reference' differentiates by autograd"):
        selective_logprob(leaf * 1.0, target, in_place=True, backend="reference")
    squared = leaf * leaf
    kept = squared.exp()  # saves its result, not its input
    selective_logprob(squared, target, in_place=True).logp.sum().backward(retain_graph=True)
    assert torch.isfinite(kept).all()
    other = leaf * 1.0
    needs_values = (other**2).sum()
    torch.autograd.grad(selective_logprob(other, target, in_place=True).logp.sum(), other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_values.backward()


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("what", ["target", "temperature"])
def test_masked_bad_values_give_nan_in_their_own_row_only(what: str, backend: str) -> None:
    logits, target = make_inputs(4, 5)
    temperature = torch.tensor([1.0, 2.0, 0.5, 1.0])
    exact = selective_logprob(logits, target, temperature=temperature, return_entropy=True, backend=backend)
    if what == "target":
        target = target.masked_fill(torch.arange(4) == 1, 77)
    else:
        temperature[1] = -1.0
    result = selective_logprob(
        logits, target, temperature=temperature, return_entropy=True, validate=False, backend=backend
    )
    good = torch.tensor([True, False, True, True])
    for ours, expected in zip(result, exact, strict=True):
        assert ours is not None and torch.isnan(ours[1])
        assert torch.equal(ours[good], expected[good])
    (grad,) = torch.autograd.grad(result.logp.sum(), logits)
    assert torch.equal(grad[1], torch.zeros(5, dtype=torch.float64)) and torch.isfinite(grad).all()


def test_rows_beyond_two_to_the_31_entries_are_read_and_written_in_their_own_place() -> None:
    """Offsets in 64 bits, shown without the memory: a row stride of 2^31 entries over pages that are never touched."""
    stride, vocab = (1 << 31) + 8, 5
    storage = torch.empty(2 * stride, dtype=torch.bfloat16)
    logits = storage.as_strided((2, vocab), (stride, 1))
    values = torch.randn(2, vocab).bfloat16()
    logits.copy_(values)
    target = torch.tensor([1, 4])
    result = selective_logprob(logits, target, return_entropy=True)
    assert torch.equal(result.logp, selective_logprob(values, target).logp)

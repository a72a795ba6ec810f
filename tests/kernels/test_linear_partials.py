"""Vocabulary slices: merged partials and their gradients equal the whole vocabulary, in one process and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from specs_kernels import linear_logprob, linear_logprob_partials, merge_partials

SLICES = (0, 4, 5, 11)


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = 5 * torch.randn(11, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 3, 4, 5, 10, -100, 7])
    return hidden, weight, bias.requires_grad_(), target


def total(result: Any) -> Tensor:
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    part = (weights * result.logp).sum() + 0.3 * (weights * result.lse).sum()
    return part if result.entropy is None else part + 0.7 * (weights**2 * result.entropy).sum()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "temperature": 0.7}, {"mode": "recompute", "validate": False}]
)
def test_merged_slices_equal_the_whole_vocabulary(backend: str, entropy: bool, options: dict[str, Any]) -> None:
    if backend == "reference" and "mode" in options:
        options = {}
    hidden, weight, bias, target = make()
    whole = linear_logprob(hidden, weight, target, bias=bias, return_entropy=entropy, **options)
    parts = [
        linear_logprob_partials(
            hidden,
            weight[a:b],
            target,
            first_column=a,
            bias=bias[a:b],
            return_entropy=entropy,
            backend=backend,
            **options,
        )
        for a, b in zip(SLICES, SLICES[1:], strict=False)
    ]
    merged = merge_partials(parts, target)
    for ours, exact in zip(merged, whole, strict=True):
        if exact is not None:
            torch.testing.assert_close(ours, exact, atol=1e-13, rtol=1e-13)
    inputs = (hidden, weight, bias)
    for ours, exact in zip(
        torch.autograd.grad(total(merged), inputs), torch.autograd.grad(total(whole), inputs), strict=True
    ):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


def test_partials_are_the_sums_they_say() -> None:
    hidden, weight, bias, target = make()
    part = linear_logprob_partials(hidden, weight[4:], target, first_column=4, bias=bias[4:], return_entropy=True)
    z = hidden @ weight[4:].T + bias[4:] - part.shift[:, None]
    keep = target >= 0
    assert part.weighted is not None
    torch.testing.assert_close(part.total[keep], z.exp().sum(1)[keep])
    torch.testing.assert_close(part.weighted[keep], (z.exp() * z).sum(1)[keep])
    assert torch.equal(part.target[:2], torch.zeros(2, dtype=torch.float64)) and not part.shift.requires_grad


@pytest.mark.parametrize("first", [-1, 1.0, True])
def test_first_column_must_be_a_count(first: Any) -> None:
    hidden, weight, _, target = make()
    with pytest.raises(ValueError, match="first_column must be an int of at least 0"):
        linear_logprob_partials(hidden, weight, target, first_column=first)
    with pytest.raises(ValueError, match="parts is empty"):
        merge_partials([], target)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    hidden, weight, bias, target = make()
    columns = slice(0, 4) if rank == 0 else slice(4, 11)
    own_weight, own_bias = weight.detach()[columns].requires_grad_(), bias.detach()[columns].requires_grad_()
    part = linear_logprob_partials(
        hidden, own_weight, target, first_column=columns.start, bias=own_bias, return_entropy=True
    )
    merged = merge_partials(part, target, group=torch.distributed.group.WORLD)
    dhidden, dweight, dbias = torch.autograd.grad(total(merged), (hidden, own_weight, own_bias))
    torch.distributed.all_reduce(dhidden)
    whole = linear_logprob(hidden, weight, target, bias=bias, return_entropy=True)
    expected = torch.autograd.grad(total(whole), (hidden, weight, bias))
    torch.testing.assert_close(merged.logp, whole.logp)
    for ours, exact in ((dhidden, expected[0]), (dweight, expected[1][columns]), (dbias, expected[2][columns])):
        torch.testing.assert_close(ours, exact)
    torch.distributed.destroy_process_group()


def test_two_ranks_with_half_the_vocabulary_each(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")


@pytest.mark.parametrize("backend", ["chunked", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_slice_that_is_all_padding_adds_nothing(backend: str, dtype: torch.dtype) -> None:
    """The last rank of a padded vocabulary may hold nothing but columns that a bias of -inf forbids."""
    hidden, weight, bias, _ = (tensor.detach() for tensor in make())
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    bias = bias.to(dtype)
    bias[4:] = -torch.inf
    target = torch.tensor([0, 3, 2, 1, 0, -100, 3])
    whole = linear_logprob(hidden, weight, target, bias=bias, temperature=0.5, return_entropy=True)
    options = {"temperature": 0.5, "return_entropy": True, "backend": backend}
    parts = [
        linear_logprob_partials(hidden, weight[a:b], target, first_column=a, bias=bias[a:b], **options)
        for a, b in ((0, 4), (4, 11))
    ]
    merged = merge_partials(parts, target)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    for ours, exact in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, exact, **tolerance)
    grads = [torch.autograd.grad(total(result), (hidden, weight)) for result in (merged, whole)]
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(
            ours, exact, **(tolerance if dtype != torch.float16 else {"atol": 4e-3, "rtol": 4e-3})
        )


def test_parts_that_do_not_belong_together_are_refused() -> None:
    hidden, weight, _, target = make()
    with_entropy = linear_logprob_partials(hidden, weight, target, return_entropy=True)
    without = linear_logprob_partials(hidden, weight, target)
    fewer = linear_logprob_partials(hidden[:3], weight, target[:3])
    with pytest.raises(ValueError, match="some parts have weighted sums and some do not"):
        merge_partials([with_entropy, without], target)
    with pytest.raises(ValueError, match=r"same targets; parts\[0\] has 7, parts\[1\] has 3"):
        merge_partials([without, fewer], target)
    with pytest.raises(ValueError, match=r"parts\[0\] must be a Partials; got int"):
        merge_partials([1], target)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"target must have shape \[7\]; got \[1\]"):
        merge_partials(without, target[:1])
    with pytest.raises(ValueError, match="return_entropy must be True or False; got 'detached'"):
        linear_logprob_partials(hidden, weight, target, return_entropy="detached")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "place, slices, count", [(11, ((0, 5), (5, 11)), 0), (-1, ((0, 11),), 0), (4, ((0, 5), (4, 11)), 2)]
)
def test_a_target_that_not_exactly_one_slice_has_is_never_scored(
    place: int, slices: tuple[tuple[int, int], ...], count: int
) -> None:
    hidden, weight, _, target = make()
    target[2] = place
    parts = [linear_logprob_partials(hidden, weight[a:b], target, first_column=a) for a, b in slices]
    with pytest.raises(
        ValueError, match=rf"target\[2\] is {place}, a column of {count} of the slices; allowed: of one"
    ):
        merge_partials(parts, target)
    torch._dynamo.reset()
    merged = torch.compile(merge_partials, fullgraph=True, backend="eager")(parts, target)
    assert merged.logp.isnan().tolist() == [False, False, True, False, False, False, False]
    grad = torch.autograd.grad(merged.logp.sum(), hidden)[0]
    assert grad[2].equal(torch.zeros(3, dtype=torch.float64)) and grad.isfinite().all()

"""linear_loss: loss and gradients of linear_logprob plus autograd, for losses per token and per group, in any chunking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import linear_logprob, linear_loss, native
from specs_kernels.linear_logprob import head

VOCAB, DIM, COUNT = 11, 3, 23
GROUPS = torch.tensor([4] * 3 + [7] * 1 + [2] * 6 + [9] * 5 + [1] * 1 + [0] * 7)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here "auto" is the PyTorch backend: only its tiles follow these constants."""
    monkeypatch.setattr(native, "missing", lambda: "hidden from this test")
    monkeypatch.setattr(head, "CPU_TILING", head.Tiling(2, 4, 8))
    monkeypatch.setattr(head, "CPU_TILE_BYTES", 8 * 4 * 4)


def make_leaves(dtype: torch.dtype = torch.float64, lora: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (COUNT, DIM), "weight": (VOCAB, DIM), "bias": (VOCAB,)}
    shapes |= {"A": (2, DIM), "B": (VOCAB, 2)} if lora else {}
    leaves = {n: torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for n, s in shapes.items()}
    target = torch.randint(0, VOCAB, (COUNT,), generator=generator)
    target[[3, 8, 22]] = -100
    return leaves, target


def workspace(rows: int, dtype: torch.dtype = torch.float64) -> int:
    return rows * VOCAB * dtype.itemsize


WEIGHTS = torch.linspace(-1.0, 1.0, COUNT, dtype=torch.float64)


def token_loss(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights = WEIGHTS[index].to(logp.dtype)
    loss = -(weights * logp).sum() / COUNT
    if entropy is not None:
        loss = loss - 0.1 * (weights * entropy).sum() + 0.01 * (lse**2).sum()
    return loss, {"targets": torch.tensor(float(index.shape[0]))}


def group_loss(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
    """Not a sum over tokens: a sigmoid of each group's mean log-prob."""
    groups = GROUPS[index]
    means = torch.stack([logp[groups == g].mean() for g in groups.unique_consecutive()])
    return F.softplus(-3 * means).sum()


def by_autograd(loss_fn: Any, leaves: dict[str, Tensor], target: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    result = linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        target,
        bias=leaves["bias"],
        return_entropy=True,
        lora=(leaves["A"], leaves["B"]) if "A" in leaves else None,
        backend="reference",
        **options,
    )
    index = (target >= 0).nonzero().squeeze(1)
    assert result.entropy is not None
    loss = loss_fn(result.logp[index], result.entropy[index], result.lse[index], index)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


def ours(loss_fn: Any, leaves: dict[str, Tensor], target: Tensor, return_entropy: bool = True, **options: Any) -> Any:
    return linear_loss(
        leaves["hidden"],
        leaves["weight"],
        target,
        loss_fn,
        bias=leaves["bias"],
        return_entropy=return_entropy,
        lora=(leaves["A"], leaves["B"]) if "A" in leaves else None,
        **options,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap, temperatures": {"softcap": 2.0, "temperature": torch.linspace(0.5, 2.0, COUNT), "logit_scale": 1.2},
    "rows": {"rows": torch.arange(COUNT) // 3, "temperature": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows_that_fit", [2, 6, 100])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_a_loss_per_token_equals_autograd(
    options: dict[str, Any], rows_that_fit: int, lora: bool, compact: bool
) -> None:
    leaves, target = make_leaves(lora=lora)
    exact, expected = by_autograd(token_loss, leaves, target, **options)
    loss, logprobs, metrics = ours(
        token_loss, leaves, target, workspace_bytes=workspace(rows_that_fit), compact=compact, **options
    )
    torch.testing.assert_close(loss.detach(), exact)
    assert metrics["targets"] == 20 and metrics["recomputed_targets"] == 0
    scored = linear_logprob(
        leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], return_entropy=True,
        lora=(leaves["A"], leaves["B"]) if lora else None, **options,
    )  # fmt: skip
    for values, same in zip(logprobs, scored, strict=True):
        assert not values.requires_grad
        torch.testing.assert_close(values, same.detach())
    for grad, want in zip(torch.autograd.grad(2 * loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, 2 * want)


@pytest.mark.parametrize("rows_that_fit, recomputed", [(2, 19), (4, 16), (6, 0), (8, 0), (100, 0)])
def test_groups_stay_whole_and_too_large_ones_are_recomputed(rows_that_fit: int, recomputed: int) -> None:
    leaves, target = make_leaves()
    seen: list[list[int]] = []

    def loss_fn(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
        seen.append(GROUPS[index].unique_consecutive().tolist())
        return group_loss(logp, entropy, lse, index)

    exact, expected = by_autograd(group_loss, leaves, target)
    loss, _, metrics = ours(loss_fn, leaves, target, group_ids=GROUPS, workspace_bytes=workspace(rows_that_fit))
    assert [group for call in seen for group in call] == [4, 2, 9, 1, 0]  # group 7 has only an ignored target
    assert metrics["recomputed_targets"] == recomputed
    torch.testing.assert_close(loss.detach(), exact)
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_without_entropy_the_loss_function_gets_none(backend: str) -> None:
    leaves, target = make_leaves()

    def loss_fn(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
        return token_loss(logp, None, lse, index)[0] if entropy is None else logp.sum() / 0

    result = linear_logprob(leaves["hidden"], leaves["weight"], target, bias=leaves["bias"])
    expected = torch.autograd.grad(-(WEIGHTS * result.logp).sum() / COUNT, list(leaves.values()))
    loss, logprobs, _ = ours(loss_fn, leaves, target, return_entropy=False, backend=backend)
    assert logprobs.entropy is None
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_reference_backend_is_autograd() -> None:
    leaves, target = make_leaves()
    exact, expected = by_autograd(group_loss, leaves, target)
    loss, _, _ = ours(group_loss, leaves, target, group_ids=GROUPS, backend="reference")
    torch.testing.assert_close(loss.detach(), exact)
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias",)])
def test_only_what_requires_a_gradient_gets_one(frozen: tuple[str, ...]) -> None:
    leaves, target = make_leaves()
    _, expected = by_autograd(token_loss, leaves, target)
    full = dict(zip(leaves, expected, strict=True))
    for name in frozen:
        leaves[name].requires_grad_(False)
    wanted = [name for name in leaves if name not in frozen]
    loss, _, _ = ours(token_loss, leaves, target, workspace_bytes=workspace(6))
    for name, grad in zip(wanted, torch.autograd.grad(loss, [leaves[name] for name in wanted]), strict=True):
        torch.testing.assert_close(grad, full[name])


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows_that_fit", [6, 100])
def test_lower_precisions_stay_close_and_round_the_weights_gradient_once(
    dtype: torch.dtype, bound: float, rows_that_fit: int
) -> None:
    leaves, target = make_leaves(dtype)
    loss, _, _ = ours(token_loss, leaves, target, workspace_bytes=workspace(rows_that_fit, dtype))
    doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact, expected = by_autograd(token_loss, doubles, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=1e-5)
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - want).norm() <= bound * want.norm()


def test_no_targets_that_count_give_zero_and_do_not_call_the_loss() -> None:
    leaves, target = make_leaves()
    for count in (0, COUNT):
        some = {**leaves, "hidden": leaves["hidden"].detach()[:count].requires_grad_()}
        loss, logprobs, metrics = ours(lambda *_: 1 / 0, some, torch.full_like(target, -100)[:count])
        assert loss == 0 and metrics == {"recomputed_targets": 0} and logprobs.logp.shape == (count,)
        for grad in torch.autograd.grad(loss, list(some.values())):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_no_grad_gives_the_loss_only() -> None:
    leaves, target = make_leaves()
    with torch.no_grad():
        loss, _, _ = ours(token_loss, leaves, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_autograd(token_loss, leaves, target)[0])


def test_a_second_backward_and_a_second_derivative_raise() -> None:
    leaves, target = make_leaves()
    loss, _, _ = ours(token_loss, leaves, target)
    with pytest.raises(RuntimeError, match="linear_loss is differentiable once"):
        torch.autograd.grad(loss, leaves["hidden"], create_graph=True)
    torch.autograd.grad(loss, leaves["hidden"], retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradients out once"):
        torch.autograd.grad(loss, leaves["hidden"])


@pytest.mark.parametrize(
    "loss_fn, changes, message",
    [
        (None, {}, "loss_fn must be callable; got NoneType"),
        (
            lambda logp, *_: -logp,
            {},
            r"loss_fn must return a 0-d floating point tensor, .* got a tensor of shape \[20\]",
        ),
        (lambda logp, *_: (logp.sum(), 3), {}, "must be a mapping from names to numbers; got int"),
        (lambda logp, *_: (logp.sum(), {"recomputed_targets": 1}), {}, "'recomputed_targets' is taken by linear_loss"),
        (
            lambda logp, *_: logp.sum() * torch.ones((), requires_grad=True),
            {},
            "depends on another tensor that requires",
        ),
        (
            lambda logp, entropy, lse, index: (
                logp.sum() * (1.0 if index[0] == 0 else torch.ones((), requires_grad=True))
            ),
            {"workspace_bytes": 176},
            "depends on another tensor that requires",
        ),
        (lambda logp, *_: (logp.sum(), {"x": logp}), {}, r"metric 'x' of loss_fn is a tensor of shape \[20\]"),
        (lambda logp, *_: (logp.sum(), {"x": "nan"}), {}, "metric 'x' of loss_fn is str; numbers and 0-d tensors"),
        (lambda logp, *_: (logp.sum(), {}, 0), {}, "a loss or .loss, metrics.; got a tuple of 3"),
        (lambda logp, *_: logp.sum().long(), {}, r"got a tensor of shape \[\], torch.int64"),
        (token_loss, {"compact": 1}, "compact must be True or False; got 1"),
        (token_loss, {"compact": True, "backend": "reference"}, "drop compact=True"),
        (token_loss, {"return_entropy": "detached"}, "return_entropy must be True or False; got 'detached'"),
        (token_loss, {"ignore_index": None}, "ignore_index must be an int; got None"),
        (
            token_loss,
            {"group_ids": torch.arange(COUNT) % 2, "backend": "reference"},
            "must be contiguous per group; group 0 comes back",
        ),
        (token_loss, {"group_ids": torch.zeros(3, dtype=torch.long)}, r"group_ids must have shape \[23\]"),
        (token_loss, {"group_ids": torch.arange(COUNT) % 2}, "must be contiguous per group; group 0 comes back"),
        (
            token_loss,
            {"workspace_bytes": 100},
            "workspace_bytes=100 holds no block of scores; 2 targets take 176 bytes",
        ),
        (token_loss, {"workspace_bytes": 0}, "workspace_bytes must be an int above 0; got 0"),
        (token_loss, {"backend": "fast"}, "linear_loss has no backend 'fast' here"),
    ],
)
def test_errors_say_what_is_wrong(loss_fn: Any, changes: dict[str, Any], message: str) -> None:
    leaves, target = make_leaves()
    with pytest.raises(ValueError, match=message):
        ours(loss_fn, leaves, target, **changes)


def test_a_loss_function_may_change_its_index() -> None:
    """``index.sub_(offset)`` is a natural thing to write; the op's own list of targets must not change with it."""
    leaves, target = make_leaves()

    def loss_fn(logp: Tensor, entropy: Tensor, lse: Tensor, index: Tensor) -> Tensor:
        loss = token_loss(logp, entropy, lse, index)
        index.zero_()
        return loss if isinstance(loss, Tensor) else loss[0]

    expected_loss, expected = by_autograd(token_loss, leaves, target)
    loss, logprobs, _ = ours(loss_fn, leaves, target, workspace_bytes=workspace(6))
    torch.testing.assert_close(loss.detach(), expected_loss)
    assert logprobs.logp[target < 0].eq(0).all() and logprobs.logp[target >= 0].lt(0).all()
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, want)


def test_values_of_ignored_targets_do_not_matter() -> None:
    leaves, target = make_leaves()
    _, expected = by_autograd(token_loss, leaves, target)
    dirty = leaves["hidden"].detach().clone()
    dirty[3], dirty[8] = torch.inf, torch.nan
    leaves["hidden"] = dirty.requires_grad_()
    loss, _, _ = ours(token_loss, leaves, target, workspace_bytes=workspace(6))
    for grad, want in zip(torch.autograd.grad(loss, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(grad, want)

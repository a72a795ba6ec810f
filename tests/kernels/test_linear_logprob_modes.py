"""linear_logprob: every mode equals the reference with every option; which mode is chosen, and what does not combine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import TokenLogprobs, linear_logprob, native
from specs_kernels.linear_logprob import head, modes
from specs_kernels.linear_logprob.modes import choose_mode

MODES: dict[str, dict[str, Any]] = {
    "recompute": {"mode": "recompute"},
    "half cached": {"mode": "cache", "logit_cache_bytes": 8 * 11 * 5},
    "all cached": {"mode": "cache", "logit_cache_bytes": 1 << 20},
    "compact": {"mode": "recompute", "compact": True},
    "compact, half cached": {"mode": "cache", "logit_cache_bytes": 8 * 11 * 5, "compact": True},
    "frozen": {"mode": "frozen"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, softcap": {"bias": True, "softcap": 2.0, "logit_scale": 1.3},
    "temperature per target": {"temperature": True, "bias": True},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 0.7, "temperature": True, "rows": True, "lora": True},
    "temperature, lora, rows": {"temperature": 0.6, "lora": True, "rows": True},
    "softcap, temperature": {"softcap": 1.5, "temperature": 1.4},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here "auto" is the PyTorch backend: only its blocks follow these constants."""
    monkeypatch.setattr(native, "missing", lambda: "hidden from this test")
    monkeypatch.setattr(head, "CPU_TILING", head.Tiling(2, 512, 2048))


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(head, "CPU_TILING", head.Tiling(2, 4, 8))
        monkeypatch.setattr(head, "CPU_TILE_BYTES", 8 * 4 * 4)


def call_inputs(options: dict[str, Any], frozen: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves that want gradients, and the arguments of the call."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"hidden": normal(10, 3).requires_grad_(), "weight": normal(11, 3).requires_grad_(not frozen)}
    target = torch.randint(0, 11, (9,), generator=generator)
    target[4] = -100
    arguments: dict[str, Any] = {"target": target, "return_entropy": True}
    if options.get("bias"):
        leaves["bias"] = normal(11).requires_grad_(not frozen)
    if options.get("lora"):
        leaves["lora_A"], leaves["lora_B"] = (
            normal(2, 3).requires_grad_(not frozen),
            normal(11, 2).requires_grad_(not frozen),
        )
    if options.get("rows"):
        arguments["rows"] = torch.tensor([0, 1, 1, 3, -1, 9, 9, 7, 0])
    else:
        leaves["hidden"] = leaves["hidden"].detach()[:9].requires_grad_()
    temperature = options.get("temperature", 1.0)
    arguments["temperature"] = torch.linspace(0.5, 2.0, 9).double() if temperature is True else temperature
    arguments |= {name: options[name] for name in ("softcap", "logit_scale") if name in options}
    return leaves, arguments


def run(leaves: dict[str, Tensor], arguments: dict[str, Any], **extra: Any) -> TokenLogprobs:
    lora = (leaves["lora_A"], leaves["lora_B"]) if "lora_A" in leaves else None
    return linear_logprob(
        leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), lora=lora, **{**arguments, **extra}
    )


def gradients(
    result: TokenLogprobs, leaves: dict[str, Tensor], names: tuple[str, ...] = ("logp", "entropy", "lse")
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=result.logp.dtype)
    for name in names:
        upstream = torch.randn(result.logp.shape, generator=generator, dtype=torch.float64)
        upstream[::2] = 0  # dead targets
        total = total + (getattr(result, name) * upstream.to(total.dtype)).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("validate", [True, False], ids=["checked", "masked"])
def test_every_mode_and_option_equals_the_reference(
    tiles: None, mode: dict[str, Any], options: dict[str, Any], validate: bool
) -> None:
    leaves, arguments = call_inputs(options, frozen=mode["mode"] == "frozen")
    exact = run(leaves, arguments, backend="reference")
    ours = run(leaves, arguments, backend="chunked", validate=validate, **mode)
    for name, values in ours._asdict().items():
        torch.testing.assert_close(values, getattr(exact, name), atol=1e-12, rtol=1e-12)
    expected = gradients(exact, leaves)
    for name, grad in gradients(ours, leaves).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-11, rtol=1e-11, msg=name)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "names",
    [names for size in (1, 2) for names in itertools.combinations(("logp", "entropy", "lse"), size)],
    ids="+".join,
)
def test_each_upstream_gradient_alone_and_in_pairs(tiles: None, mode: dict[str, Any], names: tuple[str, ...]) -> None:
    leaves, arguments = call_inputs(OPTIONS["everything"], frozen=mode["mode"] == "frozen")
    arguments["return_entropy"] = "entropy" in names
    exact = gradients(run(leaves, arguments, backend="reference"), leaves, names)
    for name, grad in gradients(run(leaves, arguments, backend="chunked", **mode), leaves, names).items():
        torch.testing.assert_close(grad, exact[name], atol=1e-11, rtol=1e-11, msg=name)


@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_detached_entropy_has_the_value_and_no_gradient(mode: str) -> None:
    leaves, arguments = call_inputs({}, frozen=True)
    full = run(leaves, arguments, mode=mode)
    detached = run(leaves, arguments | {"return_entropy": "detached"}, mode=mode)
    assert detached.entropy is not None and not detached.entropy.requires_grad and detached.logp.requires_grad
    torch.testing.assert_close(detached.entropy, full.entropy)
    ours, exact = (torch.autograd.grad(result.logp.sum(), leaves["hidden"])[0] for result in (detached, full))
    torch.testing.assert_close(ours, exact)


def test_an_all_dead_backward_gives_zero_gradients() -> None:
    leaves, arguments = call_inputs({"bias": True, "lora": True}, frozen=False)
    result = run(leaves, arguments, mode="recompute", compact=True)
    for grad in torch.autograd.grad((result.logp * 0).sum(), list(leaves.values())):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_backward_twice_on_a_retained_graph_gives_the_same_gradients(mode: dict[str, Any]) -> None:
    leaves, arguments = call_inputs({"bias": True}, frozen=mode["mode"] == "frozen")
    total = run(leaves, arguments, **mode).logp.sum()
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, wanted), strict=True):
        assert torch.equal(a, b)


def test_the_mode_follows_gradients_budgets_and_arguments() -> None:
    def choose(n: int = 512, v: int = 151936, **arguments: Any) -> tuple[str, float]:
        arguments = {"hidden_grad": True, "weight_grad": True} | arguments
        return choose_mode(n, v, **arguments)[:2]

    frozen: dict[str, Any] = {"weight_grad": False}
    assert choose(hidden_grad=False, weight_grad=False) == ("forward", 2.0)
    assert choose() == ("recompute", 8.0)
    assert choose(logit_cache_bytes=1 << 40) == ("cache", 6.0)
    assert choose(logit_cache_bytes=256 * 151936 * 4) == ("cache", 7.0)
    assert choose(**frozen) == ("frozen", 4.0)
    assert choose(**frozen, entropy_grad=True) == ("recompute", 6.0)
    assert choose(**frozen, entropy_grad=True, mode="frozen") == ("frozen", 6.0)
    assert choose(**frozen, other_grad=True) == ("recompute", 6.0)
    assert choose(**frozen, logit_cache_bytes=1 << 40) == ("cache", 4.0)
    assert choose(**frozen, compact=True) == ("recompute", 6.0)
    assert choose(2560, 512) == ("cache", 6.0)
    assert choose(2560, 512, mode="recompute") == ("recompute", 8.0)
    assert choose(0, 151936)[0] == "cache"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": "fast"}, "mode is 'fast'; allowed: 'auto', 'forward', 'recompute', 'cache', 'frozen'"),
        ({"mode": "forward"}, "mode='forward' passes no gradient but an input requires one"),
        ({"mode": "frozen"}, "mode='frozen' gives no gradient to the head but weight requires one"),
        ({"mode": "cache"}, "mode='cache' needs logit_cache_bytes"),
        (
            {"mode": "cache", "logit_cache_bytes": 8},
            "logit_cache_bytes=8 holds no block of scores; 2 targets take 80 bytes",
        ),
        ({"mode": "recompute", "logit_cache_bytes": 8}, "mode='recompute' keeps no scores; drop logit_cache_bytes=8"),
        ({"logit_cache_bytes": -1}, "logit_cache_bytes must be an int of at least 0; got -1"),
        ({"logit_cache_bytes": 1.5}, "logit_cache_bytes must be an int of at least 0; got 1.5"),
        ({"compact": 1}, "compact must be True or False; got 1"),
        ({"backend": "reference", "compact": True}, "backend='reference' has one mode"),
        ({"lora": (torch.zeros(2, 3), torch.zeros(4, 2))}, r"lora\[1\] must have shape \[5, 2\]"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(5, 2))}, r"lora\[0\] must have shape \[2, 3\]"),
        ({"lora": torch.zeros(2, 4)}, "lora must be a pair"),
    ],
)
def test_modes_that_do_not_combine_raise(changes: dict[str, Any], message: str) -> None:
    hidden, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    if "lora" in changes:
        weight = weight.float()
        hidden = hidden.float()
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, torch.zeros(2, dtype=torch.long), **changes)


def test_frozen_mode_with_compact_raises() -> None:
    with pytest.raises(ValueError, match="mode='frozen' has no work to skip"):
        choose_mode(1, 1, hidden_grad=True, weight_grad=False, mode="frozen", compact=True)


def test_masked_bad_values_give_nan_in_their_own_row_only(tiles: None) -> None:
    """What CUDA does without validate=True: no error, no read out of bounds, no other target touched."""
    leaves, arguments = call_inputs({"temperature": True, "rows": True}, frozen=False)
    clean = run(leaves, arguments)
    target, rows, temperature = (arguments[name].clone() for name in ("target", "rows", "temperature"))
    target[0], rows[1], temperature[2] = 11, 99, 0.0
    bad = torch.zeros(9, dtype=torch.bool)
    bad[:3] = True
    keep = {
        "target": torch.where(bad, -100, arguments["target"]),
        "rows": arguments["rows"],
        "temperature": arguments["temperature"],
    }
    expected = gradients(run(leaves, arguments | keep), leaves)
    result = run(leaves, arguments | {"target": target, "rows": rows, "temperature": temperature}, validate=False)
    for ours, exact in zip(result, clean, strict=True):
        assert torch.isnan(ours[bad]).all()
        torch.testing.assert_close(ours[~bad], exact[~bad], atol=1e-12, rtol=1e-12)
    for name, grad in gradients(result, leaves).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-11, rtol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_cache_stays_close(dtype: torch.dtype) -> None:
    """Cached scores are rounded relative to the row maximum, so a common shift of the scores costs nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(200, 16, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.full((200,), 512.0, dtype=dtype)
    target = torch.randint(0, 200, (64,), generator=generator)
    grads = [
        torch.autograd.grad(linear_logprob(hidden, weight, target, bias=bias, **mode).logp.sum(), (hidden, weight))
        for mode in ({"mode": "recompute"}, {"mode": "cache", "logit_cache_bytes": 1 << 20})
    ]
    for ours, exact in zip(grads[1], grads[0], strict=True):
        assert (ours - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_kept_scores_follow_the_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "KEPT_BYTES", 0)
    assert choose_mode(10, 10, hidden_grad=True, weight_grad=True).name == "recompute"


@pytest.mark.parametrize("live", [1, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_compaction_that_leaves_part_of_a_block_in_the_cache(
    live: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows after the cached ones are formed again in blocks; they must start one, wherever the live rows fall."""
    monkeypatch.setattr(head, "CPU_TILING", head.Tiling(4, 512, 2048))
    leaves, arguments = call_inputs({"temperature": True}, frozen=False)
    arguments["target"] = torch.arange(9)
    mode = MODES["compact, half cached"] | {"backend": backend}  # 4 of 9 targets cached, in blocks of 4
    upstream = torch.zeros(9, dtype=torch.float64)
    upstream[9 - live :] = torch.linspace(1, 2, live).double()
    upstream[0] = 3.0
    grads = [
        torch.autograd.grad((run(leaves, arguments, **extra).logp * upstream).sum(), list(leaves.values()))
        for extra in (mode, {"backend": "reference"})
    ]
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)

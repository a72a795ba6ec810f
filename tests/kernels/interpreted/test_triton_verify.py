"""The triton backend through the public ops and ``specs-kernels verify``, interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from specs_kernels import dispatch, linear_logprob, selective_logprob, verify, verify_cases, verify_logprob_cases


@pytest.fixture
def last_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case per op, the one with most options: the full run takes minutes and is a command of its own."""

    def last(cases: Callable[..., Iterator[verify_cases.Case]]) -> Callable[..., Iterator[verify_cases.Case]]:
        return lambda *arguments: iter(list(cases(*arguments))[-1:])

    monkeypatch.setattr(verify_cases, "_CASES", {op: last(cases) for op, cases in verify_cases._CASES.items()})
    every = verify.invariance_cases
    monkeypatch.setattr(verify, "invariance_cases", lambda *arguments: iter(list(every(*arguments))[:1]))
    monkeypatch.setattr(
        verify_logprob_cases, "affordable", lambda op, device, rows, vocab: (min(rows, 20), min(vocab, 600))
    )


@pytest.mark.usefixtures("last_case_only")
def test_verify_covers_interpreted_triton(capsys: pytest.CaptureFixture[str]) -> None:
    ops = ("linear_logprob", "selective_logprob", "packed_attention")
    assert verify.main(["verify", *ops, "--json", "--device", "cpu"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    ran = {(row["op"], row["dtype"]) for row in results if row["backend"] == "triton"}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert ran == {(op, dtype) for op in ops for dtype in dtypes} - {("packed_attention", "float64")}


def test_auto_never_takes_the_interpreter() -> None:
    assert "triton" in dispatch.backends("linear_logprob")
    assert all(choice.backend != "triton" for choice in dispatch.describe())


def make_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 24, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(1500, 24, generator=generator) / 3).to(dtype).requires_grad_()
    target = torch.randint(0, 1500, (40,), generator=generator)
    target[::7] = -100
    return hidden, weight, target


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


MODES = {
    "recompute": {},
    "cache": {"logit_cache_bytes": 1 << 24},
    "frozen": {},
    "forward": {},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mode_agrees_with_chunked(mode: str, dtype: torch.dtype) -> None:
    hidden, weight, target = make_head(dtype)
    hidden = hidden.detach() if mode == "forward" else hidden
    weight = weight.detach() if mode in ("forward", "frozen") else weight
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    results = {}
    for backend in ("triton", "chunked"):
        result = linear_logprob(
            hidden,
            weight,
            target,
            temperature=torch.linspace(0.5, 2, 40),
            softcap=4.0,
            return_entropy=True,
            mode=mode,
            backend=backend,
            **MODES[mode],
        )
        assert result.entropy is not None
        total = (result.logp + 0.3 * result.entropy + 0.2 * result.lse).sum()
        results[backend] = (*result, *(torch.autograd.grad(total, leaves) if leaves else ()))
    # The cache keeps bf16 scores, each backend around an offset of its own.
    tolerance = 1e-5 if dtype == torch.float32 else (2e-2 if mode == "cache" else 5e-3)
    for ours, theirs in zip(results["triton"], results["chunked"], strict=True):
        assert distance(ours, theirs) < tolerance
    for ours, theirs in zip(results["triton"][:3], results["chunked"][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_targets_biases_and_expanded_gradients(dtype: torch.dtype) -> None:
    """The gradient of a sum is one number seen N times; no target is ignored, so nothing is gathered on the way."""
    hidden, weight, target = make_head(dtype)
    target = torch.stack([target.clamp(min=0), torch.full_like(target, 3)], 1)[:, 0]
    bias = torch.randn(1500, 2, generator=torch.Generator().manual_seed(2)).to(dtype)[:, 0]
    assert not target.is_contiguous() and not bias.is_contiguous()
    results = {}
    for backend in ("triton", "chunked"):
        result = linear_logprob(hidden, weight, target, bias=bias, mode="recompute", backend=backend)
        results[backend] = (result.logp, *torch.autograd.grad(result.logp.sum(), (hidden, weight)))
    for ours, theirs in zip(results["triton"], results["chunked"], strict=True):
        assert distance(ours, theirs) < (1e-5 if dtype == torch.float32 else 5e-3)
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    for backend in ("triton", "chunked"):
        logp = selective_logprob(logits, target, backend=backend).logp
        results[backend] = (logp, *torch.autograd.grad(logp.sum(), logits))
    for ours, theirs in zip(results["triton"], results["chunked"], strict=True):
        assert distance(ours, theirs) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_selective_logprob_is_differentiable_once() -> None:
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 8])

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        result = selective_logprob(logits, target, temperature=0.7, return_entropy=True, backend="triton")
        assert result.entropy is not None
        return result.logp, result.entropy, result.lse

    assert torch.autograd.gradcheck(outputs, (logits,))
    logp = selective_logprob(logits, target, backend="triton").logp
    with pytest.raises(RuntimeError, match="selective_logprob is differentiable once"):
        torch.autograd.grad(logp.sum(), logits, create_graph=True)
    assert torch.equal(torch.autograd.grad(logp.sum(), logits, retain_graph=True)[0][1], torch.zeros(9).double())

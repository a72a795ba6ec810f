"""A target's log-prob, entropy and log-sum-exp have the same bits in every batch. Promised where the GEMM library computes equal
rows of one block shape alike, which it does for aligned rows on the machines this was run on; verify says where not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import linear_logprob, selective_logprob, verify
from specs_kernels.linear_logprob import chunked

SHAPES = [(300, 64, 117), (130, 192, 512), (200, 33, 4500), (129, 7, 31), (140, 16, 1), (257, 70, 2049)]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.tensor([0]),
        torch.tensor([count - 1]),
        torch.tensor([5, 3, 77]),
        torch.arange(1, count),
        torch.randperm(count, generator=generator)[: count // 2],
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "option, dtype, threads",
    [
        ("plain", torch.float32, 1),
        ("plain", torch.float32, 2),
        ("plain", torch.bfloat16, 1),
        ("plain", torch.float64, 1),
        ("softcap", torch.float32, 1),
        ("bias, temperature", torch.float32, 1),
        ("lora", torch.float32, 1),
        ("lora", torch.float64, 1),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_in_every_batch(
    shape: tuple[int, int, int], option: str, dtype: torch.dtype, threads: int
) -> None:
    count, dim, vocab = shape
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    hidden, weight = normal(count, dim), normal(vocab, dim)
    target = torch.randint(0, vocab, (count,), generator=generator)
    options: dict[str, Any] = {
        "plain": {},
        "softcap": {"softcap": 5.0},
        "bias, temperature": {"bias": normal(vocab), "temperature": 0.7},
        "lora": {"lora": (normal(4, dim), normal(vocab, 4))},
    }[option]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear_logprob(hidden, weight, target, return_entropy=True, **options)
        for index in batches(count):
            part = linear_logprob(hidden[index], weight, target[index], return_entropy=True, **options)
            for ours, expected in zip(part, whole, strict=True):
                assert torch.equal(ours, expected[index])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_selective_logprob_too(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(150, 3001, generator=generator)).to(dtype)
    target = torch.randint(0, 3001, (150,), generator=generator)
    whole = selective_logprob(logits, target, return_entropy=True)
    for index in batches(150):
        for ours, expected in zip(
            selective_logprob(logits[index], target[index], return_entropy=True), whole, strict=True
        ):
            assert torch.equal(ours, expected[index])


def test_modes_agree_bit_by_bit_in_the_forward() -> None:
    hidden, weight = torch.randn(150, 16, requires_grad=True), torch.randn(300, 16)
    target = torch.randint(0, 300, (150,))
    results = [linear_logprob(hidden, weight, target, mode=mode) for mode in ("recompute", "frozen", "auto")]
    with torch.no_grad():
        results.append(linear_logprob(hidden, weight, target))
    for result in results[1:]:
        assert torch.equal(result.logp, results[0].logp) and torch.equal(result.lse, results[0].lse)


def test_verify_says_when_results_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = chunked.TorchRowPass.stats

    def uneven(self: Any, x_RC: Tensor, *arguments: Any, **options: Any) -> Any:
        return right(self, x_RC.add_(1e-6 * x_RC.shape[0]), *arguments, **options)

    from specs_kernels import verify_cases

    monkeypatch.setattr(verify_cases, "_CASES", {**verify_cases._CASES, "linear_logprob": lambda *_: iter(())})
    results = verify.verify(["linear_logprob"])
    assert results and all(result.passed and not result.note and result.error == 0 for result in results)
    monkeypatch.setattr(chunked.TorchRowPass, "stats", uneven)
    results = [result for result in verify.verify(["linear_logprob"]) if result.backend == "chunked"]
    assert results and all(
        result.passed and "depend on the batch" in result.note and result.error > 0 for result in results
    )

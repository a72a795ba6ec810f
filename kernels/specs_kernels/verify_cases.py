"""What ``specs-kernels verify`` runs: per op a few cases, each with the plain PyTorch a user would write instead.

A case makes differentiable inputs in one dtype, runs the op on them, and runs ``plain``: the same quantity with the same
dtype in ordinary PyTorch. Its error against fp64 is the yardstick for the error of a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels import varlen
from specs_kernels.layers import rms_norm, swiglu
from specs_kernels.layout import PackedLayout
from specs_kernels.packed_attention import packed_attention
from specs_kernels.policy_loss import policy_loss
from specs_kernels.preference_loss import preference_loss
from specs_kernels.verify_case import Case, Tensors
from specs_kernels.verify_logprob_cases import linear_logprob_cases, linear_loss_cases, selective_logprob_cases


def cases(op: str, device: torch.device, seed: int) -> Iterator[Case]:
    """All cases of an op; the same seed gives the same inputs on every device."""
    generator = torch.Generator().manual_seed(seed)
    for case in _CASES[op](generator, device):
        moved = {name: tensor.to(device) for name, tensor in case.inputs.items()}
        yield replace(case, inputs=moved)


@dataclass(frozen=True)
class _Attention:
    """A case of ``packed_attention``."""

    name: str
    layout: PackedLayout
    heads: int
    kv_heads: int
    softcap: float | None = None
    window: int | None = None
    size: int = 32
    """Of a head."""
    grad_lse: bool = True
    """Whether lse, too, has an upstream gradient."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def results(self, out: Tensor, lse: Tensor) -> Tensors:
        return {"out": out, "lse": lse} if self.grad_lse else {"out": out, "lse, detached": lse.detach()}

    def run(self, x: Tensors, backend: str) -> Tensors:
        out, lse = packed_attention(
            x["query"],
            x["key"],
            x["value"],
            self.layout,
            softcap=self.softcap,
            window=self.window,
            return_lse=True,
            backend=backend,
        )
        return self.results(out, lse)

    def plain(self, x: Tensors) -> Tensors:
        repeats = x["query"].shape[1] // x["key"].shape[1]
        key, value = (x[side].repeat_interleave(repeats, dim=1) for side in ("key", "value"))
        scores = torch.einsum("ihd,jhd->hij", x["query"], key) * x["query"].shape[2] ** -0.5
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self.layout.dense_mask(self.window), -torch.inf)
        scores = scores.double() if scores.dtype == torch.float64 else scores.float()
        probs = torch.softmax(scores, dim=-1).to(value.dtype)
        return self.results(torch.einsum("hij,jhd->ihd", probs, value), torch.logsumexp(scores, dim=-1).T)


def _packed_attention_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    prompts = PackedLayout.from_segments([86, 40, 17, 40, 33, 0, 25], [-1, 0, 0, 0, -1, 4, 4], device=device)
    spans = PackedLayout.from_segments(
        [300, 20, 9, 31, 12, 40], [-1, 0, 1, 1, 0, -1], bidirectional=[(10, 74), (320, 329)], device=device
    )
    trees = PackedLayout.from_segments([200, 20, 9, 31, 12, 80, 40, 33], [-1, 0, 1, 1, 0, -1, 5, 5], device=device)
    flat = PackedLayout.from_segments([70, 1, 130, 41], [-1] * 4, device=device)
    small = PackedLayout.from_segments([37, 20, 9, 31, 3, 16], [-1, 0, 0, 2, -1, 4], device=device)
    everything = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    kernels = (torch.bfloat16, torch.float16)  # the stand-in takes everything
    for attention in (
        _Attention("prompts and responses", prompts, 6, 2),
        *(
            _Attention(f"heads of {size}", small, 4, 2, size=size, grad_lse=False, dtypes=everything[:2])
            for size in (64, 72, 80, 96, 128, 192, 256)
        ),
        _Attention("deep, bidirectional spans", spans, 4, 4),
        _Attention("deep, gradient of out alone", trees, 4, 2, grad_lse=False),
        _Attention("flat, window, gradient of out alone", flat, 4, 2, window=30, grad_lse=False),
        _Attention("deep, window, softcap", spans, 4, 1, softcap=5.0, window=50),
    ):
        inputs = {
            name: torch.randn(attention.layout.num_tokens, heads, attention.size, generator=generator)
            for name, heads in (("query", attention.heads), ("key", attention.kv_heads), ("value", attention.kv_heads))
        }
        cascade = () if attention.grad_lse else everything if device.type == "cpu" else kernels
        yield Case(
            "packed_attention",
            attention.name,
            inputs,
            attention.run,
            attention.plain,
            attention.dtypes,
            no_float64=("triton",),
            takes={"cascade": cascade, "triton": everything if attention.size <= 128 else kernels},
            setting=partial(varlen.use, "stand-in") if device.type == "cpu" else nullcontext,
        )


_LENGTHS = (5, 40, 1, 17, 120, 33, 64, 8)


def _segment_ids(device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS)).to(device)


def _preference_loss_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    segment_ids = _segment_ids(device)
    count = sum(_LENGTHS)
    ref = (-2 * torch.rand(count, generator=generator)).to(device)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6]], device=device)
    for nll_mode in ("sequence", "token"):

        def run(x: Tensors, backend: str, nll_mode: str = nll_mode) -> Tensors:
            loss, metrics = preference_loss(
                x["logp"],
                ref.to(x["logp"].dtype),
                segment_ids,
                pairs,
                label_smoothing=0.1,
                nll_weight=1.0,
                nll_mode=nll_mode,
                backend=backend,
            )
            return {"loss": loss, **metrics}

        def plain(x: Tensors, nll_mode: str = nll_mode) -> Tensors:
            logp, ref_logp = (v.split(_LENGTHS) for v in (x["logp"], ref.to(x["logp"].dtype)))
            losses, nll, tokens = [], [], 0
            for chosen, rejected in pairs.tolist():
                delta = (logp[chosen] - ref_logp[chosen]).sum() - (logp[rejected] - ref_logp[rejected]).sum()
                losses.append(-0.9 * F.logsigmoid(0.1 * delta) - 0.1 * F.logsigmoid(-0.1 * delta))
                nll.append(-(logp[chosen].mean() if nll_mode == "sequence" else logp[chosen].sum()))
                tokens += _LENGTHS[chosen]
            supervised = torch.stack(nll).sum() / (len(nll) if nll_mode == "sequence" else tokens)
            return {"loss": torch.stack(losses).mean() + supervised}

        inputs = {"logp": -2 * torch.rand(count, generator=generator)}
        yield Case("preference_loss", f"nll per {nll_mode}", inputs, run, plain, (torch.float32,))


def _policy_loss_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    segment_ids = _segment_ids(device)
    count = sum(_LENGTHS)
    logp = -2 * torch.rand(count, generator=generator)
    old = (logp + 0.3 * torch.randn(count, generator=generator)).to(device)
    ref = (logp + 0.3 * torch.randn(count, generator=generator)).to(device)
    advantage = torch.randn(len(_LENGTHS), generator=generator).to(device)[segment_ids]
    for aggregation in ("dapo", "bnpo", "grpo", "dr_grpo"):

        def run(x: Tensors, backend: str, aggregation: str = aggregation) -> Tensors:
            loss, metrics = policy_loss(
                x["logp"],
                old.to(x["logp"].dtype),
                advantage.to(x["logp"].dtype),
                segment_ids,
                epsilon_high=0.28,
                beta=0.1,
                ref_logp=ref.to(x["logp"].dtype),
                aggregation=aggregation,
                denominator=640 if aggregation == "dr_grpo" else None,
                backend=backend,
            )
            return {"loss": loss, **metrics}

        def plain(x: Tensors, aggregation: str = aggregation) -> Tensors:
            dtype = x["logp"].dtype
            ratio, delta, adv = torch.exp(x["logp"] - old.to(dtype)), ref.to(dtype) - x["logp"], advantage.to(dtype)
            per_token = -torch.min(ratio * adv, ratio.clamp(0.8, 1.28) * adv) + 0.1 * (delta.exp() - delta - 1)
            if aggregation == "grpo":
                return {"loss": torch.stack([part.mean() for part in per_token.split(_LENGTHS)]).mean()}
            return {"loss": per_token.sum() / (640 if aggregation == "dr_grpo" else count)}

        yield Case("policy_loss", aggregation, {"logp": logp}, run, plain, (torch.float32,))


def _layer_inputs(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return 2 * torch.randn(shape, generator=generator)


def _rms_norm_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for shape in ((400, 128), (3, 70, 33)):

        def run(x: Tensors, backend: str) -> Tensors:
            return {"out": rms_norm(x["x"], x["weight"], backend=backend)}

        def plain(x: Tensors) -> Tensors:
            return {"out": F.rms_norm(x["x"], x["weight"].shape, x["weight"], 1e-6)}

        inputs = {"x": _layer_inputs(generator, shape), "weight": _layer_inputs(generator, shape[-1:])}
        yield Case("rms_norm", f"width {shape[-1]}", inputs, run, plain)


def _swiglu_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    def run(x: Tensors, backend: str) -> Tensors:
        return {"out": swiglu(x["gate"], x["up"], backend=backend)}

    def plain(x: Tensors) -> Tensors:
        return {"out": F.silu(x["gate"]) * x["up"]}

    inputs = {name: _layer_inputs(generator, (200, 99)) for name in ("gate", "up")}
    yield Case("swiglu", "one", inputs, run, plain)


_CASES: dict[str, Callable[[torch.Generator, torch.device], Iterator[Case]]] = {
    "linear_logprob": linear_logprob_cases,
    "linear_loss": linear_loss_cases,
    "selective_logprob": selective_logprob_cases,
    "packed_attention": _packed_attention_cases,
    "rms_norm": _rms_norm_cases,
    "swiglu": _swiglu_cases,
    "preference_loss": _preference_loss_cases,
    "policy_loss": _policy_loss_cases,
}

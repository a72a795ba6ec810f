"""What ``specs-kernels verify`` runs: per op a few cases, each with the plain PyTorch a user would write instead.

A case makes differentiable inputs in one dtype, runs the op on them, and runs ``plain``: the same quantity with the same
dtype in ordinary PyTorch. Its error against fp64 is the yardstick for the error of a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels.dispatch import backends
from specs_kernels.layers import rms_norm, swiglu
from specs_kernels.layout import PackedLayout
from specs_kernels.linear_logprob import linear_logprob
from specs_kernels.linear_logprob.head import row_block
from specs_kernels.linear_loss import linear_loss
from specs_kernels.packed_attention import packed_attention
from specs_kernels.policy_loss import policy_loss
from specs_kernels.preference_loss import preference_loss
from specs_kernels.results import TokenLogprobs
from specs_kernels.selective_logprob import selective_logprob

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """inputs: fp32 tensors, each of which gets a gradient. run(inputs, backend) and plain(inputs) give named outputs."""

    op: str
    name: str
    inputs: Tensors
    run: Callable[[Tensors, str], Tensors]
    plain: Callable[[Tensors], Tensors]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def cases(op: str, device: torch.device, seed: int) -> Iterator[Case]:
    """All cases of an op; the same seed gives the same inputs on every device."""
    generator = torch.Generator().manual_seed(seed)
    for case in _CASES[op](generator, device):
        moved = {name: tensor.to(device) for name, tensor in case.inputs.items()}
        yield Case(case.op, case.name, moved, case.run, case.plain, case.dtypes)


@dataclass(frozen=True)
class Invariance:
    """run(inputs, index, backend): outputs of the targets that ``index`` names, in one call."""

    op: str
    name: str
    count: int
    inputs: Tensors
    run: Callable[[Tensors, Tensor, str], Tensors]
    batches: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def invariance_cases(op: str, device: torch.device, seed: int) -> Iterator[Invariance]:
    """Cases of the ops that promise it: the same target in batches of other sizes and at other places."""
    generator = torch.Generator().manual_seed(seed)
    if op not in ("linear_logprob", "selective_logprob"):
        return
    count = 300 if _affordable(op, device, 300, 0)[0] == 300 else 40
    batches = tuple(
        torch.tensor(index)
        for index in ([0], [count - 1], [7, 3, count // 2], list(range(1, count)), list(range(0, count, 2)))
    )
    for dim, vocab in ((64, 1000), (33, 4500)):
        _, vocab = _affordable(op, device, count, vocab)
        inputs = {
            "hidden": torch.randn(count, dim, generator=generator).to(device),
            "weight": torch.randn(vocab, dim, generator=generator).to(device),
            "logits": (3 * torch.randn(count, vocab, generator=generator)).to(device),
        }
        target = torch.randint(0, vocab, (count,), generator=generator).to(device)

        def run(x: Tensors, index: Tensor, backend: str, target: Tensor = target, op: str = op) -> Tensors:
            index = index.to(target.device)
            if op == "selective_logprob":
                return _named(
                    selective_logprob(x["logits"][index], target[index], return_entropy=True, backend=backend)
                )
            hidden = x["hidden"][index]
            return _named(linear_logprob(hidden, x["weight"], target[index], return_entropy=True, backend=backend))

        yield Invariance(op, f"row alone = in batch, V = {vocab}", count, inputs, run, batches)


def _named(result: TokenLogprobs) -> Tensors:
    return {name: value for name, value in result._asdict().items() if value is not None}


def _alive(values: dict[str, Any], alive: Tensor) -> Tensors:
    return {name: value * alive for name, value in values.items()}


def _from_logits(z_NV: Tensor, target: Tensor, keep: Tensor) -> Tensors:
    z_NV = z_NV.double() if z_NV.dtype == torch.float64 else z_NV.float()
    log_p = F.log_softmax(z_NV, dim=-1)
    results = {
        "logp": log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1),
        "entropy": -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1),
        "lse": torch.logsumexp(z_NV, dim=-1),
    }
    return {name: torch.where(keep, values, 0.0) for name, values in results.items()}


def _targets(generator: torch.Generator, count: int, vocab_size: int, device: torch.device) -> Tensor:
    target = torch.randint(0, vocab_size, (count,), generator=generator)
    target[::7] = -100
    return target.to(device)


def _affordable(op: str, device: torch.device, rows: int, vocab: int) -> tuple[int, int]:
    """Triton's interpreter takes milliseconds per row and tile; where it runs, cases are smaller but still several tiles."""
    if device.type == "cpu" and "triton" in backends(op, device):
        return min(rows, 170), min(vocab, 2100)
    return rows, vocab


@dataclass(frozen=True)
class _Head:
    """One case of a head. mode: arguments that choose it; the reference has no modes. frozen: the weight gets no gradient.
    cached_rows: targets whose scores a cache may hold. dead: every third target passes no gradient, and the backward drops
    it. forbidden: columns that are no target have a bias of -inf."""

    name: str
    rows: int
    dim: int
    vocab: int
    softcap: float | None = None
    bias: bool = False
    lora: bool = False
    frozen: bool = False
    temperature: float | None = 1.0
    sharpness: float = 1.0
    mode: dict[str, Any] = field(default_factory=dict)
    cached_rows: int = 0
    dead: bool = False
    forbidden: bool = False
    logit_scale: float = 1.0

    def on(self, device: torch.device) -> _Head:
        """In a size that this device can pay; a cache for part of the targets holds a block of rows, and not all of them."""
        rows, vocab = _affordable("linear_logprob", device, self.rows, self.vocab)
        block = row_block(device)
        if self.cached_rows and rows == self.rows:
            return replace(self, rows=max(rows, 2 * block + 44), cached_rows=max(self.cached_rows, block + 2))
        return replace(self, rows=rows, vocab=vocab)

    def modes(self, backend: str, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments that choose the mode."""
        if backend == "reference":
            return {}
        if self.cached_rows:
            held = self.cached_rows * self.vocab * dtype.itemsize
            return {"mode": "cache", "logit_cache_bytes": held, "compact": self.dead}
        return self.mode

    def inputs(self, generator: torch.Generator) -> Tensors:
        inputs = {
            "hidden": torch.randn(self.rows, self.dim, generator=generator),
            "weight": torch.randn(self.vocab, self.dim, generator=generator) * (self.sharpness / self.dim**0.5),
        }
        if self.bias:
            inputs["bias"] = torch.randn(self.vocab, generator=generator)
        if self.lora:
            inputs["lora_A"] = torch.randn(8, self.dim, generator=generator) / self.dim**0.5
            inputs["lora_B"] = torch.randn(self.vocab, 8, generator=generator) / 8**0.5
        return inputs

    def logits(self, x: Tensors, source: Tensor | None) -> Tensor:
        """What a user would write, in the dtype of the inputs."""
        hidden = x["hidden"] if source is None else x["hidden"][source]
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        z_NV = F.linear(hidden, x["weight"], x.get("bias"))
        if self.lora:
            z_NV = z_NV + F.linear(F.linear(hidden, x["lora_A"]), x["lora_B"])
        return z_NV if self.softcap is None else self.softcap * torch.tanh(z_NV / self.softcap)


_HEADS = (
    _Head("one tile", 300, 64, 117),
    _Head("confident", 200, 64, 1000, sharpness=6.0),
    _Head("recompute, many tiles", 700, 32, 4500, temperature=0.7, mode={"mode": "recompute"}),
    _Head("softcap, bias, rows", 200, 48, 501, softcap=3.0, bias=True, temperature=1.3),
    _Head("lora, temperatures", 200, 48, 501, lora=True, temperature=None, mode={"mode": "recompute", "compact": True}),
    _Head("partly cached", 400, 48, 2500, cached_rows=130),
    _Head(
        "forbidden, dead, cached", 400, 48, 2500, bias=True, cached_rows=130, dead=True, forbidden=True, logit_scale=0.5
    ),
    _Head("frozen", 300, 48, 2500, softcap=8.0, frozen=True, mode={"mode": "frozen"}),
    _Head("frozen, confident", 200, 64, 1000, sharpness=6.0, frozen=True, mode={"mode": "frozen"}),
)


def _linear_logprob_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for head in (head.on(device) for head in _HEADS):
        inputs = head.inputs(generator)
        target = _targets(generator, head.rows, head.vocab, device)
        alive = (
            torch.arange(head.rows, device=device) % 3 != 1 if head.dead else torch.ones_like(target, dtype=torch.bool)
        )
        if head.forbidden:
            places = torch.zeros(head.vocab, dtype=torch.bool).index_fill(0, target[target >= 0].cpu(), True)
            inputs["bias"].masked_fill_(~places, -torch.inf)
        shared = torch.randint(0, head.rows, (head.rows,), generator=generator).to(device) if head.bias else None
        temperature = torch.linspace(0.5, 2.0, head.rows).to(device) if head.temperature is None else head.temperature
        fixed = {"weight": inputs.pop("weight").to(device)} if head.frozen else {}

        def run(
            x: Tensors,
            backend: str,
            head: _Head = head,
            target: Tensor = target,
            source: Tensor | None = shared,
            temperature: float | Tensor = temperature,
            fixed: Tensors = fixed,
            alive: Tensor = alive,
        ) -> Tensors:
            x = x | {name: tensor.to(x["hidden"].dtype) for name, tensor in fixed.items()}
            return _alive(
                linear_logprob(
                    x["hidden"],
                    x["weight"],
                    target,
                    bias=x.get("bias"),
                    lora=(x["lora_A"], x["lora_B"]) if head.lora else None,
                    temperature=temperature,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                    return_entropy=True,
                    rows=source,
                    backend=backend,
                    **head.modes(backend, x["hidden"].dtype),
                )._asdict(),
                alive,
            )

        def plain(
            x: Tensors,
            head: _Head = head,
            target: Tensor = target,
            source: Tensor | None = shared,
            temperature: float | Tensor = temperature,
            fixed: Tensors = fixed,
            alive: Tensor = alive,
        ) -> Tensors:
            x = x | {name: tensor.to(x["hidden"].dtype) for name, tensor in fixed.items()}
            divisor = temperature[:, None].to(x["hidden"].dtype) if isinstance(temperature, Tensor) else temperature
            return _alive(_from_logits(head.logits(x, source) / divisor, target, target >= 0), alive)

        yield Case("linear_logprob", head.name, inputs, run, plain)


def _linear_loss_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for head, workspace_rows in (
        (_Head("one chunk", 300, 64, 117), 1024),
        (_Head("many chunks, softcap, lora", 700, 48, 2500, softcap=5.0, lora=True), 128),
    ):
        rows, vocab = _affordable("linear_loss", device, head.rows, head.vocab)
        if rows == head.rows:  # several chunks, each of whole blocks
            workspace_rows = max(workspace_rows, row_block(device))
            rows = max(rows, 2 * row_block(device) + 44)
        head = replace(head, rows=rows, vocab=vocab)
        inputs = head.inputs(generator)
        target = _targets(generator, head.rows, head.vocab, device)
        weights = torch.randn(head.rows, generator=generator).to(device)

        def run(
            x: Tensors,
            backend: str,
            head: _Head = head,
            target: Tensor = target,
            weights: Tensor = weights,
            workspace_rows: int = workspace_rows,
        ) -> Tensors:
            def loss_fn(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
                assert entropy is not None
                return (weights.to(logp.dtype)[index] * (logp + 0.1 * entropy)).sum()

            loss, _, _ = linear_loss(
                x["hidden"],
                x["weight"],
                target,
                loss_fn,
                lora=(x["lora_A"], x["lora_B"]) if head.lora else None,
                softcap=head.softcap,
                return_entropy=True,
                workspace_bytes=workspace_rows * head.vocab * x["hidden"].dtype.itemsize,
                backend=backend,
            )
            return {"loss": loss}

        def plain(x: Tensors, head: _Head = head, target: Tensor = target, weights: Tensor = weights) -> Tensors:
            values = _from_logits(head.logits(x, None), target, target >= 0)
            return {"loss": (weights.to(values["logp"].dtype) * (values["logp"] + 0.1 * values["entropy"])).sum()}

        yield Case("linear_loss", head.name, inputs, run, plain)


def _selective_logprob_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for name, rows, vocab, temperature in (("one tile", 300, 117, 1.0), ("many tiles", 700, 9000, 0.7)):
        rows, vocab = _affordable("selective_logprob", device, rows, vocab)
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        target = _targets(generator, rows, vocab, device)

        def run(x: Tensors, backend: str, target: Tensor = target, temperature: float = temperature) -> Tensors:
            return _named(
                selective_logprob(x["logits"], target, temperature=temperature, return_entropy=True, backend=backend)
            )

        def plain(x: Tensors, target: Tensor = target, temperature: float = temperature) -> Tensors:
            return _from_logits(x["logits"] / temperature, target, target >= 0)

        yield Case("selective_logprob", name, {"logits": logits}, run, plain)


def _packed_attention_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    prompts = PackedLayout.from_segments([86, 40, 17, 40, 33, 0, 25], [-1, 0, 0, 0, -1, 4, 4], device=device)
    deep = PackedLayout.from_segments(
        [300, 20, 9, 31, 12, 40], [-1, 0, 1, 1, 0, -1], bidirectional=[(10, 74), (320, 329)], device=device
    )
    for name, layout, heads, kv_heads, softcap, window in (
        ("prompts and responses", prompts, 6, 2, None, None),
        ("deep, bidirectional spans", deep, 4, 4, None, None),
        ("deep, window, softcap", deep, 4, 1, 5.0, 50),
    ):
        inputs = {
            "query": torch.randn(layout.num_tokens, heads, 32, generator=generator),
            "key": torch.randn(layout.num_tokens, kv_heads, 32, generator=generator),
            "value": torch.randn(layout.num_tokens, kv_heads, 32, generator=generator),
        }

        def run(
            x: Tensors,
            backend: str,
            layout: PackedLayout = layout,
            softcap: float | None = softcap,
            window: int | None = window,
        ) -> Tensors:
            out, lse = packed_attention(
                x["query"],
                x["key"],
                x["value"],
                layout,
                softcap=softcap,
                window=window,
                return_lse=True,
                backend=backend,
            )
            return {"out": out, "lse": lse}

        def plain(
            x: Tensors,
            layout: PackedLayout = layout,
            softcap: float | None = softcap,
            window: int | None = window,
        ) -> Tensors:
            repeats = x["query"].shape[1] // x["key"].shape[1]
            key, value = (x[side].repeat_interleave(repeats, dim=1) for side in ("key", "value"))
            scores = torch.einsum("ihd,jhd->hij", x["query"], key) * x["query"].shape[2] ** -0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~layout.dense_mask(window), -torch.inf)
            scores = scores.double() if scores.dtype == torch.float64 else scores.float()
            probs = torch.softmax(scores, dim=-1).to(value.dtype)
            return {"out": torch.einsum("hij,jhd->ihd", probs, value), "lse": torch.logsumexp(scores, dim=-1).T}

        yield Case("packed_attention", name, inputs, run, plain)


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
    "linear_logprob": _linear_logprob_cases,
    "linear_loss": _linear_loss_cases,
    "selective_logprob": _selective_logprob_cases,
    "packed_attention": _packed_attention_cases,
    "rms_norm": _rms_norm_cases,
    "swiglu": _swiglu_cases,
    "preference_loss": _preference_loss_cases,
    "policy_loss": _policy_loss_cases,
}

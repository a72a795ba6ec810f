"""Cases of ``specs-kernels verify`` for the log-prob ops: from hidden states, from logits, and alone against in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specs_kernels.dispatch import backends
from specs_kernels.linear_logprob import linear_logprob
from specs_kernels.linear_logprob.head import kept_dtype, row_block
from specs_kernels.linear_loss import linear_loss
from specs_kernels.results import TokenLogprobs
from specs_kernels.selective_logprob import selective_logprob
from specs_kernels.verify_case import Case, Invariance, Tensors


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


def affordable(op: str, device: torch.device, rows: int, vocab: int) -> tuple[int, int]:
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
        rows, vocab = affordable("linear_logprob", device, self.rows, self.vocab)
        block = row_block(device)
        if self.cached_rows and rows == self.rows:
            return replace(self, rows=max(rows, 2 * block + 44), cached_rows=max(self.cached_rows, block + 2))
        return replace(self, rows=rows, vocab=vocab)

    def modes(self, backend: str, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments that choose the mode."""
        if backend == "reference":
            return {}
        if self.cached_rows:
            held = self.cached_rows * self.vocab * kept_dtype(dtype, self.softcap).itemsize
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


@dataclass(frozen=True)
class _Problem:
    """What a case of a head fixes beside its inputs. source: rows of hidden, or None. fixed: inputs without a gradient."""

    head: _Head
    target: Tensor
    source: Tensor | None
    temperature: float | Tensor
    fixed: Tensors
    alive: Tensor

    def _all(self, x: Tensors) -> Tensors:
        return x | {name: tensor.to(x["hidden"].dtype) for name, tensor in self.fixed.items()}

    def run(self, x: Tensors, backend: str) -> Tensors:
        x, head = self._all(x), self.head
        result = linear_logprob(
            x["hidden"],
            x["weight"],
            self.target,
            bias=x.get("bias"),
            lora=(x["lora_A"], x["lora_B"]) if head.lora else None,
            temperature=self.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            return_entropy=True,
            rows=self.source,
            backend=backend,
            **head.modes(backend, x["hidden"].dtype),
        )
        return _alive(result._asdict(), self.alive)

    def plain(self, x: Tensors) -> Tensors:
        x, divisor = self._all(x), self.temperature
        if isinstance(divisor, Tensor):
            divisor = divisor[:, None].to(x["hidden"].dtype)
        z_NV = self.head.logits(x, self.source) / divisor
        return _alive(_from_logits(z_NV, self.target, self.target >= 0), self.alive)


def linear_logprob_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
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

        problem = _Problem(head, target, shared, temperature, fixed, alive)
        yield Case("linear_logprob", head.name, inputs, problem.run, problem.plain)


def linear_loss_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for head, workspace_rows in (
        (_Head("one chunk", 300, 64, 117), 1024),
        (_Head("many chunks, softcap, lora", 700, 48, 2500, softcap=5.0, lora=True), 128),
    ):
        rows, vocab = affordable("linear_loss", device, head.rows, head.vocab)
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
                workspace_bytes=workspace_rows * head.vocab * kept_dtype(x["hidden"].dtype, head.softcap).itemsize,
                backend=backend,
            )
            return {"loss": loss}

        def plain(x: Tensors, head: _Head = head, target: Tensor = target, weights: Tensor = weights) -> Tensors:
            values = _from_logits(head.logits(x, None), target, target >= 0)
            return {"loss": (weights.to(values["logp"].dtype) * (values["logp"] + 0.1 * values["entropy"])).sum()}

        yield Case("linear_loss", head.name, inputs, run, plain)


def selective_logprob_cases(generator: torch.Generator, device: torch.device) -> Iterator[Case]:
    for name, rows, vocab, temperature in (("one tile", 300, 117, 1.0), ("many tiles", 700, 9000, 0.7)):
        rows, vocab = affordable("selective_logprob", device, rows, vocab)
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        target = _targets(generator, rows, vocab, device)

        def run(x: Tensors, backend: str, target: Tensor = target, temperature: float = temperature) -> Tensors:
            return _named(
                selective_logprob(x["logits"], target, temperature=temperature, return_entropy=True, backend=backend)
            )

        def plain(x: Tensors, target: Tensor = target, temperature: float = temperature) -> Tensors:
            return _from_logits(x["logits"] / temperature, target, target >= 0)

        yield Case("selective_logprob", name, {"logits": logits}, run, plain)


def invariance_cases(op: str, device: torch.device, seed: int) -> Iterator[Invariance]:
    """Cases of the ops that promise it: the same target in batches of other sizes and at other places."""
    generator = torch.Generator().manual_seed(seed)
    if op not in ("linear_logprob", "selective_logprob"):
        return
    count = 300 if affordable(op, device, 300, 0)[0] == 300 else 40
    batches = tuple(
        torch.tensor(index)
        for index in ([0], [count - 1], [7, 3, count // 2], list(range(1, count)), list(range(0, count, 2)))
    )
    for dim, vocab in ((64, 1000), (33, 4500)):
        _, vocab = affordable(op, device, count, vocab)
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

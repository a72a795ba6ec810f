"""Inputs of ``bench.packed_attention``: forests as trees of a prompt and its responses, and the exact answer.

Letters: T packed tokens, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specs_kernels import PackedLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, head size."""

    query: int
    key: int
    size: int


@dataclass(frozen=True)
class Forest:
    """Trees of one prompt and its responses, token counts; a flat sequence is a tree without responses."""

    name: str
    trees: tuple[tuple[int, tuple[int, ...]], ...]

    def layout(self, device: torch.device) -> PackedLayout:
        lengths: list[int] = []
        parents: list[int] = []
        for prompt, responses in self.trees:
            root = len(lengths)
            lengths += [prompt, *responses]
            parents += [-1, *(root for _ in responses)]
        return PackedLayout.from_segments(lengths, parents, device=device)

    def rows(self, device: torch.device) -> list[Tensor]:
        """Packed indices of the rows that a padded batch has: prompt and response, or the whole flat sequence."""
        rows, start = [], 0
        for prompt, responses in self.trees:
            head = torch.arange(start, start + prompt, device=device)
            start += prompt
            if not responses:
                rows.append(head)
            for response in responses:
                rows.append(torch.cat([head, torch.arange(start, start + response, device=device)]))
                start += response
        return rows

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        triangle = [p * (p + 1) // 2 + sum(r * p + r * (r + 1) // 2 for r in rs) for p, rs in self.trees]
        return sum(triangle)

    @property
    def num_tokens(self) -> int:
        return sum(prompt + sum(responses) for prompt, responses in self.trees)


@dataclass(frozen=True)
class Problem:
    """Packed inputs: query ``[T, H, D]``, key and value ``[T, Hkv, D]``, and the upstream gradient of the output."""

    forest: Forest
    heads: Heads
    layout: PackedLayout
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    training: bool

    @staticmethod
    def make(forest: Forest, heads: Heads, dtype: torch.dtype, training: bool, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def new(count: int) -> Tensor:
            shape = (forest.num_tokens, count, heads.size)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        query, key, value, upstream = new(heads.query), new(heads.key), new(heads.key), new(heads.query)
        for tensor in (query, key, value):
            tensor.requires_grad_(training)
        return Problem(forest, heads, forest.layout(device), query, key, value, upstream, training)

    def run(self, attend: Attend) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.training):
            out = attend(self.query, self.key, self.value)
            if not self.training:
                return {"out": out}
            grads = torch.autograd.grad(out, [self.query, self.key, self.value], self.upstream.to(out.dtype))
            return {"out": out.detach(), **dict(zip(("d query", "d key", "d value"), grads, strict=True))}

    def counts(self, source: Tensor) -> Tensor:
        """How many rows hold each packed token. source: packed index of every row's tokens."""
        return torch.bincount(source, minlength=self.forest.num_tokens)

    def exact(self) -> dict[str, Tensor]:
        """The fp64 attention of every row and head by itself, in plain PyTorch. A token that stands in several rows has the
        same output in each, and its upstream gradient is split evenly between them."""
        inputs = [tensor.detach().double() for tensor in (self.query, self.key, self.value)]
        out, grads = torch.zeros_like(inputs[0]), [torch.zeros_like(tensor) for tensor in inputs]
        rows = self.forest.rows(self.query.device)
        share = 1 / self.counts(torch.cat(rows)).double()
        for row in rows:
            for head in range(self.heads.query):
                own_heads = (head, *2 * (head * self.heads.key // self.heads.query,))
                own = [x[row, h].requires_grad_(self.training) for x, h in zip(inputs, own_heads, strict=True)]
                part = attend_row(*own)
                out[row, head] = part.detach()
                if self.training:
                    upstream = self.upstream[row, head].double() * share[row, None]
                    for grad, h, piece in zip(grads, own_heads, torch.autograd.grad(part, own, upstream), strict=True):
                        grad[:, h].index_add_(0, row, piece)
        return {"out": out, "d query": grads[0], "d key": grads[1], "d value": grads[2]}


def attend_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one head of one sequence ``[L, D]``."""
    scores = query @ key.T * query.shape[-1] ** -0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value

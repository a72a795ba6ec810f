"""Sections of ``specs-fast bench packed_attention``: attention over a packed forest, 14 query and 2 key heads of 64.

Layouts: GRPO trees of a prompt of P tokens with G responses of R (named PxRxG), DPO pairs, flat rows of unrelated sequences
(one long, many short). Tasks: forward, and train (forward, and the gradients of query, key and value).

Every arm gets its inputs laid out as it wants them and computes the same thing: the attention of every response token to its
prompt and response, and of the prompt to itself. Arms that repeat the prompt per response repeat its queries too and so form
them G times; outputs are compared token by token with the fp64 definition, gradients summed over the copies.

Useful work counts the visible pairs of the forest once: 4 FLOP per pair, head and channel forward, 10 more backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.linear_logprob import FORWARD, SHORT, TRAIN
from bench.section import Arm, Case, Goal, Section, library
from specs_kernels import PackedLayout, packed_attention
from specs_kernels.dispatch import backends, unavailable

WHAT = "attention over a packed forest; layouts, tasks and useful work are described in bench/packed_attention.py"
HEADS, KEY_HEADS, WIDTH = 14, 2, 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def forests(*, gpu: bool, tiny: bool) -> list[Forest]:
    if tiny:
        return [Forest("tree", ((9, (4, 3)),)), Forest("flat", ((7, ()), (5, ())))]
    scale = 8 if gpu else 1
    return [
        Forest(f"{512 * scale}x{128 * scale}x8", ((512 * scale, (128 * scale,) * 8),)),
        Forest(f"{700 * scale}x{90 * scale}x8", ((700 * scale, (90 * scale,) * 8),)),
        Forest(f"{4 * scale} DPO pairs", tuple((200, (150, 90)) for _ in range(4 * scale))),
        Forest("one long", ((2048 * scale, ()),)),
        Forest("many short", tuple((96 + 8 * (i % 8), ()) for i in range(16 * scale))),
    ]


@dataclass(frozen=True)
class Problem:
    """Packed inputs: query ``[T, H, 64]``, key and value ``[T, Hkv, 64]``, and the upstream gradient of the output."""

    forest: Forest
    layout: PackedLayout
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    training: bool

    @staticmethod
    def make(forest: Forest, dtype: torch.dtype, training: bool, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def new(heads: int) -> Tensor:
            shape = (forest.num_tokens, heads, WIDTH)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        query, key, value, upstream = new(HEADS), new(KEY_HEADS), new(KEY_HEADS), new(HEADS)
        for tensor in (query, key, value):
            tensor.requires_grad_(training)
        return Problem(forest, forest.layout(device), query, key, value, upstream, training)

    def run(self, attend: Attend) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.training):
            out = attend(self.query, self.key, self.value)
            if not self.training:
                return {"out": out}
            grads = torch.autograd.grad(out, [self.query, self.key, self.value], self.upstream.to(out.dtype))
            return {"out": out.detach(), **dict(zip(("d query", "d key", "d value"), grads, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """The fp64 attention of every row and head by itself, in plain PyTorch. A token that stands in several rows has the
        same output in each, and its upstream gradient is split evenly between them."""
        inputs = [tensor.detach().double() for tensor in (self.query, self.key, self.value)]
        out, grads = torch.zeros_like(inputs[0]), [torch.zeros_like(tensor) for tensor in inputs]
        rows = self.forest.rows(self.query.device)
        share = 1 / counts(torch.cat(rows), self).double()
        for row in rows:
            for head in range(HEADS):
                heads = (head, head * KEY_HEADS // HEADS, head * KEY_HEADS // HEADS)
                own = [x[row, h].requires_grad_(self.training) for x, h in zip(inputs, heads, strict=True)]
                part = attend_row(*own)
                out[row, head] = part.detach()
                if self.training:
                    upstream = self.upstream[row, head].double() * share[row, None]
                    for grad, h, piece in zip(grads, heads, torch.autograd.grad(part, own, upstream), strict=True):
                        grad[:, h].index_add_(0, row, piece)
        return {"out": out, "d query": grads[0], "d key": grads[1], "d value": grads[2]}


def attend_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one head of one sequence ``[L, 64]``."""
    scores = query @ key.T * WIDTH**-0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """Sections for this kind of device."""
    gpu = device.type == "cuda"
    listed = []
    for forest in forests(gpu=gpu, tiny=tiny):
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            for task in (FORWARD, TRAIN):
                values = {"T": forest.num_tokens, "H": HEADS, "Hkv": KEY_HEADS, "dtype": SHORT[dtype], "task": task}
                name = f"{forest.name} {SHORT[dtype]} {task}"
                listed.append(Case(name, values, partial(build, forest, dtype, task == TRAIN), 2 if tiny else 11))
    return listed


def build(forest: Forest, dtype: torch.dtype, training: bool, device: torch.device) -> Section:
    problem = Problem.make(forest, dtype, training, device)
    flop = (14 if training else 4) * forest.pairs * HEADS * WIDTH
    arms = [*ours(problem), *padded(problem), *replicated(problem), *flex(problem)]
    return Section(arms, exact=problem.exact, flop=flop)


def ours(problem: Problem) -> list[Arm]:
    """Every backend that runs here; the dense reference is left out."""

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        return packed_attention(query, key, value, problem.layout, backend=backend)

    device = problem.query.device
    arms = [
        Arm(f"ours [{name}]", "specs_kernels", partial(problem.run, partial(attend, backend=name)))
        for name in backends("packed_attention", device)
        if name != "reference"
    ]
    why = unavailable("native", device)
    return arms + ([Arm.absent("ours [native]", "specs_kernels", why)] if why else [])


def padded(problem: Problem) -> list[Arm]:
    """What a padded batch costs: rows of prompt and response, right-padded, through causal SDPA without a mask (padding is on the
    right, so causality hides it), each prompt once per response."""
    rows = problem.forest.rows(problem.query.device)
    longest = max(map(len, rows))
    place = torch.cat([torch.arange(len(row), device=row.device) + i * longest for i, row in enumerate(rows)])
    source = torch.cat(rows)
    size = len(rows) * longest

    def spread(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, place, tensor[source])
        return padded.view(len(rows), longest, *tensor.shape[1:]).transpose(1, 2)

    laid = [spread(t.detach()).requires_grad_(problem.training) for t in (problem.query, problem.key, problem.value)]
    upstream = spread(problem.upstream / counts(source, problem).to(problem.upstream.dtype)[:, None, None])

    def gathered(tensor: Tensor, mean: bool) -> Tensor:
        flat = tensor.transpose(1, 2).flatten(0, 1)[place]
        total = flat.new_zeros(problem.forest.num_tokens, *flat.shape[1:]).index_add(0, source, flat)
        return total / counts(source, problem)[:, None, None].to(total.dtype) if mean else total

    def attend() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(problem.training):
            query, key, value = laid
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return (out.detach(), *torch.autograd.grad(out, laid, upstream)) if problem.training else (out,)

    note = "inputs laid out in padded rows beforehand"
    return [arm_of_rows("padded SDPA", attend, gathered, note)]


def counts(source: Tensor, problem: Problem) -> Tensor:
    """How many rows hold each packed token."""
    return torch.bincount(source, minlength=problem.forest.num_tokens)


def arm_of_rows(
    name: str, attend: Callable[[], tuple[Tensor, ...]], gathered: Callable[[Tensor, bool], Tensor], note: str
) -> Arm:
    """An arm whose results are rows; ``check`` brings them back to the packed order, outside what is timed."""

    def run() -> dict[str, Tensor]:
        return dict(zip(("out", "d query", "d key", "d value"), attend(), strict=False))

    def check(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: gathered(value, key == "out") for key, value in outputs.items()}

    return Arm(name, library("torch"), run, note=note, check=check)


def replicated(problem: Problem) -> list[Arm]:
    """Prompt by itself, then every response over its own copy of the prompt's keys and values, as PrefixGrouper and others do;
    only where all trees have equal shapes, so that one batched call serves each part."""
    shapes = set(problem.forest.trees)
    if len(shapes) > 1 or not problem.forest.trees[0][1] or len(set(problem.forest.trees[0][1])) > 1:
        return []
    (prompt, responses), trees = problem.forest.trees[0], len(problem.forest.trees)
    group, length = len(responses), responses[0]
    sees = torch.ones(length, prompt + length, dtype=torch.bool, device=problem.query.device).tril(prompt)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
            tree = tensor.view(trees, prompt + group * length, *tensor.shape[1:])
            head, tail = tree[:, :prompt].transpose(1, 2), tree[:, prompt:]
            return head, tail.reshape(trees * group, length, *tensor.shape[1:]).transpose(1, 2)

        (q_head, q_tail), (k_head, k_tail), (v_head, v_tail) = parts(query), parts(key), parts(value)
        first = F.scaled_dot_product_attention(q_head, k_head, v_head, is_causal=True, enable_gqa=True)
        keys, values = (
            torch.cat([head.repeat_interleave(group, 0), tail], 2)
            for head, tail in ((k_head, k_tail), (v_head, v_tail))
        )
        if query.is_cuda:  # with fewer key heads and a mask it would take its unfused path
            keys, values = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (keys, values))
        second = F.scaled_dot_product_attention(q_tail, keys, values, attn_mask=sees, enable_gqa=True)
        second = second.transpose(1, 2).reshape(trees, group * length, *query.shape[1:])
        return torch.cat([first.transpose(1, 2), second], 1).flatten(0, 1)

    return [Arm("replicated prefix SDPA", library("torch"), partial(problem.run, attend))]


def flex(problem: Problem) -> list[Arm]:
    """FlexAttention with the same visibility rule as a mask function; its CPU form has no backward."""
    name, lib, device = "FlexAttention", library("torch"), problem.query.device
    if problem.training and device.type == "cpu":
        return [Arm.absent(name, lib, "its CPU form has no backward")]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts, ends, tokens = problem.layout.visible_from, problem.layout.visible_until, problem.layout.num_tokens

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[key] <= query) & (query < ends[key])

    state: dict[str, Any] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not state:  # a layout serves all layers of a model, so its mask is made once
            state["mask"] = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
            state["call"] = torch.compile(flex_attention, dynamic=False)
        heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        return state["call"](*heads, block_mask=state["mask"], enable_gqa=True)[0].transpose(0, 1)

    return [Arm(name, lib, partial(problem.run, attend), note="mask made once, outside what is timed")]


def goals(device: torch.device) -> list[Goal]:
    """The op has no goal of its own here."""
    return []

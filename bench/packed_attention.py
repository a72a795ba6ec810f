"""Sections of ``specs-fast bench packed_attention``: attention over a packed forest.

Layouts: GRPO trees of a prompt of P tokens with G responses of R (named PxRxG), DPO pairs, an image-heavy mix, flat rows of
unrelated sequences (one long, many short, equal ones). Tasks: forward, and train (forward, and the gradients of query, key and
value). Heads: on a CPU 14 query and 2 key heads of 64 (Qwen2.5-0.5B), on a GPU 28 and 4 of 128 (Qwen2.5-7B).

Every arm gets its inputs laid out as it wants them and computes the same thing: the attention of every response token to its
prompt and response, and of the prompt to itself. Arms that repeat the prompt per response repeat its queries too and so form
them G times; outputs are compared token by token with the fp64 definition, gradients summed over the copies.

Useful work counts the visible pairs of the forest once: 4 FLOP per pair, head and channel forward, 10 more backward. The bare
part is one dense product of as many FLOP as one product over the visible pairs (``torch.mm``, inner size 512): two of them are a
forward's, seven a training step's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.linear_logprob import FORWARD, SHORT, TRAIN
from bench.packed_attention_peers import peers
from bench.packed_problem import Forest, Heads, Problem
from bench.section import Arm, Case, Goal, Section
from specs_kernels import packed_attention
from specs_kernels.dispatch import backends, unavailable

WHAT = "attention over a packed forest; layouts, tasks, useful work and the bare part are described in bench/packed_attention.py"
CPU_HEADS, GPU_HEADS = Heads(14, 2, 64), Heads(28, 4, 128)
PRODUCT = "product over the visible pairs"
SWEPT_ARMS = ("ours", "padded", "replicated")


def tree(prompt: int, response: int, group: int) -> Forest:
    return Forest(f"{prompt}x{response}x{group}", ((prompt, (response,) * group),))


def flat(name: str, lengths: list[int]) -> Forest:
    return Forest(name, tuple((length, ()) for length in lengths))


def forests(*, gpu: bool) -> list[Forest]:
    """GRPO and DPO trees at the sizes that long-reasoning runs have, on a CPU an eighth of them, and what else is packed."""
    scale = 8 if gpu else 1
    sizes = [(64, 64, 8), (512, 128, 8), (512, 32, 8), (1024, 128, 16), (128, 512, 8), (256, 64, 2)]
    trees = [tree(p * scale, r * scale, g) for p, r, g in sizes]
    images = ((600, (60,) * 8), (450, (80, 30, 60, 50)), (900, (40,) * 8), (600, (60, 90)))
    return [
        *trees,
        tree(700 * scale, 90 * scale, 8),
        Forest(f"{4 * scale} DPO pairs", tuple((200, (150, 90)) for _ in range(4 * scale))),
        Forest("image-heavy mix", images * scale),
        flat("one long", [4096 * scale if gpu else 2048]),
        flat("many short", [96 + 8 * (i % 8) for i in range(16 * scale)]),
        flat("equal lengths", [512 * scale] * 8),
    ]


def cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """Sections for this kind of device; tiny: the same with forests of a few tokens."""
    gpu = device.type == "cuda"
    heads = Heads(4, 2, 16) if tiny else GPU_HEADS if gpu else CPU_HEADS
    listed = []
    for forest in forests(gpu=gpu):
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and not gpu and forest.name not in ("512x128x8", "equal lengths"):
                continue
            for task in (FORWARD, TRAIN):
                values = {
                    "T": forest.num_tokens,
                    "H": heads.query,
                    "Hkv": heads.key,
                    "dtype": SHORT[dtype],
                    "task": task,
                }
                name = f"{forest.name} {SHORT[dtype]} {task}"
                listed.append(
                    Case(
                        name, values, partial(build, small(forest) if tiny else forest, heads, dtype, task == TRAIN), 7
                    )
                )
    dtype = torch.bfloat16 if gpu else torch.float32
    for shape in swept(gpu=gpu):
        forest = tree(**shape)
        letters = dict(zip("PRG", shape.values(), strict=True))
        values = {**letters, "dtype": SHORT[dtype], "task": TRAIN, "sweep": True}
        section = partial(build, small(forest) if tiny else forest, heads, dtype, True, only=SWEPT_ARMS)
        listed.append(Case(f"sweep {forest.name} {SHORT[dtype]} {TRAIN}", values, section, 5))
    return listed


def swept(*, gpu: bool) -> list[dict[str, int]]:
    """How the time goes with the group and with the prompt."""
    scale = 8 if gpu else 1
    over_group = [(512, 128, group) for group in (1, 2, 4, 8, 16)]
    over_prompt = [(prompt, 128, 8) for prompt in (64, 128, 256, 1024, 2048)]
    return [{"prompt": p * scale, "response": r * scale, "group": g} for p, r, g in over_group + over_prompt]


def small(forest: Forest) -> Forest:
    """The same shape with a few tokens."""
    trees = tuple((p // 100 + 1, tuple(r // 100 + 1 for r in rs[:3])) for p, rs in forest.trees[:3])
    return Forest(forest.name, trees)


def build(
    forest: Forest,
    heads: Heads,
    dtype: torch.dtype,
    training: bool,
    device: torch.device,
    *,
    only: tuple[str, ...] | None = None,
) -> Section:
    """A section; only: arms whose name begins with one of these."""
    problem = Problem.make(forest, heads, dtype, training, device)
    flop = 2 * forest.pairs * heads.query * heads.size
    products = 7 if training else 2
    arms = [
        arm if arm.run is None else Arm(**{**vars(arm), "bare": (PRODUCT,) * products})
        for arm in [*ours(problem), *peers(problem)]
        if only is None or arm.name.startswith(only)
    ]
    return Section(arms, {PRODUCT: dense_product(flop, dtype, device)}, exact=problem.exact, flop=products * flop)


def dense_product(flop: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """``torch.mm(out=)`` of a square result with inner size 512 and this many FLOP, to within a row."""
    inner = 512
    side = max(1, round((flop / (2 * inner)) ** 0.5))
    left, right = torch.randn(side, inner, device=device).to(dtype), torch.randn(inner, side, device=device).to(dtype)
    return partial(torch.mm, left, right, out=torch.empty(side, side, dtype=dtype, device=device))


def ours(problem: Problem) -> list[Arm]:
    """Every backend that runs here; the dense reference is left out."""

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        return packed_attention(query, key, value, problem.layout, backend=backend)

    device = problem.query.device
    here = backends("packed_attention", device)
    arms = []
    for name in ("native", "cascade", "triton", "chunked"):
        if name in here:
            arms.append(Arm(f"ours [{name}]", "specs_kernels", partial(problem.run, partial(attend, backend=name))))
        elif why := unavailable(name, device):
            arms.append(Arm.absent(f"ours [{name}]", "specs_kernels", why))
    return arms


def goals(device: torch.device) -> list[Goal]:
    """Against padding: 0.8 of what the visible pairs alone would give; flat rows may not lose to a batch. GPU: H100 class."""
    if device.type == "cuda":
        limits = {"4096x1024x8": (8.5, 11.0), "4096x256x8": (3.3, 5.0)}
        listed = []
        for name, (cascade, triton) in limits.items():
            listed += [
                Goal(f"{name} bf16 train", "ours [cascade]", "milliseconds", cascade),
                Goal(f"{name} bf16 train", "ours [triton]", "milliseconds", triton),
            ]
        # 350 TFLOP/s forward and 200 backward are 228 together.
        return [
            *listed,
            Goal("one long bf16 forward", "ours [triton]", "useful_tflops", 350.0, at_most=False),
            Goal("one long bf16 train", "ours [triton]", "useful_tflops", 228.0, at_most=False),
        ]
    faster = "times_faster_than:padded SDPA"
    listed = []
    for forest in (tree(512, 128, 8), tree(700, 90, 8)):
        row = forest.trees[0][0] + forest.trees[0][1][0]
        ratio = len(forest.trees[0][1]) * row * (row + 1) / 2 / forest.pairs
        listed.append(Goal(f"{forest.name} fp32 train", "ours [native]", faster, round(0.8 * ratio, 2), at_most=False))
    for task in (FORWARD, TRAIN):
        listed.append(Goal(f"equal lengths fp32 {task}", "ours [native]", faster, 0.95, at_most=False))
    return listed

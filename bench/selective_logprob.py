"""Sections of ``specs-fast bench selective_logprob``: from logits ``[N, V]`` that exist to log-probs, and back.

Tasks: "forward" (log-prob), "forward+entropy", "train" (mean negative log-prob, gradient of the logits) and "train+entropy".

The op reads the logits once in the forward, and once more in the backward, which writes their gradient. That is the useful
traffic; it is held against the bandwidth of a copy measured in the same rounds, whose bytes count both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.linear_logprob import ENTROPY, ENTROPY_WEIGHT, FORWARD, SHORT, TRAIN
from bench.section import Arm, Case, Goal, Section, importable, library, missing
from specs_kernels import selective_logprob
from specs_kernels.dispatch import backends, unavailable

WHAT = "log-probs from logits; tasks and useful traffic are described in bench/selective_logprob.py"
Scores = tuple[Tensor, Tensor | None]
CPU_SHAPES = [(512, 151_936), (16_384, 512)]
GPU_SHAPES = [(8192, 151_936), (16_384, 32_000)]
CPU_SWEEP = [*((n, 32_768) for n in (64, 512, 2048)), *((512, v) for v in (2048, 131_072))]
GPU_SWEEP = [*((n, 131_072) for n in (1024, 4096, 16_384)), *((8192, v) for v in (32_000, 131_072, 262_144))]


@dataclass(frozen=True)
class Problem:
    """Inputs of one section."""

    task: str
    logits: Tensor
    target: Tensor

    @property
    def entropy(self) -> bool:
        return self.task.endswith(ENTROPY)

    @property
    def training(self) -> bool:
        return self.task.startswith(TRAIN)

    @staticmethod
    def make(shape: tuple[int, int], dtype: torch.dtype, task: str, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.empty(shape, dtype=dtype, device=device).normal_(0, 2, generator=generator)
        target = torch.randint(shape[1], shape[:1], generator=generator, device=device)
        logits.scatter_add_(1, target[:, None], torch.linspace(0, 16, shape[0], device=device).to(dtype)[:, None])
        return Problem(task, logits.requires_grad_(task.startswith(TRAIN)), target)

    def run(self, function: Callable[[Problem], Scores]) -> dict[str, Tensor]:
        """Log-probs as they are, or the loss and the gradient of the logits."""
        with torch.set_grad_enabled(self.training):
            logp, entropy = function(self)
            if not self.training:
                return {"logp": logp} if entropy is None else {"logp": logp, "entropy": entropy}
            loss = -logp.mean() if entropy is None else -logp.mean() - ENTROPY_WEIGHT * entropy.mean()
            (grad,) = torch.autograd.grad(loss, [self.logits])
            return {"loss": loss.detach(), "d logits": grad}

    def exact(self) -> dict[str, Tensor]:
        """Plain PyTorch in fp64 from the same rounded logits, a few rows at a time."""
        rows = max(1, (1 << (31 if self.logits.is_cuda else 28)) // (8 * self.logits.shape[1]))
        pieces = zip(self.logits.detach().split(rows), self.target.split(rows), strict=True)
        parts = [self.exact_of(logits, target) for logits, target in pieces]
        whole = {name: [part[name] for part in parts] for name in parts[0]}
        return {name: sum(v) if name == "loss" else torch.cat(v) for name, v in whole.items()}  # type: ignore[misc]

    def exact_of(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Of some rows: their outputs, or their share of the loss and its gradient."""
        share = len(target) / len(self.target)
        part = Problem(self.task, logits.double().requires_grad_(self.training), target)
        outputs = part.run(lambda p: plain(p.logits, p.target, p.entropy))
        return {name: share * value if self.training else value for name, value in outputs.items()}


def plain(logits: Tensor, target: Tensor, entropy: bool) -> Scores:
    logp_NV = F.log_softmax(logits, 1)
    logp = logp_NV.gather(1, target[:, None]).squeeze(1)
    return logp, -(logp_NV.exp() * logp_NV).sum(1) if entropy else None


def eager(logits: Tensor, target: Tensor, entropy: bool, training: bool) -> Scores:
    """As trainers write it, statistics in fp32; the cheapest form for each task."""
    logits = logits.float()
    if entropy:
        return plain(logits, target, True)
    if training:
        return -F.cross_entropy(logits, target, reduction="none"), None
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1), None


def cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """Sections for this kind of device."""
    gpu = device.type == "cuda"
    tasks = (FORWARD, FORWARD + ENTROPY, TRAIN, TRAIN + ENTROPY)
    dtypes = (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16)
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    listed = [(shapes[0], dtype, task, False) for dtype in dtypes for task in tasks]
    listed += [(shape, dtypes[0], task, False) for shape in shapes[1:] for task in (FORWARD, TRAIN)]
    listed += [(shape, dtypes[0], TRAIN, True) for shape in (GPU_SWEEP if gpu else CPU_SWEEP)]
    return [case(*entry, tiny=tiny) for entry in listed]


def case(shape: tuple[int, int], dtype: torch.dtype, task: str, sweep: bool, *, tiny: bool) -> Case:
    num_tokens, vocab = shape
    name = f"{'sweep ' if sweep else ''}{num_tokens}x{vocab} {SHORT[dtype]} {task}"
    values: dict[str, Any] = {"N": num_tokens, "V": vocab, "dtype": SHORT[dtype], "task": task}
    if sweep:
        values["sweep"] = True
    size = (min(num_tokens, 48), min(vocab, 100)) if tiny else shape
    return Case(name, values, partial(build, size, dtype, task), 2 if tiny else 9)


def build(shape: tuple[int, int], dtype: torch.dtype, task: str, device: torch.device) -> Section:
    problem = Problem.make(shape, dtype, task, device)
    reads_and_writes = 3 if problem.training else 1
    moved = reads_and_writes * problem.logits.numel() * problem.logits.element_size()
    return Section([*eager_and_compiled(problem), *ours(problem), *peers(problem)], exact=problem.exact, moved=moved)


def eager_and_compiled(problem: Problem) -> list[Arm]:
    plain_form = partial(eager, entropy=problem.entropy, training=problem.training)
    lib = library("torch")

    @cache
    def compiled() -> Callable[[Tensor, Tensor], Scores]:
        return torch.compile(plain_form, dynamic=False, fullgraph=True)

    return [
        Arm("eager", lib, partial(problem.run, lambda p: plain_form(p.logits, p.target))),
        Arm("torch.compile", lib, partial(problem.run, lambda p: compiled()(p.logits, p.target))),
    ]


def ours(problem: Problem) -> list[Arm]:
    """Every backend that runs here; the dense reference is left out."""

    def call(p: Problem, backend: str) -> Scores:
        result = selective_logprob(p.logits, p.target, return_entropy=p.entropy, backend=backend)
        return result.logp, result.entropy

    device = problem.logits.device
    arms = [
        Arm(f"ours [{backend}]", "specs_kernels", partial(problem.run, partial(call, backend=backend)))
        for backend in backends("selective_logprob", device)
        if backend != "reference"
    ]
    absent = {name: unavailable(name, device) for name in ("native", "triton")}
    return arms + [Arm.absent(f"ours [{name}]", "specs_kernels", why) for name, why in absent.items() if why]


def peers(problem: Problem) -> list[Arm]:
    """TRL's function behind its trainers, and Liger's and QuACK's cross-entropy kernels."""
    return [*trl(problem), *liger(problem), *quack(problem)]


def trl(problem: Problem) -> list[Arm]:
    name, lib = "TRL selective log-softmax", library("trl")
    if not importable("trl"):
        return [Arm.absent(name, lib, missing("trl"))]

    def call(p: Problem) -> Scores:
        from trl.trainer import utils

        if p.entropy:  # TRL 1.16
            return utils.selective_log_softmax_and_entropy(p.logits, p.target)
        return utils.selective_log_softmax(p.logits, p.target), None

    return [Arm(name, lib, partial(problem.run, call))]


def liger(problem: Problem) -> list[Arm]:
    """Its cross-entropy writes the gradient over the logits; a copy keeps them for the next round and is timed with it."""
    name, lib = "Liger cross-entropy", library("liger-kernel")
    if problem.entropy:
        return []
    if not importable("liger_kernel"):
        return [Arm.absent(name, lib, missing("liger-kernel"))]
    if not problem.logits.is_cuda:
        return [Arm.absent(name, lib, "Triton kernels: needs a GPU")]

    def call(p: Problem) -> Scores:
        from liger_kernel.transformers.functional import liger_cross_entropy

        logits = p.logits.clone() if p.training else p.logits
        if p.training:
            return -liger_cross_entropy(logits, p.target, reduction="mean")[None], None
        return -liger_cross_entropy(logits, p.target, reduction="none"), None

    note = "gradient in place of the logits; timed with a copy that keeps them" if problem.training else ""
    return [Arm(name, lib, partial(problem.run, call), note=note)]


def quack(problem: Problem) -> list[Arm]:
    name, lib = "QuACK cross-entropy", library("quack-kernels")
    if problem.entropy:
        return []
    if not importable("quack"):
        return [Arm.absent(name, lib, missing("quack-kernels"))]
    if not problem.logits.is_cuda:
        return [Arm.absent(name, lib, "CuTe kernels: needs a GPU of sm_90 or newer")]

    def call(p: Problem) -> Scores:
        from quack.cross_entropy import cross_entropy

        return -cross_entropy(p.logits, p.target, reduction="none"), None

    return [Arm(name, lib, partial(problem.run, call))]


def goals(device: torch.device) -> list[Goal]:
    """What these sections are held to."""
    if device.type != "cuda":
        return []
    name = f"{'x'.join(map(str, GPU_SHAPES[0]))} bf16"
    return [
        Goal(f"{name} {task}", "ours [triton]", "of_copy_bandwidth", 0.8, at_most=False)
        for task in (FORWARD, FORWARD + ENTROPY)
    ]

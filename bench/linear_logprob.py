"""Sections of ``specs-fast bench linear_logprob``: from hidden states ``[N, D]`` and a head ``[V, D]`` to log-probs, and back.

Tasks, the same for every arm of a section:

* forward, forward+entropy: per-token log-prob (and entropy), no gradients. Needs 2NDV FLOP.
* train: mean negative log-prob, gradients of hidden and weight. Needs 6NDV.
* train+entropy: the same minus 0.01 times the mean entropy, through which gradients pass.
* frozen: mean negative log-prob, gradient of hidden only. Needs 4NDV.
* half dead: log-probs weighted per token, half of the weights 0; gradients of hidden and weight. Needs 4NDV.

Bare parts are the GEMMs alone, ``torch.mm(out=)`` into memory that is there: "scores" hidden @ weight.T, "d hidden" and
"d weight", where tokens are dead also those of half of the rows. An arm's time is held against as many of each as its
arithmetic has.

Logits have standard deviation 2, and the target's is raised by up to 16, so that its probability runs from about 1e-6 to 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.section import Arm, Case, Goal, Section
from specs_kernels import linear_logprob, linear_loss
from specs_kernels.dispatch import backends, choose, unavailable

WHAT = "log-probs from hidden states; tasks and bare parts are described in bench/linear_logprob.py"
FORWARD, TRAIN, FROZEN, DEAD = "forward", "train", "frozen", "half dead"
ENTROPY = "+entropy"
ENTROPY_WEIGHT = 0.01
FLOP = {FORWARD: 2, TRAIN: 6, FROZEN: 4, DEAD: 4}
SCORES, D_HIDDEN, D_WEIGHT = "scores", "d hidden", "d weight"
THREE, FOUR = (SCORES, D_HIDDEN, D_WEIGHT), (SCORES, SCORES, D_HIDDEN, D_WEIGHT)
UNSWEPT = ("CCE torch_compile", "Liger chunked")
"""Left out of the sweeps: the torch.compile arm by another name, and the slower of two functions."""
HALF = "half of "
LIVE = (SCORES, HALF + SCORES, HALF + D_HIDDEN, HALF + D_WEIGHT)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}

QWEN, MIDDLE, LAB = (512, 896, 151_936), (512, 896, 32_768), (16_384, 192, 512)
CPU_SWEEP = [*((n, 896, 32_768) for n in (64, 256, 2048)), *((512, 896, v) for v in (2048, 8192, 32_768, 131_072))]
LARGE, TRL_SHAPE = (16_384, 4096, 131_072), (8192, 4096, 151_936)
GPU_SWEEP = [
    *((n, 4096, 131_072) for n in (1024, 4096, 32_768)),
    *((8192, 4096, v) for v in (32_000, 131_072, 262_144)),
]


@dataclass(frozen=True)
class Problem:
    """Inputs of one section. weight_N: what every token's negative log-prob counts in the loss."""

    task: str
    hidden: Tensor
    weight: Tensor
    target: Tensor
    weight_N: Tensor

    @property
    def entropy(self) -> bool:
        return self.task.endswith(ENTROPY)

    @property
    def kind(self) -> str:
        return self.task.removesuffix(ENTROPY)

    @property
    def grads(self) -> dict[str, Tensor]:
        """The inputs that get a gradient, by the name of the result."""
        wanted = {FORWARD: {}, FROZEN: {"d hidden": self.hidden}}
        return wanted.get(self.kind, {"d hidden": self.hidden, "d weight": self.weight})

    @staticmethod
    def make(shape: tuple[int, int, int], dtype: torch.dtype, task: str, device: torch.device) -> Problem:
        num_tokens, dim, vocab = shape
        generator = torch.Generator(device).manual_seed(0)
        new = partial(torch.randn, generator=generator, device=device)
        weight = (new(vocab, dim) * dim**-0.5).to(dtype)
        target = torch.randint(vocab, (num_tokens,), generator=generator, device=device)
        boost = 16 * torch.rand(num_tokens, 1, generator=generator, device=device)
        hidden = (2 * new(num_tokens, dim) + boost * weight[target].float()).to(dtype)
        weight_N = torch.full((num_tokens,), 1 / num_tokens, device=device)
        if task.startswith(DEAD):
            weight_N[torch.randperm(num_tokens, generator=generator, device=device)[: num_tokens // 2]] = 0
        problem = Problem(task, hidden, weight, target, weight_N)
        for tensor in problem.grads.values():
            tensor.requires_grad_()
        return problem

    def finish(self, logp: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
        """Outputs of a per-token arm: log-probs as they are, or the loss and its gradients."""
        if self.kind == FORWARD:
            return {"logp": logp} if entropy is None else {"logp": logp, "entropy": entropy}
        return self.backward(self.loss(logp, entropy))

    def loss(self, logp: Tensor, entropy: Tensor | None, index: Tensor | slice = slice(None)) -> Tensor:
        weight_N = self.weight_N[index]
        loss = -(weight_N * logp).sum()
        return loss if entropy is None else loss - ENTROPY_WEIGHT * (weight_N * entropy).sum()

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.grads.values()))
        return {"loss": loss.detach(), **dict(zip(self.grads, grads, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """Plain PyTorch in fp64 from the same rounded inputs, a few rows at a time."""
        weight = self.weight.detach().double().requires_grad_(self.kind in (TRAIN, DEAD))
        parts: dict[str, list[Tensor]] = {}
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        rows = max(1, (1 << (31 if weight.is_cuda else 27)) // (8 * weight.shape[0]))
        for index in torch.arange(len(self.target), device=weight.device).split(rows):
            hidden = self.hidden.detach()[index].double().requires_grad_(self.kind != FORWARD)
            logp_RV = F.log_softmax(hidden @ weight.T, -1)
            logp = logp_RV.gather(1, self.target[index, None]).squeeze(1)
            entropy = -(logp_RV.exp() * logp_RV).sum(1) if self.entropy else None
            del logp_RV
            if self.kind == FORWARD:
                parts.setdefault("logp", []).append(logp)
                if entropy is not None:
                    parts.setdefault("entropy", []).append(entropy)
                continue
            part = self.loss(logp, entropy, index)
            part.backward()
            loss += part.detach()
            assert hidden.grad is not None
            parts.setdefault("d hidden", []).append(hidden.grad)
        outputs = {name: torch.cat(pieces) for name, pieces in parts.items()}
        if self.kind != FORWARD:
            outputs["loss"] = loss
        return outputs if weight.grad is None else {**outputs, "d weight": weight.grad}


def cases(device: torch.device, *, tiny: bool = False) -> list[Case]:
    """Sections for this kind of device."""
    gpu = device.type == "cuda"
    bf16, fp32 = torch.bfloat16, torch.float32
    if gpu:
        tasks = (FORWARD, FORWARD + ENTROPY, TRAIN, TRAIN + ENTROPY, FROZEN, DEAD)
        listed = [case(LARGE, bf16, task) for task in tasks] + [case(TRL_SHAPE, bf16, TRAIN)]
        listed.append(case(LAB, bf16, TRAIN, rounds=20))
    else:
        listed = [case(QWEN, fp32, task, rounds=5) for task in (FORWARD, FORWARD + ENTROPY, TRAIN, FROZEN)]
        listed += [case(QWEN, bf16, task, rounds=5) for task in (FORWARD, TRAIN, FROZEN)]
        listed += [case(MIDDLE, fp32, task, rounds=5) for task in (TRAIN + ENTROPY, DEAD)]
        listed.append(case(LAB, fp32, TRAIN, rounds=20))
    listed += [
        case(shape, bf16 if gpu else fp32, TRAIN, rounds=5, sweep=True) for shape in (GPU_SWEEP if gpu else CPU_SWEEP)
    ]
    return [reduced(entry) for entry in listed] if tiny else listed


def case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    task: str,
    *,
    rounds: int = 7,
    sweep: bool = False,
    tiny: bool = False,
) -> Case:
    """One section. sweep: few arms, for the plot."""
    num_tokens, dim, vocab = shape
    name = f"{'sweep ' if sweep else ''}{num_tokens}x{dim}x{vocab} {SHORT[dtype]} {task}"
    values: dict[str, Any] = {"N": num_tokens, "D": dim, "V": vocab, "dtype": SHORT[dtype], "task": task}
    if sweep:
        values["sweep"] = True
    size = (min(num_tokens, 48), min(dim, 16), min(vocab, 100)) if tiny else shape
    return Case(name, values, partial(build, size, dtype, task, sweep), 2 if tiny else rounds)


def reduced(entry: Case) -> Case:
    """The same section at a tiny size, named as it is."""
    shape = entry.shape
    dtype = next(key for key, name in SHORT.items() if name == shape["dtype"])
    return case((shape["N"], shape["D"], shape["V"]), dtype, shape["task"], sweep="sweep" in shape, tiny=True)


def build(shape: tuple[int, int, int], dtype: torch.dtype, task: str, sweep: bool, device: torch.device) -> Section:
    from bench.linear_logprob_peers import eager_and_compiled, peers

    problem = Problem.make(shape, dtype, task, device)
    num_tokens, dim, vocab = shape
    names = backends("linear_logprob", device)
    if sweep and device.type == "cpu":
        names = (choose("linear_logprob", device=device).backend,)
    arms = [*eager_and_compiled(problem), *ours(problem, names), *peers(problem)]
    if sweep:
        arms = [arm for arm in arms if arm.run is not None and not arm.name.startswith(UNSWEPT)]
    size = dtype.itemsize
    moved = size * (num_tokens * dim + vocab * dim) * (1 if task.startswith(FORWARD) else 2)
    if problem.kind == FROZEN:
        moved -= size * vocab * dim
    return Section(arms, bare_gemms(problem), problem.exact, FLOP[problem.kind] * num_tokens * dim * vocab, moved)


def bare_gemms(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The GEMMs of the task alone, into memory that exists."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    scores = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    parts: dict[str, Callable[[], Any]] = {}
    for prefix, rows in (("", len(hidden)), (HALF, len(hidden) // 2)) if problem.kind == DEAD else (("", len(hidden)),):
        x, g = hidden[:rows], scores[:rows]
        parts[prefix + SCORES] = partial(torch.mm, x, weight.T, out=g)
        if "d hidden" in problem.grads:
            parts[prefix + D_HIDDEN] = partial(torch.mm, g, weight, out=torch.empty_like(x))
        if "d weight" in problem.grads:
            parts[prefix + D_WEIGHT] = partial(torch.mm, g.T, x, out=torch.empty_like(weight))
    return parts


def ours(problem: Problem, names: Sequence[str]) -> list[Arm]:
    """Every mode that serves the task, with these backends; the dense reference is left out."""
    arms = []
    for backend in names:
        if backend == "reference":
            continue
        for name, options, bare in modes(problem):
            run = partial(one_of_ours, problem, backend, options)
            arms.append(Arm(f"ours {name} [{backend}]", "specs_kernels", run, bare=bare))
        if problem.kind in (TRAIN, DEAD):
            run = partial(our_linear_loss, problem, backend)
            arms.append(Arm(f"ours linear_loss [{backend}]", "specs_kernels", run, bare=THREE))
    for backend in ("native", "triton"):
        reason = unavailable(backend, problem.hidden.device)
        if reason is not None:
            arms.append(Arm.absent(f"ours [{backend}]", "specs_kernels", reason))
    return arms


def modes(problem: Problem) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, arguments and bare parts of every mode that serves the task."""
    if problem.kind == FORWARD:
        return [("forward", {"mode": "forward"}, (SCORES,))]
    recompute = ("recompute", {"mode": "recompute"}, FOUR)
    if problem.kind == FROZEN:
        return [("frozen", {"mode": "frozen"}, (SCORES, D_HIDDEN))]
    if problem.kind == DEAD:
        return [recompute, ("compact", {"mode": "recompute", "compact": True}, LIVE)]
    scores_bytes = problem.hidden.shape[0] * problem.weight.shape[0] * problem.hidden.element_size()
    return [recompute, ("full cache", {"logit_cache_bytes": scores_bytes}, THREE)]


def one_of_ours(problem: Problem, backend: str, options: dict[str, Any]) -> dict[str, Tensor]:
    with torch.set_grad_enabled(problem.kind != FORWARD):
        result = linear_logprob(
            problem.hidden, problem.weight, problem.target, return_entropy=problem.entropy, backend=backend, **options
        )
        return problem.finish(result.logp, result.entropy)


def our_linear_loss(problem: Problem, backend: str) -> dict[str, Tensor]:
    def loss_fn(logp: Tensor, entropy: Tensor | None, lse: Tensor, index: Tensor) -> Tensor:
        return problem.loss(logp, entropy if problem.entropy else None, index)

    loss, _, _ = linear_loss(
        problem.hidden, problem.weight, problem.target, loss_fn, return_entropy=problem.entropy, backend=backend
    )
    return problem.backward(loss)


def goals(device: torch.device) -> list[Goal]:
    """What these sections are held to."""
    if device.type == "cuda":
        return gpu_goals()
    best = "native"
    wanted = []
    for dtype in ("fp32", "bf16"):
        name = f"512x896x151936 {dtype}"
        wanted += [
            Goal(f"{name} forward", f"ours forward [{best}]", "times_bare", 1.10),
            Goal(f"{name} train", f"ours recompute [{best}]", "times_bare", 1.10),
            Goal(f"{name} train", f"ours recompute [{best}]", "memory_of:eager", 0.20),
            Goal(f"{name} train", f"ours linear_loss [{best}]", "times_bare", 1.20),
            Goal(f"{name} train", f"ours linear_loss [{best}]", "memory_of:eager", 0.35),
            Goal(f"{name} train", f"ours full cache [{best}]", "times_bare", 1.10),
            Goal(f"{name} frozen", f"ours frozen [{best}]", "times_bare", 1.12),
        ]
    lab = f"{'x'.join(map(str, LAB))} fp32 train"
    return [*wanted, Goal(lab, f"ours full cache [{best}]", "times_faster_than:eager", 1.5, at_most=False)]


def gpu_goals() -> list[Goal]:
    large, trl = "16384x4096x131072 bf16", "8192x4096x151936 bf16 train"
    listed = [
        (f"{large} forward+entropy", "ours forward", 28.0),
        (f"{large} train", "ours recompute", 110.0),
        (f"{large} train", "ours full cache", 88.0),
        (f"{large} train", "ours linear_loss", 78.0),
        (f"{large} frozen", "ours frozen", 60.0),
        (f"{large} half dead", "ours compact", 70.0),
        (trl, "ours recompute", 60.0),
        (trl, "ours linear_loss", 52.0),
    ]
    return [Goal(name, f"{arm} [triton]", "milliseconds", bound) for name, arm, bound in listed]

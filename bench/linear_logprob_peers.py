"""Arms of ``bench.linear_logprob`` that are not ours: plain PyTorch, and other libraries where they are installed and run.

What is held against ours is each library's own function with its defaults, called as its documentation says. A library that
computes cross-entropy only takes part in the tasks that are cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.linear_logprob import D_HIDDEN, FORWARD, FOUR, FROZEN, SCORES, THREE, TRAIN, Problem
from bench.section import Arm, importable, library, missing

PerToken = Callable[[Problem], tuple[Tensor, Tensor | None]]
Loss = Callable[[Problem], Tensor]
NEEDS_GPU = "Triton kernels: needs a GPU"


def bare_parts(problem: Problem, scored_twice: bool) -> tuple[str, ...]:
    """Of an arm that forms every gradient that is asked for, and scores once or twice."""
    if problem.kind == FORWARD:
        return (SCORES,)
    if problem.kind == FROZEN:
        return (SCORES, SCORES, D_HIDDEN) if scored_twice else (SCORES, D_HIDDEN)
    return FOUR if scored_twice else THREE


def per_token(problem: Problem, function: PerToken) -> dict[str, Tensor]:
    with torch.set_grad_enabled(problem.kind != FORWARD):
        return problem.finish(*function(problem))


def by_loss(problem: Problem, function: Loss) -> dict[str, Tensor]:
    return problem.backward(function(problem))


def eager_and_compiled(problem: Problem) -> list[Arm]:
    """``F.linear`` and fp32 softmax statistics, as trainers write it, and the same through ``torch.compile``."""
    plain = partial(forward_plain if problem.kind == FORWARD else train_plain, entropy=problem.entropy)

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(plain, dynamic=False, fullgraph=True)

    def arm(name: str, function: Callable[..., Any]) -> Arm:
        run = partial(per_token, problem, lambda p: function(p.hidden, p.weight, p.target))
        return Arm(name, library("torch"), run, bare=bare_parts(problem, scored_twice=False))

    return [arm("eager", plain), arm("torch.compile", lambda *arguments: compiled()(*arguments))]


def forward_plain(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight).float()
    if entropy:
        return train_plain(hidden, weight, target, True)
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1), None


def train_plain(hidden: Tensor, weight: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight).float()
    if not entropy:
        return -F.cross_entropy(logits, target, reduction="none"), None
    logp = F.log_softmax(logits, 1)
    return logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def peers(problem: Problem) -> list[Arm]:
    """Other libraries, present or not."""
    return [*torch_core(problem), *liger(problem), *trl(problem), *cce(problem), *quack(problem)]


def cross_entropy_only(problem: Problem) -> bool:
    return not problem.entropy and problem.kind in (FORWARD, TRAIN, FROZEN)


def torch_core(problem: Problem) -> list[Arm]:
    """``F.linear_cross_entropy`` in chunks; without ``options`` it is the eager arm by another name."""
    name = "F.linear_cross_entropy"
    if not cross_entropy_only(problem):
        return []
    if not hasattr(F, "linear_cross_entropy"):
        return [Arm.absent(name, library("torch"), f"needs torch >= 2.13; here is {torch.__version__}")]
    options = torch.nn.LinearCrossEntropyOptions()

    def call(p: Problem, reduction: str) -> Tensor:
        return F.linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction, options=options)

    run = cross_entropy_run(problem, call)
    return [
        Arm(name, library("torch"), run, bare=bare_parts(problem, False), note="options=LinearCrossEntropyOptions()")
    ]


def cross_entropy_run(problem: Problem, call: Callable[[Problem, str], Tensor]) -> Callable[[], dict[str, Tensor]]:
    """From a function of (problem, reduction): per-token without gradients, the mean with."""
    if problem.kind == FORWARD:
        return partial(per_token, problem, lambda p: (-call(p, "none"), None))
    return partial(by_loss, problem, lambda p: call(p, "mean"))


def liger(problem: Problem) -> list[Arm]:
    """Its cross-entropy (Triton), its per-token function (CuTe kernel on sm_90, else PyTorch in chunks of 512 tokens), and the
    log-probs inside its chunked losses."""
    lib = library("liger-kernel")
    names = ["Liger fused linear CE", "Liger scaled CE", "Liger chunked log-probs"]
    if not importable("liger_kernel"):
        return [Arm.absent(name, lib, missing("liger-kernel")) for name in names]

    def scaled(p: Problem) -> tuple[Tensor, Tensor | None]:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        result = LigerFusedLinearScaledCrossEntropyFunction.apply(
            p.hidden, p.weight, p.target, return_entropy=p.entropy
        )
        nll, entropy = result if p.entropy else (result, None)
        return -nll, entropy

    def chunked(p: Problem) -> tuple[Tensor, Tensor | None]:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

        return _ChunkedSelectiveLogProbFunction.apply(p.hidden, p.weight, p.target, None, 1.0, 4096), None

    bare = bare_parts(problem, scored_twice=True)
    sm90 = problem.hidden.is_cuda and torch.cuda.get_device_capability(problem.hidden.device) == (9, 0)
    note = "its sm_90 kernel" if sm90 else "its PyTorch path, 512 tokens at a time"
    arms = [liger_fused(problem, names[0], lib)] if cross_entropy_only(problem) else []
    arms.append(Arm(names[1], lib, partial(per_token, problem, scaled), bare=bare, note=note))
    if not problem.entropy:
        arms.append(Arm(names[2], lib, partial(per_token, problem, chunked), bare=bare))
    return arms


def liger_fused(problem: Problem, name: str, lib: str) -> Arm:
    if not problem.hidden.is_cuda:
        return Arm.absent(name, lib, NEEDS_GPU)

    def call(p: Problem, reduction: str) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        result = LigerFusedLinearCrossEntropyFunction.apply(
            p.hidden, p.weight, p.target, None, None, -100, 0.0, 0.0, reduction
        )
        return result[0] if isinstance(result, tuple) else result

    return Arm(name, lib, cross_entropy_run(problem, call), bare=bare_parts(problem, scored_twice=False))


def trl(problem: Problem) -> list[Arm]:
    """The function behind its trainers' log-probs; its fp32 accumulators and chunk of 32768 columns."""
    name, lib = "TRL chunked log-probs", library("trl")
    if not importable("trl"):
        return [Arm.absent(name, lib, missing("trl"))]
    outputs = ("entropy",) if problem.entropy else ()

    def call(p: Problem) -> tuple[Tensor, Tensor | None]:
        from trl.kernels import ChunkedLogProbFunction  # TRL 1.16

        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.target, 1.0, 32768, None, 1.0, outputs
        )
        return logp, entropy

    return [Arm(name, lib, partial(per_token, problem, call), bare=bare_parts(problem, scored_twice=True))]


def cce(problem: Problem) -> list[Arm]:
    """Apple's Cut Cross-Entropy: on a GPU with and without its gradient filter, elsewhere its ``torch.compile`` path."""
    lib = library("cut-cross-entropy")
    if not cross_entropy_only(problem):
        return []
    if not importable("cut_cross_entropy"):
        return [Arm.absent("CCE", lib, missing("cut-cross-entropy"))]

    def arm(name: str, note: str, twice: bool, **options: Any) -> Arm:
        def call(p: Problem, reduction: str) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction, **options)

        return Arm(name, lib, cross_entropy_run(problem, call), bare=bare_parts(problem, twice), note=note)

    if not problem.hidden.is_cuda:
        return [
            arm(
                "CCE torch_compile",
                "its kernels need a GPU; this is its torch.compile path",
                False,
                impl="torch_compile",
            )
        ]
    filtered = "leaves out gradients below a threshold"
    return [arm("CCE", filtered, True), arm("CCE unfiltered", "filter_eps=None", True, filter_eps=None)]


def quack(problem: Problem) -> list[Arm]:
    """QuACK's chunked linear cross-entropy."""
    name, lib = "QuACK", library("quack-kernels")
    if not cross_entropy_only(problem) or problem.kind == FORWARD:
        return []
    if not importable("quack"):
        return [Arm.absent(name, lib, missing("quack-kernels"))]
    if not problem.hidden.is_cuda:
        return [Arm.absent(name, lib, "CuTe kernels: needs a GPU of sm_90 or newer")]

    def call(p: Problem) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(p.hidden, p.weight, p.target)

    return [Arm(name, lib, partial(by_loss, problem, call), bare=bare_parts(problem, scored_twice=False))]

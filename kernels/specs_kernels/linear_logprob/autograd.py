"""Forward and backward of ``linear_logprob`` around the loops, and the autograd function that eager calls use.

Letters: N targets, M targets that are worked on, T rows of hidden, D hidden size, V vocabulary, K rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.linear_logprob.backends import row_pass
from specs_kernels.linear_logprob.backward import Gradients, backward_tiles
from specs_kernels.linear_logprob.forward import (
    Cache,
    FrozenVectors,
    Statistics,
    forward_statistics,
    frozen_backward,
    frozen_forward,
)
from specs_kernels.linear_logprob.head import Head, Rows, tiling
from specs_kernels.linear_logprob.row_pass import RowGradients, RowState
from specs_kernels.linear_logprob.targets import Targets, find_targets, scatter_rows
from specs_kernels.tracing import without_autocast


class Inputs(NamedTuple):
    """The tensors of a call. bias ``[V]``, lora_A ``[K, D]``, lora_B ``[V, K]``, rows ``[N]``: None when absent."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    target: Tensor
    temperature: Tensor | None
    rows: Tensor | None


class Options(NamedTuple):
    """Everything of a call that is not a tensor. entropy: wanted; entropy_grad: and it passes a gradient."""

    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    entropy: bool
    entropy_grad: bool
    mode: str
    cached_rows: int
    full_precision: bool
    compact: bool
    validate: bool
    partial: bool
    backend: str


class Saved(NamedTuple):
    """What the backward needs beyond the inputs, in M."""

    targets: Targets
    statistics: Statistics
    cache: Cache | None
    vectors: FrozenVectors | None


def head_for(inputs: Inputs, options: Options, targets: Targets) -> Head:
    return Head.make(
        inputs.weight,
        inputs.bias,
        inputs.lora_A,
        inputs.lora_B,
        targets.temperature,
        options.softcap,
        options.logit_scale,
    )


def targets_of(inputs: Inputs, options: Options) -> Targets:
    """The call's targets. With ``validate`` this is where values are read and refused."""
    if options.validate:
        checks.check_bias_under_softcap(inputs.bias, options.softcap)
    return find_targets(
        inputs.target,
        inputs.rows,
        options.temperature if inputs.temperature is None else inputs.temperature,
        options.ignore_index,
        inputs.hidden.shape[0],
        inputs.weight.shape[0],
        options.validate,
        options.partial,
    )


def cache_dtype(options: Options, hidden: Tensor, head: Head) -> torch.dtype:
    return head.dtype if options.full_precision else hidden.dtype


def forward(
    inputs: Inputs, options: Options, room: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor | None, Tensor], Saved]:
    """logp, entropy and lse ``[N]``, and what the backward needs. room: where to put the cache; None: new memory."""
    targets = targets_of(inputs, options)
    head = head_for(inputs, options, targets)
    tiles = tiling(inputs.hidden.device, head.vocab_size, head.dtype)
    rows = Rows(targets.hidden(inputs.hidden), head, tiles.row_block)
    sweeps = row_pass(options.backend)
    cache, vectors = None, None
    if options.mode == "frozen":
        statistics, vectors = frozen_forward(
            head, rows, targets.target_M, tiles, sweeps, options.entropy, options.entropy_grad, inputs.hidden.dtype
        )
    else:
        cached = min(options.cached_rows, rows.count)
        if cached and cached < rows.count:
            cached = cached // tiles.row_block * tiles.row_block
        if cached:
            cache = Cache.empty(cached, head, tiles, cache_dtype(options, inputs.hidden, head), room)
        statistics = forward_statistics(head, rows, targets.target_M, tiles, sweeps, options.entropy, cache)
    num_targets = inputs.target.shape[0]
    entropy = statistics.entropy
    outputs = (
        targets.spread(statistics.logp, num_targets),
        None if entropy is None else targets.spread(entropy, num_targets),
        targets.spread(statistics.lse, num_targets),
    )
    return outputs, Saved(targets, statistics, cache, vectors)


class Wanted(NamedTuple):
    """Which inputs get a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool


def backward(
    inputs: Inputs, options: Options, saved: Saved, grads_N: tuple[Tensor | None, ...], wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias, lora_A and lora_B; None where not wanted."""
    targets, statistics = saved.targets, saved.statistics
    head = head_for(inputs, options, targets)
    grad_logp, grad_entropy, grad_lse = (targets.pick(grad) for grad in grads_N)
    if saved.vectors is not None:
        dhidden_MD = frozen_backward(
            head, statistics, saved.vectors, targets.target_M, (grad_logp, grad_entropy, grad_lse)
        )
        if targets.good_N is not None:
            dhidden_MD = torch.where(targets.good_N[:, None], dhidden_MD, 0.0)
        return (targets.scatter_hidden(dhidden_MD, inputs.hidden), None, None, None, None)
    gradients_M = statistics.gradients(grad_logp, grad_entropy, grad_lse)
    target_M, source_M, cache, cache_rows = targets.target_M, targets.source_M, saved.cache, None
    hidden_MD = targets.hidden(inputs.hidden)
    tiles = tiling(inputs.hidden.device, head.vocab_size, head.dtype)
    if options.compact:
        live = live_rows(gradients_M, grad_lse)
        if live.shape[0] < target_M.shape[0]:
            gradients_M = pick_gradients(gradients_M, live)
            head, target_M, hidden_MD = head.subset(live), target_M[live], hidden_MD[live]
            source_M = live if source_M is None else source_M[live]
            if cache is not None:
                cached = int((live < cache.rows).sum())
                if cached < live.shape[0]:  # those that follow are scored in blocks, and start one
                    cached = cached // tiles.row_block * tiles.row_block
                cache_rows = live[:cached]
    rows = Rows(hidden_MD, head, tiles.row_block)
    into = Gradients(
        hidden_MD.new_zeros(hidden_MD.shape, dtype=head.dtype) if wanted.hidden else None,
        torch.empty_like(inputs.weight) if wanted.weight else None,
        torch.empty_like(inputs.bias) if wanted.bias and inputs.bias is not None else None,
        torch.empty_like(inputs.lora_A) if wanted.lora_A and inputs.lora_A is not None else None,
        torch.empty_like(inputs.lora_B) if wanted.lora_B and inputs.lora_B is not None else None,
    )
    backward_tiles(head, rows, target_M, gradients_M, into, tiles, row_pass(options.backend), cache, cache_rows)
    grad_hidden = None
    if into.hidden_MD is not None:
        grad_hidden = scatter_rows(into.hidden_MD, source_M, inputs.hidden)
    return grad_hidden, into.weight, into.bias, into.lora_A, into.lora_B


def live_rows(gradients_M: RowGradients, grad_lse: Tensor | None) -> Tensor:
    """Indices of the rows with an upstream gradient that is not 0; waits for the device."""
    live = gradients_M.base != 0
    for grad in (gradients_M.target, gradients_M.entropy, grad_lse):
        if grad is not None:
            live = live | (grad != 0)
    return live.nonzero().squeeze(1)


def pick_gradients(gradients_M: RowGradients, index: Tensor) -> RowGradients:
    return RowGradients(
        gradients_M.maximum[index],
        gradients_M.log_total[index],
        gradients_M.base[index],
        None if gradients_M.entropy is None else gradients_M.entropy[index],
        None if gradients_M.target is None else gradients_M.target[index],
    )


class LinearLogprob(torch.autograd.Function):
    """Eager path. Same forward and backward as the registered operator, without the dispatcher's share of the cost."""

    @staticmethod
    def forward(ctx: Any, options: Options, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        given = Inputs(*inputs)  # type: ignore[arg-type]
        outputs, saved = forward(given, options)
        targets, statistics, cache, vectors = saved
        ctx.set_materialize_grads(False)
        if options.entropy and not options.entropy_grad:
            ctx.mark_non_differentiable(outputs[1])
        ctx.options, ctx.temperature = options, targets.temperature
        ctx.cache_rows = 0 if cache is None else cache.rows
        ctx.num_offsets = 0 if cache is None else len(cache.offsets)
        ctx.save_for_backward(
            *given,
            targets.target_M,
            targets.temperature if isinstance(targets.temperature, Tensor) else None,
            targets.source_M,
            targets.kept_M,
            targets.good_N,
            statistics.state.maximum,
            statistics.state.target,
            statistics.log_total,
            statistics.mean,
            None if vectors is None else vectors.of_logp,
            None if vectors is None else vectors.of_entropy,
            None if cache is None else cache.scores,
            *([] if cache is None else cache.offsets),
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.refuse_second_derivative("linear_logprob")
        if all(grad is None for grad in grads):
            return (None,) * 9
        saved = ctx.saved_tensors
        inputs = Inputs(*saved[:8])
        target_M, temperature, source_M, kept_M, good_N, maximum, target, log_total, mean = saved[8:17]
        of_logp, of_entropy, scores, *offsets = saved[17:]
        targets = Targets(
            target_M, ctx.options.temperature if temperature is None else temperature, source_M, kept_M, good_N, good_N
        )
        statistics = Statistics(RowState(maximum, maximum, None, target), log_total, mean)
        cache = None if scores is None else Cache(scores, list(offsets), ctx.cache_rows)
        vectors = None if of_logp is None else FrozenVectors(of_logp, of_entropy)
        with without_autocast(inputs.hidden.device):
            results = backward(
                inputs,
                ctx.options,
                Saved(targets, statistics, cache, vectors),
                grads,
                Wanted(*ctx.needs_input_grad[1:6]),
            )
        return (None, *results, None, None, None)

"""``specs_kernels::linear_logprob`` and its backward as PyTorch operators: what ``torch.compile``, fake tensors and export see.

Eager calls on plain tensors go through ``autograd.LinearLogprob`` instead, which does the same without the dispatcher's share
of the cost. Shapes of all outputs follow from the shapes of the inputs: everything per target is ``[N]``, whatever is ignored.

Letters: N targets, D hidden size, V vocabulary, P rows of the cache (padded to whole blocks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specs_kernels import checks
from specs_kernels.dispatch import choose
from specs_kernels.linear_logprob.autograd import Inputs, Options, Saved, Wanted, backward, forward, targets_of
from specs_kernels.linear_logprob.backends import keeps_products, offset_tiles
from specs_kernels.linear_logprob.forward import Cache, FrozenVectors, Statistics
from specs_kernels.linear_logprob.head import Tiling, tiling
from specs_kernels.linear_logprob.row_pass import RowState
from specs_kernels.linear_logprob.targets import Targets
from specs_kernels.softmax import accumulation_dtype

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor target, Tensor? temperatures, "
    "Tensor? rows"
)
_OPTIONS = (
    "float temperature, float? softcap, float logit_scale, int ignore_index, bool entropy, bool entropy_grad, str mode, "
    "SymInt cached_rows, bool full_precision, bool validate, bool partial, str backend"
)
_STATE = (
    "Tensor maximum, Tensor log_total, Tensor mean, Tensor target_score, Tensor scores, Tensor offsets, Tensor of_logp, "
    "Tensor of_entropy"
)
_NUM_INPUTS, _NUM_OPTIONS, _NUM_OUTPUTS = 8, 12, 11

LIBRARY = torch.library.Library("specs_kernels", "FRAGMENT")
LIBRARY.define(f"linear_logprob({_INPUTS}, {_OPTIONS}) -> (Tensor logp, Tensor entropy, Tensor lse, {_STATE})")
LIBRARY.define(
    f"linear_logprob_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, {_INPUTS}, {_OPTIONS}, {_STATE}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def arguments(inputs: Inputs, options: Options) -> tuple[Any, ...]:
    """The operator's arguments: those of ``Options`` but ``compact``, which needs the host."""
    return (*inputs, *(value for name, value in options._asdict().items() if name != "compact"))


def _split(args: tuple[Any, ...]) -> tuple[Inputs, Options]:
    inputs, values = Inputs(*args[:_NUM_INPUTS]), list(args[_NUM_INPUTS:])
    names = [name for name in Options._fields if name != "compact"]
    options = Options(**dict(zip(names, values, strict=True)), compact=False)
    return inputs, options._replace(backend=choose("linear_logprob", options.backend, inputs.hidden.device).backend)


def _cache_shape(inputs: Inputs, options: Options) -> tuple[int, int, Tiling]:
    """Padded rows of the cache, tiles of columns."""
    tiles = tiling(inputs.hidden.device, inputs.weight.shape[0], accumulation_dtype(inputs.hidden.dtype))
    blocks = (options.cached_rows + tiles.row_block - 1) // tiles.row_block
    return blocks * tiles.row_block, offset_tiles(options.backend, inputs.weight.shape[0], tiles), tiles


def _keeps_products(inputs: Inputs, options: Options) -> bool:
    same = options.full_precision or inputs.hidden.dtype == accumulation_dtype(inputs.hidden.dtype)
    return keeps_products(options.backend, same)


def _shapes(inputs: Inputs, options: Options) -> list[Tensor]:
    """Empty tensors of the outputs' shapes and dtypes."""
    hidden, vocab_size, num_targets = inputs.hidden, inputs.weight.shape[0], inputs.target.shape[0]
    dtype = accumulation_dtype(hidden.dtype)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=kind)

    padded, num_tiles, _ = _cache_shape(inputs, options)
    offsets = 0 if _keeps_products(inputs, options) else padded
    frozen = num_targets if options.mode == "frozen" else 0
    entropy = num_targets if options.entropy else 0
    return [
        empty(num_targets),
        empty(entropy),
        empty(num_targets),
        empty(num_targets),
        empty(num_targets),
        empty(entropy),
        empty(num_targets),
        empty(padded, vocab_size, kind=dtype if options.full_precision else hidden.dtype),
        empty(num_tiles, offsets),
        empty(frozen, hidden.shape[1], kind=hidden.dtype),
        empty(frozen if options.entropy_grad else 0, hidden.shape[1], kind=hidden.dtype),
    ]


def _wide(targets: Targets, values: Tensor | None, num_targets: int) -> Tensor | None:
    """``[M, ...]`` -> ``[N, ...]`` of its own storage."""
    if values is None:
        return None
    if targets.kept_M is None:
        return values.clone()
    return values.new_zeros(num_targets, *values.shape[1:]).index_copy_(0, targets.kept_M, values)


def _narrow(targets: Targets, values: Tensor) -> Tensor:
    return values if targets.kept_M is None else values.index_select(0, targets.kept_M)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, options = _split(args)
    shapes = _shapes(inputs, options)
    scores, offsets = shapes[7].zero_(), shapes[8].zero_()
    (logp, entropy, lse), saved = forward(inputs, options, scores)
    targets, statistics, cache, vectors = saved
    if cache is not None:
        found = [offset for offset in cache.offsets if offset is not None]
        if bool(found) == _keeps_products(inputs, options):
            raise RuntimeError(f"backend {options.backend!r} left another kind of cache than it announces")
        for tile, offset in enumerate(found[0] if found and found[0].dim() == 2 else found):
            offsets[tile, : offset.shape[0]] = offset
    num_targets = inputs.target.shape[0]
    made = [
        logp.clone(),
        entropy,
        lse,
        _wide(targets, statistics.state.maximum, num_targets),
        _wide(targets, statistics.log_total, num_targets),
        _wide(targets, statistics.mean, num_targets),
        _wide(targets, statistics.state.target, num_targets),
        scores,
        offsets,
        None if vectors is None else _wide(targets, vectors.of_logp, num_targets),
        None if vectors is None else _wide(targets, vectors.of_entropy, num_targets),
    ]
    return tuple(shape if value is None else value for value, shape in zip(made, shapes, strict=True))


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_shapes(*_split(args)))


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grads, rest, state, wanted = args[:3], args[3 : 3 + _NUM_INPUTS + _NUM_OPTIONS], args[-9:-1], args[-1]
    inputs, options = _split(rest)
    targets = targets_of(inputs, options)
    maximum, log_total, mean, target_score = (
        _narrow(targets, values) if values.shape[0] else None for values in state[:4]
    )
    if maximum is None or log_total is None or target_score is None:
        maximum, log_total, target_score = state[0], state[1], state[3]
        mean = state[2] if options.entropy else None
    scores, offsets, of_logp, of_entropy = state[4:]
    cache = None
    cached = min(int(options.cached_rows), targets.target_M.shape[0])
    if cached:
        tiles = _cache_shape(inputs, options)[2]
        if cached < targets.target_M.shape[0]:
            cached = cached // tiles.row_block * tiles.row_block
        per_tile: list[Tensor | None] = [None] * offsets.shape[0]
        if not _keeps_products(inputs, options):
            per_tile = [offsets] if options.backend == "native" else [row[:cached] for row in offsets]
        cache = Cache(scores, per_tile, cached) if cached else None
    vectors = None
    if options.mode == "frozen":
        entropy_vectors = _narrow(targets, of_entropy) if options.entropy_grad else None
        vectors = FrozenVectors(_narrow(targets, of_logp), entropy_vectors)
    statistics = Statistics(RowState(maximum, maximum, None, target_score), log_total, mean)
    saved = Saved(targets, statistics, cache, vectors)
    results = backward(inputs, options, saved, tuple(grads), Wanted(*wanted))
    return tuple(inputs.hidden.new_empty(0) if result is None else result for result in results)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, wanted = Inputs(*args[3 : 3 + _NUM_INPUTS]), args[-1]
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None
        else inputs.hidden.new_empty(0)
        for tensor, want in zip(inputs[:5], wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    options = Options(
        **dict(zip([n for n in Options._fields if n != "compact"], inputs[_NUM_INPUTS:], strict=True)), compact=False
    )
    fixed = output[3:] if options.entropy_grad else (output[1], *output[3:])
    ctx.mark_non_differentiable(*fixed)
    ctx.save_for_backward(*inputs[:_NUM_INPUTS], *output[3:])
    ctx.options = inputs[_NUM_INPUTS:]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    checks.refuse_second_derivative("linear_logprob")
    nothing = (None,) * (_NUM_INPUTS + _NUM_OPTIONS)
    if all(grad is None for grad in grads[:3]):
        return nothing
    saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    results = torch.ops.specs_kernels.linear_logprob_backward(
        *grads[:3], *saved[:_NUM_INPUTS], *ctx.options, *saved[_NUM_INPUTS:], wanted
    )
    return (*(result if want else None for result, want in zip(results, wanted, strict=True)), *nothing[5:])


LIBRARY.impl("linear_logprob", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_logprob_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("specs_kernels::linear_logprob", _forward_fake, lib=LIBRARY)
torch.library.register_fake("specs_kernels::linear_logprob_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("specs_kernels::linear_logprob", _autograd, setup_context=_setup, lib=LIBRARY)
OPERATOR = torch.ops.specs_kernels.linear_logprob.default

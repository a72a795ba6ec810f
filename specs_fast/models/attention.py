"""The two attention functions that transformers models call by name, and the contexts that switch a model to them.

`TEXT` computes attention over a packed forest: it reads the keyword `layout` that `models.forest` passes to the model's
forward and that transformers hands down to every attention layer. `VISION` is for towers that mark their images with
cumulative lengths: its name contains "flash", so the tower makes one variable-length call per layer instead of one per
window, and it ignores `layout`. A context switches one part of a model, and restores what was there, also on errors; the model is
otherwise untouched, so generation before and after runs on the implementation its user chose.

Letters: T packed tokens, S patches, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from specs_fast.models.load import text_module, vision_tower
from specs_kernels import PackedLayout, dispatch, packed_attention

TEXT = "specs_packed"
VISION = "specs_flash_vision"
# Keywords that reach an attention layer and do not change what it computes.
_NO_EFFECT = (
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "return_dict",
)


def packed_text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row: query ``[1,H,T,D]``, key and value ``[1,Hkv,T,D]`` -> ``[1,T,H,D]``, no weights.

    Raises ValueError for a call without a layout, a batch of rows, a padding mask, dropout, and any keyword that is not known
    to leave attention as it is (sinks, a position bias, a selection of keys): what the packed op does not compute must not be
    left out silently.
    """
    name = type(module).__name__
    if layout is None:
        raise ValueError(
            f"{name}: packed attention was called without a layout; call the model through models.score or models.forest"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"{name}: packed attention takes one row without a padding mask, got a batch of {query.shape[0]}"
        )
    if dropout != 0.0:
        raise ValueError(f"{name}: packed attention has no dropout, got {dropout}; put the model in eval mode")
    for extra, given in kwargs.items():
        if given is not None and extra not in _NO_EFFECT and not (extra == "is_causal" and given is True):
            raise ValueError(f"{name}: packed attention does not support {extra}; set packing: none")
    query_THD, key_THD, value_THD = (_autocast(tensor[0].transpose(0, 1)) for tensor in (query, key, value))
    out_THD = packed_attention(
        query_THD, key_THD, value_THD, layout, scale=scaling, softcap=softcap, window=sliding_window
    )
    return out_THD.unsqueeze(0), None


def _autocast(tensor: Tensor) -> Tensor:
    """Under autocast the rotary embedding leaves query and key in fp32; like PyTorch's own attention, ours takes all three in
    the dtype of autocast."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def vision_varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each of consecutive windows: ``[1,H,S,D]`` -> ``[1,S,H,D]``, exact.

    cu_seq_lens_q: int32 ``[windows+1]``, where each window starts. One call for all windows; without the C++ kernel, one per size
    of window. Raises ValueError for a mask or dropout.
    """
    if attention_mask is not None or dropout != 0.0:
        raise ValueError(f"{type(module).__name__}: vision attention takes neither a mask nor dropout ({dropout})")
    query_SHD, key_SHD, value_SHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    run = forest_windows if _as_forest(query, cu_seq_lens_q) else grouped_windows
    return run(query_SHD, key_SHD, value_SHD, cu_seq_lens_q, scaling).unsqueeze(0), None


def _as_forest(query: Tensor, cu_seq_lens: Tensor) -> bool:
    """Whether windows run as one packed row: where their sizes differ and the C++ kernel runs. Windows of one size are one batch
    of PyTorch's attention anyway."""
    return not isinstance(_window_plan(cu_seq_lens), int) and dispatch.unavailable("native", query.device) is None


def forest_windows(
    query_SHD: Tensor, key_SHD: Tensor, value_SHD: Tensor, cu_seq_lens: Tensor, scaling: float | None
) -> Tensor:
    """All windows in one call of the packed op: each is a segment whose patches see one another."""
    query_SHD, key_SHD, value_SHD = (_autocast(tensor) for tensor in (query_SHD, key_SHD, value_SHD))
    return packed_attention(query_SHD, key_SHD, value_SHD, windows_layout(cu_seq_lens), scale=scaling)


def windows_layout(cu_seq_lens: Tensor) -> PackedLayout:
    """Kept on the tensor: all layers of a call share it."""
    layout: PackedLayout | None = getattr(cu_seq_lens, "_specs_windows_layout", None)
    if layout is None:
        bounds = cu_seq_lens.tolist()
        spans = list(zip(bounds, bounds[1:], strict=False))
        lengths = [end - start for start, end in spans]
        layout = PackedLayout.from_segments(
            lengths, [-1] * len(lengths), bidirectional=spans, device=cu_seq_lens.device
        )
        cu_seq_lens._specs_windows_layout = layout  # type: ignore[attr-defined]
    return layout


def grouped_windows(
    query_SHD: Tensor, key_SHD: Tensor, value_SHD: Tensor, cu_seq_lens: Tensor, scaling: float | None
) -> Tensor:
    """Windows of one size as one batch of PyTorch's attention."""
    plan = _window_plan(cu_seq_lens)
    if isinstance(plan, int):
        return _windows(query_SHD, key_SHD, value_SHD, plan, scaling)
    parts = [_windows(query_SHD[index], key_SHD[index], value_SHD[index], size, scaling) for size, index in plan.groups]
    return torch.cat(parts)[plan.inverse]


def _windows(query_SHD: Tensor, key_SHD: Tensor, value_SHD: Tensor, size: int, scaling: float | None) -> Tensor:
    """Equal windows of `size` patches as one batch: ``[S,H,D]`` -> ``[S,H,D]``."""
    query, key, value = (tensor.unflatten(0, (-1, size)).transpose(1, 2) for tensor in (query_SHD, key_SHD, value_SHD))
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


class _WindowPlan:
    """Windows grouped by size: `groups` holds (size, patch indices), `inverse` puts the concatenated groups back in order."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        starts: dict[int, list[int]] = {}
        position = 0
        for length in lengths:
            starts.setdefault(length, []).append(position)
            position += length
        self.groups = [
            (size, (torch.tensor(first)[:, None] + torch.arange(size)).flatten().to(device))
            for size, first in starts.items()
            if size > 0
        ]
        self.inverse = torch.argsort(torch.cat([index for _, index in self.groups]))


def _window_plan(cu_seq_lens: Tensor) -> int | _WindowPlan:
    """The one window size, or how to group windows of several sizes. Kept on the tensor: all layers of a call share it."""
    plan: int | _WindowPlan | None = getattr(cu_seq_lens, "_specs_window_plan", None)
    if plan is None:
        bounds = cu_seq_lens.tolist()
        lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        plan = lengths[0] if len(set(lengths)) == 1 and lengths[0] > 0 else _WindowPlan(lengths, cu_seq_lens.device)
        cu_seq_lens._specs_window_plan = plan  # type: ignore[attr-defined]
    return plan


def _no_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Both functions know their visibility by other means; a padding mask would be lost, so it is refused."""
    if attention_mask is not None:
        raise ValueError("a packed row has no padding mask; packed rows hold no padding")
    return None


AttentionInterface.register(TEXT, packed_text_attention)
AttentionMaskInterface.register(TEXT, _no_mask)
AttentionInterface.register(VISION, vision_varlen_attention)
AttentionMaskInterface.register(VISION, _no_mask)


@contextmanager
def text_attention(model: PreTrainedModel) -> Iterator[None]:
    """The text stack runs on `TEXT` inside this context, and whenever a layer of this forward is recomputed."""
    with _switched(text_module(model), TEXT):
        yield


@contextmanager
def vision_attention(model: PreTrainedModel) -> Iterator[None]:
    """The vision tower runs on `VISION` inside this context, and whenever a block of this forward is recomputed."""
    tower = vision_tower(model)
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no vision tower")
    with _switched(tower, VISION):
        yield


@contextmanager
def _switched(part: nn.Module, name: str) -> Iterator[None]:
    """Attention of every module in `part` is `name`.

    A checkpointed layer is recomputed in the backward, after this context has ended: the checkpointing functions called inside
    it therefore wrap the layer such that its recomputation sees `name` too. Without that it would run on another attention
    and give wrong gradients.
    """
    checkpointed = [
        module
        for module in part.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    previous = [module._gradient_checkpointing_func for module in checkpointed]
    # Found here and not in the layer: a compiled layer would be compiled again for each walk over the modules.
    configs = list(
        {id(module.config): module.config for module in part.modules() if hasattr(module, "config")}.values()
    )
    try:
        for module, function in zip(checkpointed, previous, strict=True):
            module._gradient_checkpointing_func = _recomputing_under(configs, name, function)  # type: ignore[assignment]
        with _named(configs, name):
            yield
    finally:
        for module, function in zip(checkpointed, previous, strict=True):
            module._gradient_checkpointing_func = function


@contextmanager
def _named(configs: list[Any], name: str) -> Iterator[None]:
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = {"": name}  # {"": ...}: this config and none of its sub-configs
        yield
    finally:
        for config, implementation in zip(configs, previous, strict=True):
            config._attn_implementation = {"": implementation}


def _recomputing_under(configs: list[Any], name: str, checkpoint: Any) -> Callable[..., Any]:
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            with _named(configs, name):
                return function(*inner, **inner_kwargs)

        return checkpoint(run, *args, **kwargs)

    return call

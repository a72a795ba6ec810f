"""Which models can run packed, and how a model that cannot says so."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from specs_fast.models.attention import text_module
from specs_fast.models.load import vision_tower

# Model types whose packed and separate runs agree in the test-suite. A type joins by being added to those tests.
PACKABLE = (
    "gemma2",
    "gemma3",
    "gemma3_text",
    "idefics3",
    "llama",
    "llava",
    "mistral",
    "qwen2",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl",
    "smolvlm",
)
# Of these, the ones that call their text stack by a name of its own.
_TEXT_STACKS = ("qwen2_5_vl_text", "qwen3_vl_text")
# Model types without M-RoPE whose images are known: features of frames, one row of position ids.
FRAME_MODELS = ("gemma3", "idefics3", "llava", "smolvlm")
_WAY_OUT = "set packing: none (padded rows)"
_ATTENTION_LAYERS = ("full_attention", "sliding_attention")
_RECURRENT = ("mamba", "delta", "rwkv", "shortconv", "recurrent", "lightningattention", "lru", "xlstm", "mixer")


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError unless this is a transformers model itself; a wrapper's own forward would be passed by silently."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"got a {type(model).__name__} instead of a transformers model; pass get_base_model() of a PEFT model (its adapters "
            "stay in effect), .module of DistributedDataParallel or DataParallel (gradients are then yours to reduce), and call "
            "model.compile() in place of torch.compile(model)"
        )


def check_packable(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the layer or setting and `packing: none`, unless packed runs of this model equal separate runs.

    Refused: layers that are not softmax attention over visible tokens (linear attention, state-space, convolution, chunked or
    sparse attention), attention sinks, position biases, keys and values of different widths, models that do not run on
    transformers' attention interface, images on a transformers version that cannot take encoded ones, and every model type that
    has not been compared (`PACKABLE`).
    """
    text, config = text_module(model), model.config.get_text_config()
    reason = (
        _layer_in_the_way(text, config)
        or _setting_in_the_way(config)
        or _interface_in_the_way(model, text)
        or _not_compared(model.config.model_type, config.model_type)
    )
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be packed: {reason}; {_WAY_OUT}")
    if vision_tower(model) is not None:
        check_takes_encoded_images(model)


def _layer_in_the_way(text: nn.Module, config: Any) -> str | None:
    for path, module in text.named_modules():
        kind = type(module).__name__
        if path and any(mark in kind.lower() for mark in _RECURRENT):
            return f"layer {path!r} is a {kind}, a recurrent layer"
        if getattr(module, "sinks", None) is not None:
            return f"layer {path!r} has attention sinks"
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in _ATTENTION_LAYERS:
            return f"layer {index} is {kind!r}, which does not read a packed layout"
    return None


def _setting_in_the_way(config: Any) -> str | None:
    """An entry of the text configuration that changes attention in a way that the packed op does not model."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        return f"attention_chunk_size is {chunk}: its layers attend within chunks, which do not read a packed layout"
    if getattr(config, "alibi", False):
        return "alibi is True: its scores carry a position bias"
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        return f"kv_lora_rank is {rank}: in latent attention keys and values have different widths"
    return None


def _interface_in_the_way(model: PreTrainedModel, text: nn.Module) -> str | None:
    if getattr(model, "_supports_attention_backend", False):
        return None
    names = (path for path, module in text.named_modules() if "attention" in type(module).__name__.lower())
    return f"{next(names, 'attention')!r} does not run on transformers' attention interface"


def _not_compared(model_type: str, text_type: str) -> str | None:
    for kind in (model_type, text_type):
        if kind not in PACKABLE and kind not in _TEXT_STACKS:
            compared = ", ".join(PACKABLE)
            return f"model type {kind!r} has not been compared with separate runs (compared: {compared})"
    return None


def check_scorable(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError where neither packed nor padded rows of up to `longest` tokens equal separate runs.

    Refused: text that attends to later text (its log-probs would know the token they predict), and, beyond the limit that the
    error names, rotary frequencies that depend on the longest sequence of a batch ("dynamic", "longrope").
    """
    name, config = type(model).__name__, model.config.get_text_config()
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if both_ways or getattr(config, "is_causal", True) is False:
        entry = f"use_bidirectional_attention is {both_ways!r}" if both_ways else "is_causal is False"
        raise ValueError(
            f"{name} cannot be scored: {entry}, so its tokens attend to the ones they predict; use a causal model"
        )
    for rope in _rope_parameters(getattr(config, "rope_parameters", None) or {}):
        kind = rope["rope_type"]
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if ("dynamic" in kind or kind == "longrope") and longest > limit:
            raise ValueError(
                f"{name} cannot be scored: rope_type {kind!r} changes the frequencies of a whole batch with its longest "
                f"sequence, here {longest} tokens of prompt and response; keep them within {limit}"
            )


def _rope_parameters(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """One set of rotary parameters, or one per kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [one for one in parameters.values() if isinstance(one, dict) and "rope_type" in one]


def check_takes_encoded_images(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model has a vision tower and its forward takes images that are already encoded."""
    name = type(model).__name__
    if vision_tower(model) is None:
        raise ValueError(
            f"{name} has no vision tower, but a prompt has images; use a vision-language model or rows without images"
        )
    kind = model.config.model_type
    if kind not in FRAME_MODELS and not hasattr(model.base_model, "get_rope_index"):
        raise ValueError(
            f"{name}: how model type {kind!r} takes images is not known here; known: the Qwen-VL family, "
            f"{', '.join(FRAME_MODELS)}"
        )
    if "mm_encoder_outputs" not in inspect.signature(type(model.base_model).forward).parameters:
        raise ValueError(
            f"{name} of this transformers version does not take encoded images (no `mm_encoder_outputs` in its forward); "
            "install transformers 5.23 or newer"
        )

"""Which models can run packed, and how a model that cannot says so."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from specs_fast.models.attention import text_module
from specs_fast.models.load import vision_tower

# Model types whose packed and separate runs agree in the test-suite. A type joins by being added to those tests.
PACKABLE = ("gemma3", "idefics3", "llama", "llava", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl", "smolvlm")
# Model types without M-RoPE whose images are known: features of frames, one row of position ids.
FRAME_MODELS = ("gemma3", "idefics3", "llava", "smolvlm")
_WAY_OUT = "set packing: none (padded rows)"
_ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def check_packable(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the layer and `packing: none`, unless packed runs of this model equal separate runs.

    Refused: layers that are not softmax attention over visible tokens (linear attention, state-space, convolution, chunked or
    sparse attention), attention sinks, models that do not run on transformers' attention interface, images on a transformers
    version that cannot take encoded ones, and every model type that has not been compared (`PACKABLE`).
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    text = text_module(model)
    for path, module in text.named_modules():
        kind = type(module).__name__
        if path and any(
            mark in kind.lower()
            for mark in ("mamba", "deltanet", "rwkv", "shortconv", "recurrent", "lightningattention")
        ):
            raise ValueError(f"{name} cannot be packed: layer {path!r} is a {kind}, a recurrent layer; {_WAY_OUT}")
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name} cannot be packed: layer {path!r} has attention sinks; {_WAY_OUT}")
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in _ATTENTION_LAYERS:
            raise ValueError(
                f"{name} cannot be packed: layer {index} is {kind!r}, which does not read a packed layout; {_WAY_OUT}"
            )
    if not getattr(model, "_supports_attention_backend", False):
        layer = next(
            (path for path, module in text.named_modules() if "attention" in type(module).__name__.lower()), "attention"
        )
        raise ValueError(
            f"{name} cannot be packed: {layer!r} does not run on transformers' attention interface; {_WAY_OUT}"
        )
    if model.config.model_type not in PACKABLE:
        raise ValueError(
            f"{name} cannot be packed: model type {model.config.model_type!r} has not been compared with separate runs "
            f"(compared: {', '.join(PACKABLE)}); {_WAY_OUT}"
        )
    if vision_tower(model) is not None:
        check_takes_encoded_images(model)


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

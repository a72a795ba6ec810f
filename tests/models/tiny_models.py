"""Tiny random-weight models and random prompts for the tests of models and rollouts; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree

VOCAB = 64
IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 60, 61, 62, 63, 1, 0
PATCH, MERGE = 4, 2
PATCH_DIM = 3 * 2 * PATCH * PATCH
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": MERGE,
    "out_hidden_size": 32,
}

_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
# Windows are shorter than the test prompts and their responses, and both soft caps are in reach of the scores.
_GEMMA2 = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
_LANGUAGE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 12, **_MIXED, **_GEMMA2}),
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 16, "query_pre_attn_scalar": 12, **_MIXED, "rope_parameters": _GEMMA3_ROPE},
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"head_dim": 8, **_MOE}),
}

LANGUAGE_MODELS = tuple(_LANGUAGE)
VISION_MODELS = ("qwen2_5_vl", "qwen3_vl")
MODELS = VISION_MODELS + LANGUAGE_MODELS
WINDOW_BY_OPTION = ("qwen2", "qwen2_5_vl", "qwen3")
"""Models whose layers have a window only where `use_sliding_window` asks for it."""
COMPILED = ("gemma3_text", "qwen3_vl")
"""Models whose text stack is also compiled; a compilation takes seconds."""


def make_model(kind: str, *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random-weight model in eval mode, fp32. overrides: entries of the text configuration."""
    torch.manual_seed(seed)
    text = {**_TEXT, **overrides}
    model: PreTrainedModel
    if kind in _LANGUAGE:
        model_class, config_class, own = _LANGUAGE[kind]
        model = model_class(config_class(**{**_TEXT, **own, **overrides}))
    elif kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        vision = {**_VISION, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **_TOKENS)
        config.tie_word_embeddings = bool(text["tie_word_embeddings"])
        model = Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
        vision = {**_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = Qwen3VLConfig(
            text_config={**text, "head_dim": 8, "rope_parameters": rope}, vision_config=vision, **_TOKENS
        )
        config.tie_word_embeddings = bool(text["tie_word_embeddings"])
        model = Qwen3VLForConditionalGeneration(config)
    else:
        raise ValueError(kind)
    # Random weights of the usual size give nearly uniform outputs, on which most mistakes would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25 if parameter.shape[-1] < 128 else 0.1)
    return model.eval()


def text_ids(length: int, generator: torch.Generator) -> torch.Tensor:
    """Random text tokens: no special ones."""
    return torch.randint(2, IMAGE, (length,), generator=generator)


def make_image(key: str, grid: tuple[int, int, int] = (1, 4, 6)) -> EncodedImage:
    """An image whose pixels are a function of its key."""
    generator = torch.Generator().manual_seed(sum(key.encode()) + 1000 * len(key))
    patches = grid[0] * grid[1] * grid[2]
    return EncodedImage(key, torch.randn(patches, PATCH_DIM, generator=generator), grid)


def image_run(image: EncodedImage) -> torch.Tensor:
    """The tokens of one image: start, one image token per merged patch, end."""
    time, height, width = image.grid_thw
    tokens = torch.full((time * (height // MERGE) * (width // MERGE),), IMAGE)
    return torch.cat((torch.tensor([VISION_START]), tokens, torch.tensor([VISION_END])))


def make_segment(
    lengths: list[int], images: list[EncodedImage], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text pieces of these lengths with the images between them: input_ids and token_types ``[L]``."""
    pieces: list[torch.Tensor] = []
    for index, length in enumerate(lengths):
        pieces.append(text_ids(length, generator))
        if index < len(images):
            pieces.append(image_run(images[index]))
    input_ids = torch.cat(pieces)
    return input_ids, (input_ids == IMAGE).long()


def make_prompt(name: str, lengths: list[int], images: list[EncodedImage], generator: torch.Generator) -> EncodedPrompt:
    input_ids, token_types = make_segment(lengths, images, generator)
    return EncodedPrompt(name, input_ids, token_types, tuple(images))


def mixed_trees(kind: str, *, seed: int = 0) -> list[Tree]:
    """Unequal groups, an empty response, prompts with one image, two images, none, and one image shared by two prompts."""
    generator = torch.Generator().manual_seed(seed)
    images = [make_image("a"), make_image("b", (1, 6, 4)), make_image("c", (1, 2, 2))] if kind in VISION_MODELS else []
    first, second, third = ([images[0]], [images[1], images[0]], [images[2]]) if images else ([], [], [])
    prompts = [
        make_prompt("one", [3, 4], first, generator),
        make_prompt("two", [2, 1, 5], second, generator),
        make_prompt("none", [6], [], generator),
        make_prompt("small", [1, 1], third, generator),
    ]
    response_lengths = [[4, 1, 0, 6], [3], [5, 2], [0, 7]]
    return [
        Tree(prompt, tuple(text_ids(length, generator) for length in lengths))
        for prompt, lengths in zip(prompts, response_lengths, strict=True)
    ]

"""Tiny random-weight vision-language models without M-RoPE, and their images and prompts; nothing is downloaded."""

from __future__ import annotations

import torch
from tiny_models import EOS, IMAGE, PAD, VISION_END, VISION_START, VOCAB, text_ids
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree

PATCH, SIDE = 4, 16
FRAME_TOKENS = {"llava": 16, "idefics3": 4, "smolvlm": 4, "gemma3": 4}
KINDS = tuple(FRAME_TOKENS)
WINDOW = 3
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
}


def make_vision_model(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A random-weight model in eval mode, fp32. Gemma-3: sliding, full and sliding layers, the window shorter than prompts."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "llava":
        vision = CLIPVisionConfig(**{**_VISION, "num_hidden_layers": 3}, projection_dim=16)
        model = LlavaForConditionalGeneration(
            LlavaConfig(text_config={"model_type": "llama", **_TEXT}, vision_config=vision, image_token_index=IMAGE)
        )
    elif kind == "llava of SigLIP and Qwen2":
        tower = SiglipVisionConfig(**_VISION, vision_use_head=False)
        text = {**_TEXT, "model_type": "qwen2"}
        tower_features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        model = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, **tower_features)
        )
    elif kind in ("idefics3", "smolvlm"):
        config_class = Idefics3Config if kind == "idefics3" else SmolVLMConfig
        model_class = Idefics3ForConditionalGeneration if kind == "idefics3" else SmolVLMForConditionalGeneration
        text = {"model_type": "llama", **_TEXT}
        model = model_class(
            config_class(
                text_config=text, vision_config=_VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
            )
        )
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        text = {**_TEXT, "layer_types": layers, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
        tokens = {"image_token_index": IMAGE, "boi_token_index": VISION_START, "eoi_token_index": VISION_END}
        vision = {**_VISION, "vision_use_head": False}
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
        )
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25 if parameter.shape[-1] < 128 else 0.1)
    return model.eval()


def make_frames(kind: str, key: str, frames: int = 1) -> EncodedImage:
    """An image whose pixels are a function of its key; of several frames for the models that cut images in tiles."""
    generator = torch.Generator().manual_seed(sum(key.encode()) + 1000 * len(key))
    pixels = torch.randn(frames, 3, SIDE, SIDE, generator=generator)
    mask = torch.ones(frames, SIDE, SIDE, dtype=torch.bool) if kind in ("idefics3", "smolvlm") else None
    if mask is not None and key.startswith("padded"):
        mask[-1, SIDE - PATCH :] = False
        pixels[-1, :, SIDE - PATCH :] = 0.0
    return EncodedImage(key, pixels, num_tokens=frames * FRAME_TOKENS[kind], pixel_attention_mask=mask)


def frame_run(kind: str, image: EncodedImage) -> Tensor:
    """The tokens of one image: per frame a start, its image tokens, an end."""
    frames = int(image.pixel_values.shape[0])
    start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
    return torch.cat([start, torch.full((FRAME_TOKENS[kind],), IMAGE), end] * frames)


def frame_prompt(
    kind: str, name: str, lengths: list[int], images: list[EncodedImage], generator: torch.Generator
) -> EncodedPrompt:
    """Text pieces of these lengths with the images between them."""
    pieces: list[Tensor] = []
    for index, length in enumerate(lengths):
        pieces.append(text_ids(length, generator))
        if index < len(images):
            pieces.append(frame_run(kind, images[index]))
    input_ids = torch.cat(pieces)
    return EncodedPrompt(name, input_ids, (input_ids == IMAGE).long(), tuple(images))


def image_trees(kind: str, *, seed: int = 0) -> list[Tree]:
    """Unequal groups, an empty response; prompts with one image, two, none; an image in two prompts; images of several frames."""
    generator = torch.Generator().manual_seed(seed)
    tiled = kind != "llava"
    a, b = make_frames(kind, "a"), make_frames(kind, "padded b", 3 if tiled else 1)
    prompts = [
        frame_prompt(kind, "one", [3, 4], [a], generator),
        frame_prompt(kind, "two", [2, 1, 5], [b, a], generator),
        frame_prompt(kind, "none", [6], [], generator),
        frame_prompt(kind, "again", [1, 1], [b], generator),
    ]
    lengths = [[4, 1, 0, 6], [3], [5, 2], [0, 7]]
    return [
        Tree(prompt, tuple(text_ids(length, generator) for length in group))
        for prompt, group in zip(prompts, lengths, strict=True)
    ]


def vision_inputs(kind: str, prompt: EncodedPrompt, input_ids: Tensor) -> dict:
    """Keyword arguments of the model's own forward or generate on one sequence ``[L]`` that starts with the prompt."""
    inputs = {"input_ids": input_ids[None]}
    if prompt.images:
        pixels = torch.cat([image.pixel_values for image in prompt.images])
        masks = [image.pixel_attention_mask for image in prompt.images if image.pixel_attention_mask is not None]
        inputs["pixel_values"] = pixels[None] if masks else pixels
        if masks:
            inputs["pixel_attention_mask"] = torch.cat(masks)[None]
    if kind == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE).long()[None]
    return inputs

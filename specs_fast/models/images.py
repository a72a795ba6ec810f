"""Images through the vision tower, each distinct image once.

A prompt shown to G responses, a chosen and a rejected side, several prompts over one picture: the tower sees the picture once
per call, and its features (the deepstack features of Qwen3-VL too) are repeated in the order in which the tokens want them.

Two kinds of models. The Qwen-VL family takes patches of images of any size in one row, with a grid per image. The others
(`support.FRAME_MODELS`) take frames of one size; an image may have several (tiles, crops). Either way the model itself makes the
features (`get_image_features`) and puts them in the place of the image tokens (`mm_encoder_outputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage
from specs_fast.models.attention import vision_attention
from specs_fast.models.image_cache import Features, feature_cache
from specs_fast.models.load import text_module
from specs_fast.models.positions import image_tokens, uses_mrope
from specs_fast.models.support import check_takes_encoded_images

# Patches per call of the tower: bounds its activations; slicing between images is exact.
MAX_PATCHES = 65_536


@dataclass(frozen=True)
class ImageFeatures:
    """Features of distinct images, one entry per image: `pooled[i]` is ``[image tokens, D]``, and so is each
    `deepstack[level][i]` (no levels for models without deepstack). joined: the model wants them as one tensor."""

    keys: dict[str, int]
    pooled: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...]
    output_type: type
    joined: bool = False

    def model_kwargs(self, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """Keyword arguments for the model's forward, for images in this order of appearance (empty for no images)."""
        if not images:
            return {}
        order = [self.keys[image.key] for image in images]
        pooled = tuple(self.pooled[i] for i in order)
        output = self.output_type(pooler_output=torch.cat(pooled) if self.joined else pooled)
        if self.deepstack:
            output.deepstack_features = [tuple(level[i] for i in order) for level in self.deepstack]
        return {"mm_encoder_outputs": {"image": output}}


def encode_images(model: PreTrainedModel, images: Sequence[EncodedImage]) -> ImageFeatures | None:
    """Encode each distinct image (by `EncodedImage.key`) once; None when there are no images.

    Differentiable in the tower's parameters. The features of a frozen tower are kept between calls (`models.image_cache`), so an
    image is then encoded once for all of its rollouts and updates. The tower runs once per `MAX_PATCHES` patches, with one
    attention call per layer. Raises ValueError for a model that cannot take images, or whose forward does not accept encoded
    ones, and for an image with more or fewer features than tokens.
    """
    if not images:
        return None
    check_takes_encoded_images(model)
    cache = feature_cache(model.base_model, text_module(model))
    known: dict[str, Features] = {}
    unseen: dict[str, EncodedImage] = {}
    for image in images:
        if image.key in known or image.key in unseen:
            continue
        found = cache.get(image.key) if cache is not None else None
        if found is None:
            unseen[image.key] = image
        else:
            known[image.key] = found
    output_type = cache.output_type if cache is not None else None
    if unseen:
        encode = _encode_patches if uses_mrope(model) else _encode_frames
        # Features of a frozen tower may be made by a rollout in inference mode and used by an update.
        with torch.inference_mode(False) if cache is not None else nullcontext():
            encoded, output_type = encode(model, list(unseen.values()))
        known |= encoded
        if cache is not None:
            cache.output_type = output_type
            for key, features in encoded.items():
                cache.put(key, features)
    assert output_type is not None
    levels = tuple(zip(*(features.deepstack for features in known.values()), strict=True))
    keys = {key: index for index, key in enumerate(known)}
    pooled = tuple(features.pooled for features in known.values())
    return ImageFeatures(keys, pooled, levels, output_type, joined=model.config.model_type == "gemma3")


def visibility_kwargs(model: PreTrainedModel, token_types_BL: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that tell an unpacked forward which tokens are image tokens, for models that need to know.

    token_types_BL: int64 ``[B, L]``, 1 for image tokens and 0 elsewhere. Empty for models whose image tokens are causal.
    """
    return {"token_type_ids": token_types_BL.to(model.device)} if images_see_both_ways(model) else {}


def images_see_both_ways(model: PreTrainedModel) -> bool:
    """Whether an image token sees the later tokens of its own run of image tokens (Gemma-3), not only the earlier ones."""
    return bool(model.config.model_type == "gemma3")


def _encode_patches(model: PreTrainedModel, images: list[EncodedImage]) -> tuple[dict[str, Features], type]:
    """Run the tower of a Qwen-VL model on distinct images."""
    encoded: dict[str, Features] = {}
    output_type: type = object
    with vision_attention(model):
        for batch in _slices([int(image.pixel_values.shape[0]) for image in images], images):
            pixels = torch.cat([image.pixel_values for image in batch]).to(model.device)
            grid = torch.tensor([image.grid_thw for image in batch], device=model.device)
            output = model.base_model.get_image_features(pixels, image_grid_thw=grid, return_dict=True)
            output_type = type(output)
            levels = getattr(output, "deepstack_features", None) or []
            for index, image in enumerate(batch):
                deepstack = tuple(level[index] for level in levels)
                encoded[image.key] = Features(output.pooler_output[index], deepstack)
    return encoded, output_type


def _encode_frames(model: PreTrainedModel, images: list[EncodedImage]) -> tuple[dict[str, Features], type]:
    """Run the tower of one of `FRAME_MODELS` on distinct images, all their frames in one batch."""
    # SmolVLM and Idefics3 want the frames of a prompt in a dimension of their own.
    prompts = 1 if model.config.model_type in ("idefics3", "smolvlm") else 0
    patch_size = int(model.config.vision_config.patch_size)
    encoded: dict[str, Features] = {}
    output_type: type = object
    for batch in _slices([image.pixel_values[:, 0].numel() // patch_size**2 for image in images], images):
        inputs = {"pixel_values": torch.cat([image.pixel_values for image in batch])}
        masks = [image.pixel_attention_mask for image in batch if image.pixel_attention_mask is not None]
        if masks:
            inputs["pixel_attention_mask"] = torch.cat(masks)
        inputs = {name: value.to(model.device)[(None,) * prompts] for name, value in inputs.items()}
        output = model.base_model.get_image_features(**inputs, return_dict=True)
        output_type = type(output)
        pooled = output.pooler_output
        features_ND = (pooled if isinstance(pooled, Tensor) else torch.cat(tuple(pooled))).flatten(0, -2)
        parts = features_ND.split(_feature_counts(model, batch, int(features_ND.shape[0])))
        encoded |= {image.key: Features(part, ()) for image, part in zip(batch, parts, strict=True)}
    return encoded, output_type


def _feature_counts(model: PreTrainedModel, images: list[EncodedImage], features: int) -> list[int]:
    """How many of the features of a batch of frames belong to each image; ValueError unless it has as many tokens."""
    per_frame = features / sum(int(image.pixel_values.shape[0]) for image in images)
    counts = [image_tokens(model, image) for image in images]
    for image, tokens in zip(images, counts, strict=True):
        frames = int(image.pixel_values.shape[0])
        if frames * per_frame != tokens:
            raise ValueError(
                f"image {image.key!r} takes {tokens} tokens in the text, but {type(model).__name__} makes "
                f"{frames * per_frame:g} features of it ({frames} frames of {list(image.pixel_values.shape[1:])}); "
                "the processor's settings do not fit the model"
            )
    return counts


def _slices(patches: list[int], images: list[EncodedImage]) -> list[list[EncodedImage]]:
    """Images per call of the tower; those of one call have pixels of one shape but for the first dimension."""
    slices: list[list[EncodedImage]] = []
    taken = 0
    for count, image in zip(patches, images, strict=True):
        other_shape = slices and image.pixel_values.shape[1:] != slices[-1][0].pixel_values.shape[1:]
        if not slices or other_shape or taken + count > MAX_PATCHES:
            slices.append([])
            taken = 0
        slices[-1].append(image)
        taken += count
    return slices

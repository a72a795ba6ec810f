"""Images through the vision tower, each distinct image once.

A prompt shown to G responses, a chosen and a rejected side, several prompts over one picture: the tower sees the picture once
per call, and its features (the deepstack features of Qwen3-VL too) are repeated in the order in which the tokens want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage
from specs_fast.models.attention import text_module, vision_attention
from specs_fast.models.image_cache import Features, feature_cache
from specs_fast.models.support import check_takes_encoded_images

# Patches per call of the tower: bounds its activations; slicing between images is exact.
MAX_PATCHES = 65_536


@dataclass(frozen=True)
class ImageFeatures:
    """Features of distinct images, one entry per image: `pooled[i]` is ``[merged patches, D]``, and so is each
    `deepstack[level][i]` (no levels for models without deepstack)."""

    keys: dict[str, int]
    pooled: tuple[torch.Tensor, ...]
    deepstack: tuple[tuple[torch.Tensor, ...], ...]
    output_type: type

    def model_kwargs(self, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """Keyword arguments for the model's forward, for images in this order of appearance (empty for no images)."""
        if not images:
            return {}
        order = [self.keys[image.key] for image in images]
        output = self.output_type(pooler_output=tuple(self.pooled[i] for i in order))
        if self.deepstack:
            output.deepstack_features = [tuple(level[i] for i in order) for level in self.deepstack]
        return {"mm_encoder_outputs": {"image": output}}


def encode_images(model: PreTrainedModel, images: Sequence[EncodedImage]) -> ImageFeatures | None:
    """Encode each distinct image (by `EncodedImage.key`) once; None when there are no images.

    Differentiable in the tower's parameters. The features of a frozen tower are kept between calls (`models.image_cache`), so an
    image is then encoded once for all of its rollouts and updates. The tower runs once per `MAX_PATCHES` patches, with one
    variable-length attention call per layer. Raises ValueError for a model that cannot take images, or whose forward does not
    accept encoded ones.
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
        # Features of a frozen tower may be made by a rollout in inference mode and used by an update.
        with torch.inference_mode(False) if cache is not None else nullcontext():
            encoded, output_type = _encode(model, list(unseen.values()))
        known |= encoded
        if cache is not None:
            cache.output_type = output_type
            for key, features in encoded.items():
                cache.put(key, features)
    assert output_type is not None
    levels = tuple(zip(*(features.deepstack for features in known.values()), strict=True))
    keys = {key: index for index, key in enumerate(known)}
    return ImageFeatures(keys, tuple(features.pooled for features in known.values()), levels, output_type)


def _encode(model: PreTrainedModel, images: list[EncodedImage]) -> tuple[dict[str, Features], type]:
    """Run the tower on distinct images."""
    encoded: dict[str, Features] = {}
    output_type: type = object
    with vision_attention(model):
        for batch in _slices(images):
            pixels = torch.cat([image.pixel_values for image in batch]).to(model.device)
            grid = torch.tensor([image.grid_thw for image in batch], device=model.device)
            output = model.base_model.get_image_features(pixels, image_grid_thw=grid, return_dict=True)
            output_type = type(output)
            levels = getattr(output, "deepstack_features", None) or []
            for index, image in enumerate(batch):
                deepstack = tuple(level[index] for level in levels)
                encoded[image.key] = Features(output.pooler_output[index], deepstack)
    return encoded, output_type


def _slices(images: list[EncodedImage]) -> list[list[EncodedImage]]:
    slices: list[list[EncodedImage]] = []
    patches = 0
    for image in images:
        count = int(image.pixel_values.shape[0])
        if not slices or patches + count > MAX_PATCHES:
            slices.append([])
            patches = 0
        slices[-1].append(image)
        patches += count
    return slices

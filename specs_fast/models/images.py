"""Images through the vision tower, each distinct image once.

A prompt shown to G responses, a chosen and a rejected side, several prompts over one picture: the tower sees the picture once
per call, and its features (the deepstack features of Qwen3-VL too) are repeated in the order in which the tokens want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage
from specs_fast.models.attention import vision_attention
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

    Differentiable in the tower's parameters. The tower runs once per `MAX_PATCHES` patches, with one variable-length attention
    call per layer. Raises ValueError for a model that cannot take images, or whose forward does not accept encoded ones.
    """
    if not images:
        return None
    distinct: dict[str, EncodedImage] = {}
    for image in images:
        distinct.setdefault(image.key, image)
    base = model.base_model
    check_takes_encoded_images(model)
    pooled: list[torch.Tensor] = []
    levels: list[list[torch.Tensor]] = []
    output_type: type | None = None
    with vision_attention(model):
        for batch in _slices(list(distinct.values())):
            pixels = torch.cat([image.pixel_values for image in batch]).to(model.device)
            grid = torch.tensor([image.grid_thw for image in batch], device=model.device)
            output = base.get_image_features(pixels, image_grid_thw=grid, return_dict=True)
            output_type = type(output)
            pooled.extend(output.pooler_output)
            for level, features in enumerate(getattr(output, "deepstack_features", None) or []):
                if level == len(levels):
                    levels.append([])
                levels[level].extend(features)
    assert output_type is not None
    keys = {key: index for index, key in enumerate(distinct)}
    return ImageFeatures(keys, tuple(pooled), tuple(tuple(level) for level in levels), output_type)


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

"""The packed forward: a forest of segments as one row, through an unmodified transformers model.

Every segment attends to itself and to its ancestors (`specs_kernels.PackedLayout`), so a prompt is computed once however many
responses follow it, and no token is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage
from specs_fast.models.attention import text_attention
from specs_fast.models.images import ImageFeatures, encode_images, images_see_both_ways
from specs_fast.models.modes import scoring_mode
from specs_fast.models.positions import forest_positions
from specs_fast.models.support import check_packable, check_scorable, check_unwrapped
from specs_kernels import PackedLayout


def packed_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    layout: PackedLayout,
    images: Sequence[EncodedImage],
    token_types: Tensor,
    *,
    features: ImageFeatures | None = None,
) -> Tensor:
    """Last hidden states of a packed forest, ``[T, D]``, equal to those of each path run on its own.

    input_ids, token_types: int64 ``[T]`` (token_types 1 for image tokens). layout: of any depth, T tokens. images: in order of
    appearance in the row; equal keys are encoded once. features: encoded images to use instead of running the vision tower.

    Differentiable in the model's parameters; gradient checkpointing works. The model's attention implementation is the same
    before and after. Raises ValueError for a wrapper around a model or one that cannot be packed, sizes that differ, an image
    that spans segments.
    """
    check_unwrapped(model)
    check_packable(model)
    check_scorable(model, _longest_path(layout))
    if not input_ids.shape == token_types.shape == (layout.num_tokens,):
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and token_types {tuple(token_types.shape)} must be [{layout.num_tokens}], "
            "one entry per token of the layout"
        )
    device = model.device
    layout = with_open_images(model, layout.to(device), token_types)
    positions = forest_positions(model, layout, token_types, images)
    with scoring_mode(model):
        if features is None:
            features = encode_images(model, images)
        image_kwargs = features.model_kwargs(images) if features is not None else {}
        with text_attention(model):
            output = model.base_model(
                input_ids=input_ids.to(device).unsqueeze(0),
                position_ids=positions,
                use_cache=False,
                layout=layout,
                **image_kwargs,
            )
    return output.last_hidden_state[0]


def image_spans(layout: PackedLayout, token_types: Tensor) -> list[tuple[int, int]]:
    """Half-open token ranges, one per unbroken run of image tokens: token_types int64 ``[T]``, 1 for image tokens.

    Two images without a token between them are one run, as in transformers. Raises ValueError for a run that goes on in a child
    segment: its first tokens would see tokens of one child and be different for each.
    """
    is_image_T = token_types.cpu() == 1
    if not bool(is_image_T.any()):
        return []
    before_T, segment_T = layout.predictor_index.cpu(), layout.segment_ids.cpu()
    goes_on_T = is_image_T & (before_T >= 0) & is_image_T[before_T]
    crossing = (goes_on_T & (segment_T[before_T] != segment_T)).nonzero()
    if len(crossing):
        token = int(crossing[0])
        raise ValueError(
            f"token {token} goes on with the image tokens that end segment {int(segment_T[before_T[token]])}, but lies in "
            f"segment {int(segment_T[token])}; image tokens see one another in this model, so put text between them"
        )
    starts_T = is_image_T & ~goes_on_T
    follows_T = torch.cat((goes_on_T[1:], goes_on_T.new_zeros(1)))
    ends_T = is_image_T & ~follows_T
    starts, ends = starts_T.nonzero()[:, 0], ends_T.nonzero()[:, 0] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def with_open_images(model: PreTrainedModel, layout: PackedLayout, token_types: Tensor) -> PackedLayout:
    """The layout in which image tokens see one another, kept on this one; for models that do not ask for it this one itself."""
    if not images_see_both_ways(model):
        return layout
    spans = image_spans(layout, token_types)
    if set(spans) <= set(layout.bidirectional):
        return layout
    key = ("models.open_images", tuple(spans))
    opened = layout.cache.get(key)
    if opened is None:
        opened = layout.cache[key] = PackedLayout.from_segments(
            layout.lengths, layout.parents, bidirectional=[*layout.bidirectional, *spans], device=layout.device
        )
    return opened


def _longest_path(layout: PackedLayout) -> int:
    """Tokens from a root to a leaf, at most."""
    until: list[int] = []
    for length, parent in zip(layout.lengths, layout.parents, strict=True):
        until.append(length + (until[parent] if parent >= 0 else 0))
    return max(until, default=0)

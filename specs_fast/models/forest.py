"""The packed forward: a forest of segments as one row, through an unmodified transformers model.

Every segment attends to itself and to its ancestors (`specs_kernels.PackedLayout`), so a prompt is computed once however many
responses follow it, and no token is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage
from specs_fast.models.attention import text_attention
from specs_fast.models.images import ImageFeatures, encode_images, images_see_both_ways
from specs_fast.models.modes import scoring_mode
from specs_fast.models.positions import forest_positions
from specs_fast.models.support import check_packable
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
    before and after. Raises ValueError for a model that cannot be packed, sizes that differ, an image that spans segments.
    """
    check_packable(model)
    if not input_ids.shape == token_types.shape == (layout.num_tokens,):
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and token_types {tuple(token_types.shape)} must be [{layout.num_tokens}], "
            "one entry per token of the layout"
        )
    device = model.device
    if images_see_both_ways(model):
        layout = PackedLayout.from_segments(layout.lengths, layout.parents, bidirectional=_image_runs(token_types))
    layout = layout.to(device)
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


def _image_runs(token_types: Tensor) -> list[tuple[int, int]]:
    """Half-open ranges of the runs of image tokens."""
    runs: list[tuple[int, int]] = []
    start = 0
    for kind, run in itertools.groupby(token_types.tolist()):
        end = start + len(list(run))
        if kind == 1:
            runs.append((start, end))
        start = end
    return runs

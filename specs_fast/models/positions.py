"""Position ids of packed forests and of single prompts, and which image lies where in them.

Most models use the index along the path. A vision-language model with M-RoPE uses three rows (time, height, width): an
image's tokens share one start and spread over the grid, and text goes on after the largest of them. A child segment goes on where
its nearest non-empty ancestor ended, so every path through the forest carries the ids that it would carry alone.

The ids of one segment come from the model's own `get_rope_index`; only the offset is added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specs_fast.data.types import EncodedImage, EncodedPrompt
from specs_fast.models.load import image_token_id
from specs_kernels import PackedLayout

_CACHE_ENTRIES = 4096
_SegmentKey = tuple[bytes, tuple[tuple[int, int, int], ...]]
_cache: WeakKeyDictionary[nn.Module, dict[_SegmentKey, Tensor]] = WeakKeyDictionary()


def uses_mrope(model: PreTrainedModel) -> bool:
    """Whether the model takes three rows of position ids."""
    return hasattr(model.base_model, "get_rope_index")


def segment_positions(model: PreTrainedModel, token_types: Tensor, images: Sequence[EncodedImage]) -> Tensor:
    """M-RoPE ids of one segment that starts at 0: token_types int64 ``[L]`` (1 for image tokens) -> int64 ``[3, L]``, on the CPU.

    Kept per pattern of token types and grids, which prompts of a data set share. Raises ValueError when the image tokens are
    not one run per image, as long as its merged patches.
    """
    length = int(token_types.shape[0])
    if not images:
        return torch.arange(length).expand(3, -1)
    token_types = token_types.cpu()
    grids = tuple(_grid(model, image) for image in images)
    key = (token_types.numpy().tobytes(), grids)
    known = _cache.setdefault(model.base_model, {})
    positions = known.get(key)
    if positions is None:
        runs = [len(list(run)) for kind, run in itertools.groupby(token_types.tolist()) if kind == 1]
        expected = [image_tokens(model, image) for image in images]
        if runs != expected:
            raise ValueError(
                f"runs of {runs} image tokens for {len(images)} images, which take {expected} (grids {list(grids)}); "
                "every image needs one run of image tokens of its own"
            )
        if len(known) >= _CACHE_ENTRIES:
            known.clear()
        positions = model.base_model.get_rope_index(
            torch.zeros(1, length, dtype=torch.long),
            mm_token_type_ids=token_types[None],
            image_grid_thw=torch.tensor(grids),
        )[0][:, 0]
        known[key] = positions
    return positions


def check_position_limit(model: PreTrainedModel, prompt: EncodedPrompt, new_tokens: int) -> None:
    """Raise ValueError, naming the prompt, when it and `new_tokens` more pass the positions that the model was made for.

    Beyond them a rotary model goes on without an error, and badly.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    first = len(prompt)
    if prompt.images and uses_mrope(model) and len(prompt):  # an image takes fewer positions than tokens
        first = int(segment_positions(model, prompt.token_types, prompt.images).max()) + 1
    if first + new_tokens > limit:
        raise ValueError(
            f"prompt {prompt.id!r} takes {first} positions and max_new_tokens is {new_tokens}, but {type(model).__name__} has "
            f"{limit} (max_position_embeddings); lower max_new_tokens to {max(0, limit - first)} or filter long prompts "
            "(data.max_prompt_tokens with data.filter_overlong)"
        )


def image_tokens(model: PreTrainedModel, image: EncodedImage) -> int:
    """Tokens that one image takes in the text: its merged patches, or what its processor said.

    Raises ValueError for an image that was prepared for a model of another kind.
    """
    if uses_mrope(model):
        time, height, width = _grid(model, image)
        merge: int = model.config.vision_config.spatial_merge_size
        return time * (height // merge) * (width // merge)
    if image.num_tokens is None:
        raise ValueError(
            f"image {image.key!r} does not say how many tokens it takes (num_tokens), which {type(model).__name__} needs; "
            "encode it with this model's own processor"
        )
    return image.num_tokens


def _grid(model: PreTrainedModel, image: EncodedImage) -> tuple[int, int, int]:
    if image.grid_thw is None:
        raise ValueError(
            f"image {image.key!r} has no grid of patches (grid_thw), which {type(model).__name__} needs; "
            "encode it with this model's own processor"
        )
    return image.grid_thw


def check_prompt_images(model: PreTrainedModel, prompt: EncodedPrompt) -> None:
    """Raise ValueError, naming the prompt, unless its image tokens are marked as such and belong to its own images.

    Without this a prompt that lost its images would be read as text, or take those of the next prompt in a packed row.
    """
    image_id = image_token_id(model)
    if image_id is None:
        return
    is_image = prompt.input_ids == image_id
    if not torch.equal(is_image, prompt.token_types == 1):
        raise ValueError(
            f"prompt {prompt.id!r}: input_ids hold {int(is_image.sum())} image tokens, token_types mark "
            f"{int((prompt.token_types == 1).sum())} places; they must be the same places"
        )
    try:
        expected = sum(image_tokens(model, image) for image in prompt.images)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r}: {error}") from error
    if int(is_image.sum()) != expected:
        raise ValueError(
            f"prompt {prompt.id!r} holds {int(is_image.sum())} image tokens, but its {len(prompt.images)} images take {expected}"
        )
    if prompt.images and uses_mrope(model):
        try:
            segment_positions(model, prompt.token_types, prompt.images)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error


def forest_positions(
    model: PreTrainedModel, layout: PackedLayout, token_types: Tensor, images: Sequence[EncodedImage]
) -> Tensor:
    """`position_ids` for the model's forward on one packed row, on the layout's device.

    int64 ``[1, T]`` for models with one row of ids; ``[4, 1, T]`` with M-RoPE: the index along the path (which attention
    sees), then time, height, width.

    token_types: int64 ``[T]``. images: in order of appearance in the row. Raises ValueError for an image whose tokens do not lie
    in one segment, and for more or fewer images than the image tokens ask for.
    """
    if not uses_mrope(model):
        if images:
            _images_by_segment(model, layout, token_types, images)
        return layout.position_ids.unsqueeze(0)
    per_segment = _images_by_segment(model, layout, token_types, images)
    # An id of a text token is its index along the path plus a shift; an image shifts all that follows it on its path.
    first_index: list[int] = []
    shifts: list[int] = []
    shifts_after: list[int] = []
    image_ids: list[tuple[int, Tensor]] = []
    start = 0
    for segment, (length, parent) in enumerate(zip(layout.lengths, layout.parents, strict=True)):
        first_index.append(first_index[parent] + layout.lengths[parent] if parent >= 0 else 0)
        shifts.append(shifts_after[parent] if parent >= 0 else 0)
        shifts_after.append(shifts[segment])
        if segment in per_segment:
            relative = segment_positions(model, token_types[start : start + length], per_segment[segment])
            image_ids.append((start, relative + (first_index[segment] + shifts[segment])))
            shifts_after[segment] += int(relative[:, -1].max()) + 1 - length
        start += length
    index = layout.position_ids
    text = index + torch.tensor(shifts, device=index.device)[layout.segment_ids]
    positions = torch.stack((index, text, text, text))
    for start, ids in image_ids:
        positions[1:, start : start + ids.shape[1]] = ids.to(index.device)
    return positions.unsqueeze(1)


def _images_by_segment(
    model: PreTrainedModel, layout: PackedLayout, token_types: Tensor, images: Sequence[EncodedImage]
) -> dict[int, list[EncodedImage]]:
    """Which images lie in which segment."""
    owners = layout.segment_ids.cpu()[token_types.cpu() == 1]
    counts: list[int] = torch.bincount(owners, minlength=layout.num_segments).tolist()
    queue = list(images)
    result: dict[int, list[EncodedImage]] = {}
    taken = 0
    for segment, needed in enumerate(counts):
        while needed > 0:
            if taken == len(queue):
                raise ValueError(
                    f"segment {segment} has {needed} image tokens left, but all {len(queue)} images are placed"
                )
            size = image_tokens(model, queue[taken])
            if size > needed:
                raise ValueError(
                    f"image {taken} takes {size} tokens, but segment {segment} has {needed} image tokens left for it; "
                    "an image must lie in one segment"
                )
            result.setdefault(segment, []).append(queue[taken])
            taken += 1
            needed -= size
    if taken != len(queue):
        raise ValueError(f"{len(queue)} images for tokens that hold {taken}; every image needs its image tokens")
    return result

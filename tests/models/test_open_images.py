"""Image tokens that see one another: the layout's rule is transformers' mask, for full layers and for windows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model
from torch import Tensor
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from specs_fast.models.forest import image_spans, with_open_images
from specs_fast.models.images import images_see_both_ways
from specs_kernels import PackedLayout


def types_of(row: str) -> Tensor:
    """ "i" is an image token."""
    return torch.tensor([int(letter == "i") for letter in row])


def gemma3() -> torch.nn.Module:
    """As far as the layout is concerned."""
    model = make_model("gemma3_text")
    model.config.model_type = "gemma3"
    return model


@pytest.mark.parametrize("window", [1, 2, 3, 4, 6, 30])
@pytest.mark.parametrize("row", ["tiiiitttiiit", "iiit", "ttiiiiii", "titit", "tttt", "iiiiiiiittttttiiit"])
def test_open_images_are_the_mask_of_transformers(row: str, window: int) -> None:
    types = types_of(row)
    layout = PackedLayout.from_segments([len(row)], [-1])
    opened = with_open_images(gemma3(), layout, types)
    config = Gemma3TextConfig(sliding_window=window, attn_implementation="eager")
    masks = create_masks_for_vision_model(
        config, torch.zeros(1, len(row), 4), None, None, None, get_block_sequence_ids_for_mask(types[None])
    )
    for name, ours in (("full_attention", opened.dense_mask()), ("sliding_attention", opened.dense_mask(window))):
        assert torch.equal(masks[name][0, 0] == 0, ours), name


def test_each_path_of_a_forest_has_its_own_images() -> None:
    """Two prompts that touch with images; a child with an image; an empty segment between parent and child."""
    layout = PackedLayout.from_segments([4, 3, 0, 2, 3], [-1, 0, 0, 2, -1])
    types = types_of("tiit" + "tii" + "ti" + "iit")
    assert image_spans(layout, types) == [(1, 3), (5, 7), (8, 9), (9, 11)]


@pytest.mark.parametrize("lengths, parents", [([3, 2], [-1, 0]), ([3, 0, 2], [-1, 0, 1])])
def test_images_that_touch_across_segments_are_refused(lengths: list[int], parents: list[int]) -> None:
    layout = PackedLayout.from_segments(lengths, parents)
    with pytest.raises(
        ValueError, match=r"token 3 goes on with the image tokens that end segment 0, but lies in segment"
    ):
        image_spans(layout, types_of("tii" + "it"))


def test_other_models_and_rows_without_images_keep_their_layout() -> None:
    layout = PackedLayout.from_segments([4], [-1])
    assert not images_see_both_ways(make_model("gemma3_text"))
    assert with_open_images(make_model("gemma3_text"), layout, types_of("tiit")) is layout
    assert with_open_images(gemma3(), layout, types_of("tttt")) is layout
    opened = with_open_images(gemma3(), layout, types_of("tiit"))
    assert with_open_images(gemma3(), layout, types_of("tiit")) is opened  # kept, with the plans of its backends
    assert with_open_images(gemma3(), opened, types_of("tiit")) is opened
    assert opened.bidirectional == ((1, 3),)
    assert layout.bidirectional == ()

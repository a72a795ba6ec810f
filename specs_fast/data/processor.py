"""A small image + text processor for Qwen-style vision-language models that needs neither torchvision nor remote code.

transformers' own Qwen processors require a video processor, and that requires torchvision. This one has an image processor
and a tokenizer, nothing else, and works with any of the Qwen2-VL family (the image processor is transformers' PIL one).
Importing this module registers the class, so that ``AutoProcessor.from_pretrained`` finds it by name in a saved folder.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<|image_pad|>"


class ImageTextProcessor(ProcessorMixin):
    """Turns text with image placeholders, and images, into a model's inputs.

    Every ``<|image_pad|>`` of the text is expanded to one token per merged patch of its image: ``t * h * w / merge_size**2``.

    Returns (through ``__call__``): ``input_ids`` and ``attention_mask`` ``[B, L]``; ``mm_token_type_ids`` ``[B, L]``, 1 on
    image tokens; with images ``pixel_values`` float32 ``[patches of all images, channels * temporal * patch * patch]`` and
    ``image_grid_thw`` int64 ``[images, 3]``, in patches before merging.

    Raises ValueError when the number of placeholders differs from the number of images.
    """

    return_mm_token_type_ids = True
    text_kwargs = {"return_token_type_ids": False}

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {IMAGE_TOKEN!r}, which stands for an image in a prompt; add it"
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The expanded placeholder of one image (called by ``ProcessorMixin``)."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (patches // self.image_processor.merge_size**2)


class ImageTextProcessorConfig(PreTrainedConfig):
    """The key under which AutoProcessor's registry holds :class:`ImageTextProcessor`; no model uses it."""

    model_type = "specs_fast_image_text"


def register() -> None:
    """Makes ``AutoProcessor`` find :class:`ImageTextProcessor`; calling it again changes nothing."""
    AutoProcessor.register(ImageTextProcessorConfig, ImageTextProcessor, exist_ok=True)


def image_processor(patch_size: int, merge_size: int, temporal_patch_size: int, max_pixels: int) -> Any:
    """transformers' PIL Qwen image processor for images whose sides are multiples of ``patch_size * merge_size``.

    Pixels are scaled to [-1, 1]. Other sizes are resized to the nearest such multiple within ``max_pixels``.
    """
    return Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=temporal_patch_size,
        size={"shortest_edge": (patch_size * merge_size) ** 2, "longest_edge": max_pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


register()

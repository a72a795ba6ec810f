"""Prompt and text -> token ids and pixels, through the model's own processor or tokenizer.

One template pipeline for every stage: what the sampler saw is what the trainer scores.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from specs_fast.data.types import EncodedImage, EncodedPrompt, Prompt

CACHE_BYTES = 256 * 2**20
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
_FRAME_INPUTS = {"pixel_values", "pixel_attention_mask"}


class Encoder:
    """Encodes prompts and completions with a transformers processor (or a tokenizer, for text-only models).

    Encoded prompts are kept under a byte budget, so a prompt's pixels are prepared once while it stays in use.
    Processors of the Qwen-VL family give a grid of patches per image; those of LLaVA, Idefics3, SmolVLM and Gemma-3 give frames,
    one or several per image.

    Raises ValueError naming the row for: a text with more or fewer image placeholders than the prompt has images, more or
    fewer image tokens than the images ask for (a literal image token in the text), a processor that returns image inputs of
    another form, videos.
    """

    def __init__(self, processor: Any, end_token_ids: Iterable[int] = ()) -> None:
        """end_token_ids: what ends a completion besides the tokenizer's own token; `decode` leaves them out too."""
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token; set one, responses must be able to end")
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)
        self._silent = {self.eos_token_id, self.pad_token_id, *end_token_ids}
        self.image_token_id = _image_token_id(processor)
        self._cache: OrderedDict[tuple[str, str], tuple[Prompt, EncodedPrompt]] = OrderedDict()
        self._cached_bytes = 0

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        """The prompt through the chat template, generation prompt added, image tokens expanded."""
        key = (prompt.source, prompt.id)
        if key in self._cache:
            known, encoded = self._cache[key]
            if _same(known, prompt):
                self._cache.move_to_end(key)
                return encoded
            del self._cache[key]
            self._cached_bytes -= _size(encoded)
        encoded = self._encode(prompt)
        self._cache[key] = (prompt, encoded)
        self._cached_bytes += _size(encoded)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, (_, dropped) = self._cache.popitem(last=False)
            self._cached_bytes -= _size(dropped)
        return encoded

    def completion(self, text: str) -> Tensor:
        """int64 ``[R]``: the text's tokens with end-of-sequence appended. Empty text raises: it has nothing to learn."""
        if not text.strip():
            raise ValueError("an empty completion cannot be trained on; drop the row")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.eos_token_id], dtype=torch.int64)

    def decode(self, token_ids: Tensor) -> str:
        """Text of a completion without its end-of-sequence and padding tokens; every other token stays visible."""
        ids = [token for token in token_ids.tolist() if token not in self._silent]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        messages = [{**message, "content": list(message["content"])} for message in prompt.messages]
        if self.image_token_id is None:
            if prompt.images:
                raise ValueError(
                    f"{prompt.source}: the prompt has {len(prompt.images)} images but the model reads text only"
                )
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        try:
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises whatever it likes: unknown roles, an order of turns, no template
            raise ValueError(
                f"{prompt.source}: the model's chat template refused the prompt ({type(error).__name__}: {error}); "
                "change the row's roles or turns, or give the tokenizer a chat template that takes them"
            ) from error
        if self.image_token_id is None:
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            return EncodedPrompt(prompt.id, ids, torch.zeros_like(ids))
        images = [image for image in prompt.images]
        self._check_placeholders(text, prompt, len(images))
        inputs = self._process(text, images, prompt.source)
        ids = torch.as_tensor(inputs["input_ids"], dtype=torch.int64)[0]
        encoded_images = self._images(inputs, images, prompt.source)
        token_types = (ids == self.image_token_id).to(torch.int64)
        self._check_image_tokens(int(token_types.sum()), encoded_images, prompt.source)
        return EncodedPrompt(prompt.id, ids, token_types, encoded_images)

    def _process(self, text: str, images: Sequence[Image.Image], source: str) -> Any:
        try:
            return self.processor(
                text=[text], images=list(images) or None, add_special_tokens=False, return_tensors="pt", padding=False
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: the processor refused the prompt: {error}") from error

    def _check_placeholders(self, text: str, prompt: Prompt, num_images: int) -> None:
        """Before expansion the text holds one placeholder per image, and no token that an expanded one consists of."""
        placeholder = self.processor.image_token
        feature = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        found = text.count(placeholder)
        if found != num_images:
            raise ValueError(
                f"{prompt.source}: prompt {prompt.id!r} has {num_images} images, but its text holds {found} image placeholders "
                f"({placeholder!r}); give one image part per image, remove a literal placeholder from the text, or use a chat "
                "template that writes one for each image part"
            )
        if feature != placeholder and feature in text:
            raise ValueError(
                f"{prompt.source}: the text of prompt {prompt.id!r} holds the image token {feature!r} literally; remove it"
            )

    def _images(self, inputs: Any, images: Sequence[Image.Image], source: str) -> tuple[EncodedImage, ...]:
        """The images of one processed prompt, one by one."""
        if not images:
            return ()
        if "image_grid_thw" in inputs:
            return _split_patches(inputs, len(images), source)
        unknown = sorted(set(inputs) - _TEXT_INPUTS - _FRAME_INPUTS)
        if unknown or "pixel_values" not in inputs:
            raise ValueError(
                f"{source}: the processor returned {sorted(inputs)}; of image inputs, {sorted(_FRAME_INPUTS)} are known, and "
                "'pixel_values' with 'image_grid_thw'"
            )
        if len(images) == 1:
            return (self._frames(inputs),)
        # Which frames and how many tokens are an image's own is known from processing it alone.
        encoded = tuple(self._frames(self._process(self.processor.image_token, [image], source)) for image in images)
        together = _without_prompts(torch.as_tensor(inputs["pixel_values"], dtype=torch.float32))
        parts = [image.pixel_values for image in encoded]
        alike = len({part.shape[1:] for part in parts}) == 1 and torch.equal(torch.cat(parts), together)
        if not alike:
            raise ValueError(
                f"{source}: the processor prepares {len(images)} images together otherwise than one by one; "
                "turn off what depends on the other images (padding to the largest)"
            )
        return encoded

    def _frames(self, inputs: Any) -> EncodedImage:
        """The only image of a processed text: all of its frames and image tokens."""
        pixels = _without_prompts(torch.as_tensor(inputs["pixel_values"], dtype=torch.float32)).clone()
        mask = inputs.get("pixel_attention_mask")
        if mask is not None:
            mask = torch.as_tensor(mask)[0].bool()
        num_tokens = inputs["input_ids"][0].tolist().count(self.image_token_id)
        parts = [tensor.contiguous().numpy().tobytes() for tensor in (pixels, mask) if tensor is not None]
        digest = hashlib.sha1(b"".join((repr(tuple(pixels.shape)).encode(), *parts))).hexdigest()
        return EncodedImage(digest, pixels, num_tokens=num_tokens, pixel_attention_mask=mask)

    def _check_image_tokens(self, found: int, images: Sequence[EncodedImage], source: str) -> None:
        merge = int(getattr(getattr(self.processor, "image_processor", None), "merge_size", 1))
        expected = sum(_num_tokens(image, merge) for image in images)
        if found != expected:
            raise ValueError(
                f"{source}: {found} image tokens in the encoded prompt but its {len(images)} images need {expected}; "
                "remove the literal image token from the text, or fix the processor's merge_size"
            )


def check_lengths(
    prompts: Iterable[Prompt],
    encoder: Encoder,
    max_prompt_tokens: int | None,
    *,
    filter_overlong: bool,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Prompt], int]:
    """Encode every prompt once and hold it to ``max_prompt_tokens``: (prompts that fit, number filtered).

    A prompt is never cut. One that is too long raises, naming row, length and limit, unless ``filter_overlong``.
    """
    kept, filtered = [], 0
    for prompt in prompts:
        length = len(encoder.prompt(prompt))
        advance()
        if max_prompt_tokens is not None and length > max_prompt_tokens:
            if not filter_overlong:
                raise ValueError(
                    f"{prompt.source}: the prompt has {length} tokens, data.max_prompt_tokens is {max_prompt_tokens}; prompts "
                    "are never cut: raise the limit, shrink the image, or set data.filter_overlong=true to leave such rows out"
                )
            filtered += 1
            continue
        kept.append(prompt)
    if not kept:
        raise ValueError(
            f"all {filtered} prompts are longer than data.max_prompt_tokens={max_prompt_tokens}; none is left"
        )
    return kept, filtered


def _num_tokens(image: EncodedImage, merge: int) -> int:
    if image.grid_thw is None:
        return image.num_tokens or 0
    time, height, width = image.grid_thw
    return time * height * width // merge**2


def _without_prompts(pixels: Tensor) -> Tensor:
    """Frames ``[frames, C, H, W]``: SmolVLM and Idefics3 have a leading dimension of prompts, here of one."""
    return pixels[0] if pixels.ndim == 5 else pixels


def _split_patches(inputs: Any, num_images: int, source: str) -> tuple[EncodedImage, ...]:
    """Images of a Qwen-VL processor: patches of all of them in one row, and a grid for each."""
    grids = [(int(t), int(h), int(w)) for t, h, w in inputs["image_grid_thw"]]
    pixels = torch.as_tensor(inputs["pixel_values"], dtype=torch.float32)
    if len(grids) != num_images:
        raise ValueError(f"{source}: the processor returned {len(grids)} image grids for {num_images} images")
    images = []
    for grid, patches in zip(grids, pixels.split([t * h * w for t, h, w in grids]), strict=True):
        digest = hashlib.sha1(repr(grid).encode() + patches.contiguous().numpy().tobytes()).hexdigest()
        images.append(EncodedImage(digest, patches.clone(), grid))
    return tuple(images)


def _image_token_id(processor: Any) -> int | None:
    if not hasattr(processor, "image_processor"):
        return None
    # Of Gemma-3's processor `image_token_id` is the placeholder, and another token stands for a feature.
    token_id = getattr(processor, "image_token_ids", [None])[0]
    if token_id is None:
        token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return int(token_id)


def _same(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts are encoded alike; of pictures that come from no file only the same prompt says so."""
    known_images = bool(one.image_paths) or not (one.images or other.images)
    return one is other or (known_images and one.messages == other.messages and one.image_paths == other.image_paths)


def _size(prompt: EncodedPrompt) -> int:
    masks = [image.pixel_attention_mask for image in prompt.images if image.pixel_attention_mask is not None]
    return prompt.input_ids.nbytes + sum(tensor.nbytes for tensor in (*(i.pixel_values for i in prompt.images), *masks))

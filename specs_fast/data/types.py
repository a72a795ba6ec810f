"""The values that pass between the trainer's parts: prompts, encoded prompts, trees to score, completions, scores.

Letters: P prompt tokens, R response tokens, N scored tokens of a batch, S responses of a batch.
All of them are plain immutable records; none knows a model or a file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

DEFAULT_TAGS = ("think", "answer")


@dataclass(frozen=True)
class Prompt:
    """One question as a row of a data file states it.

    messages: chat messages whose ``content`` is a list of parts, ``{"type": "image"}`` or ``{"type": "text", "text": str}``;
        the i-th image part stands for ``images[i]``.
    images: RGB images, one per image part (decoded when read).
    image_paths: where they came from (for reports), one per image.
    columns: every other column of the row (``answer``, ``tags``, a user's own), passed to reward functions by name.
    source: ``file:row`` for error messages.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    images: Sequence[Image.Image] = ()
    image_paths: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def text(self) -> str:
        """The user-visible text of the prompt, image parts dropped."""
        parts = [part.get("text", "") for message in self.messages for part in message["content"]]
        return " ".join(part for part in parts if part)

    @property
    def tags(self) -> tuple[str, str]:
        """Names of the reasoning and the answer tag that this prompt asks for."""
        reasoning, answer = self.columns.get("tags", DEFAULT_TAGS)
        return reasoning, answer


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected response text."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class EncodedImage:
    """One image as its model's processor prepared it.

    key: content hash; equal keys mean equal pixels, so an image is encoded once however many prompts show it.

    Qwen-VL family: pixel_values float32 ``[patches, patch_dim]``, and grid_thw, patches in time, height, width (before
    merging).
    Other models: pixel_values float32 ``[frames, C, H, W]``, one frame or, of an image that is shown in tiles or crops,
    several; num_tokens, the tokens that the image takes in the text; pixel_attention_mask bool ``[frames, H, W]`` where the
    model takes one (False on padding).
    """

    key: str
    pixel_values: Tensor
    grid_thw: tuple[int, int, int] | None = None
    num_tokens: int | None = None
    pixel_attention_mask: Tensor | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenised prompt, image placeholders expanded to one token per image feature.

    input_ids: int64 ``[P]``. token_types: int64 ``[P]``, 0 for text and 1 for image tokens.
    images: in order of appearance.
    """

    id: str
    input_ids: Tensor
    token_types: Tensor
    images: tuple[EncodedImage, ...] = ()

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class Tree:
    """A prompt and the responses to score under it: int64 ``[R_i]`` each; ``R_i = 0`` is allowed."""

    prompt: EncodedPrompt
    responses: tuple[Tensor, ...]

    @property
    def num_response_tokens(self) -> int:
        return sum(int(response.shape[0]) for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree when the prompt is stored once."""
        return len(self.prompt) + self.num_response_tokens


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    token_ids: int64 ``[R]``, the end-of-sequence token included where the model produced one.
    logp: float32 ``[R]``, log softmax(logits / temperature) of each drawn token, before any top-k or top-p truncation.
    finished: False when ``max_new_tokens`` cut it off.
    """

    token_ids: Tensor
    logp: Tensor
    finished: bool

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True)
class Scores:
    """Log-probs of every response token of a list of trees, packed.

    logp, entropy: float32 ``[N]`` in tree order, responses of a tree in order (entropy None unless asked for).
    segment_ids: int64 ``[N]``, the response each token belongs to, counted 0..S-1 over all trees.
    lengths: int64 ``[S]``, tokens per response (0 for an empty one).
    """

    logp: Tensor
    entropy: Tensor | None
    segment_ids: Tensor
    lengths: Tensor

    @staticmethod
    def segments(lengths: Tensor) -> Tensor:
        """Segment ids ``[N]`` of responses with these lengths ``[S]``."""
        return torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)

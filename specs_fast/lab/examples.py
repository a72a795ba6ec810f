"""Batches for pre-training the base: images with known digits, and questions with a response in some style.

Letters: B images, L tokens, H and W canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specs_fast.data.processor import IMAGE_TOKEN
from specs_fast.lab.digits import load_scans
from specs_fast.lab.processor import END, MERGE_SIZE, PATCH_SIZE, START, VISION_END, VISION_START
from specs_fast.lab.questions import Question
from specs_fast.lab.scenes import HEIGHT, WIDTH, Look, Scene, compose

CELL = PATCH_SIZE * MERGE_SIZE
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL
IMAGE_TOKENS = ROWS * COLUMNS
GRID = (1, HEIGHT // PATCH_SIZE, WIDTH // PATCH_SIZE)
NO_DIGIT = 10


def patchify(pixels_BHW: NDArray[np.uint8]) -> Tensor:
    """Grey images as the processor prepares them: float32 ``[B * patches, 3 * patch * patch]``, in merge order."""
    count = len(pixels_BHW)
    scaled = pixels_BHW.astype(np.float32) / 127.5 - 1.0
    tiles = scaled.reshape(count, ROWS, MERGE_SIZE, PATCH_SIZE, COLUMNS, MERGE_SIZE, PATCH_SIZE)
    tiles = tiles.transpose(0, 1, 4, 2, 5, 3, 6)
    patches = tiles.reshape(-1, 1, PATCH_SIZE * PATCH_SIZE).repeat(3, axis=1)
    return torch.from_numpy(np.ascontiguousarray(patches.reshape(len(patches), -1)))


def grid(count: int) -> Tensor:
    """``image_grid_thw`` int64 ``[count, 3]`` of lab images."""
    return torch.tensor([GRID] * count, dtype=torch.int64)


def cell_targets(scenes: Sequence[Scene], digits: Sequence[Sequence[int]]) -> Tensor:
    """What each image token should see: float32 ``[B, tokens, 11]``, summing to one.

    A digit is shared among the cells around its centre with bilinear weights, so a digit between two cells belongs to both;
    class 10 is "no digit".
    """
    target = np.zeros((len(scenes), ROWS, COLUMNS, NO_DIGIT + 1), dtype=np.float32)
    for scene, labels, cells in zip(scenes, digits, target, strict=True):
        for (y, x), label in zip(scene.centres, labels, strict=True):
            row, column = y / CELL - 0.5, x / CELL - 0.5
            for i in range(ROWS):
                for j in range(max(0, int(column)), min(COLUMNS, int(column) + 2)):
                    weight = max(0.0, 1.0 - abs(row - i)) * max(0.0, 1.0 - abs(column - j))
                    cells[i, j, label] += weight
    seen = target[..., :NO_DIGIT].sum(-1, keepdims=True)
    target[..., :NO_DIGIT] /= np.maximum(seen, 1.0)
    target[..., NO_DIGIT] = 1.0 - target[..., :NO_DIGIT].sum(-1)
    return torch.from_numpy(target.reshape(len(scenes), IMAGE_TOKENS, NO_DIGIT + 1))


def draw_scenes(digits: Sequence[Sequence[int]], looks: Sequence[Look], rng: np.random.Generator) -> list[Scene]:
    """A training scene for each row of digits."""
    scans = load_scans("train")
    return [compose(scans, scans.draw(list(row), rng), look, rng) for row, look in zip(digits, looks, strict=True)]


@dataclass(frozen=True)
class Batch:
    """input_ids int64 ``[B, L]`` right-padded; loss_mask bool ``[B, L]``, True on response tokens (end token included);
    pixel_values float32 ``[B * patches, patch_dim]``."""

    input_ids: Tensor
    loss_mask: Tensor
    pixel_values: Tensor


def render_prompt(text: str) -> str:
    """What the chat template makes of an image and this text, the image placeholder already expanded."""
    image = VISION_START + IMAGE_TOKEN * IMAGE_TOKENS + VISION_END
    return f"{START} user {image} {text}{END}\n{START} assistant "


def make_batch(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], responses: Sequence[str], scenes: Sequence[Scene]
) -> Batch:
    """Prompt, response and end token of each row."""
    prompts = tokenizer([render_prompt(question.text) for question in questions], add_special_tokens=False)["input_ids"]
    answers = tokenizer([response + END for response in responses], add_special_tokens=False)["input_ids"]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        loss_mask[i, len(prompt) : len(row)] = True
    return Batch(input_ids, loss_mask, patchify(np.stack([scene.pixels for scene in scenes])))

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
class Exchange:
    """A question and responses to it, in any styles."""

    question: Question
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Rows of small forests: image -> questions -> responses, so that an image and a question are computed once.

    input_ids int64 ``[B, L]``, right-padded. depths int64 ``[B, L]``: index of a token along its own path. visible bool
    ``[B, 1, L, L]``: key j is visible to query i where j is i or lies before it on its path. targets int64 ``[N]`` with
    predictors int64 ``[N]``: every response token (end token included) and the flat position that predicts it.
    pixel_values float32 ``[B * patches, patch_dim]``.
    """

    input_ids: Tensor
    depths: Tensor
    visible: Tensor
    targets: Tensor
    predictors: Tensor
    pixel_values: Tensor


def prompt_head() -> str:
    """How every lab prompt starts: the user's turn and one image, the placeholder already expanded."""
    return f"{START} user {VISION_START}{IMAGE_TOKEN * IMAGE_TOKENS}{VISION_END} "


def prompt_tail(text: str) -> str:
    """How it goes on: the question, and the turn of the assistant."""
    return f"{text}{END}\n{START} assistant "


class _Row:
    """One forest under construction, in depth-first order."""

    def __init__(self, head: list[int]) -> None:
        self.ids = list(head)
        self.depths = list(range(len(head)))
        self.until: list[int] = [0] * len(head)
        self.targets: list[tuple[int, int]] = []

    def add(self, ids: list[int], depth: int) -> None:
        self.ids += ids
        self.depths += range(depth, depth + len(ids))
        self.until += [0] * len(ids)

    def close(self, start: int, length: int) -> None:
        """The ``length`` tokens from ``start`` are visible up to here."""
        self.until[start : start + length] = [len(self.ids)] * length


def make_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Exchange]], scenes: Sequence[Scene]
) -> Batch:
    """One row per image: ``conversations[i]`` are the exchanges about ``scenes[i]``."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    head = encode([prompt_head()])[0]
    exchanges = [exchange for conversation in conversations for exchange in conversation]
    tails = iter(encode([prompt_tail(exchange.question.text) for exchange in exchanges]))
    replies = iter(encode([text + END for exchange in exchanges for text in exchange.responses]))
    rows = []
    for conversation in conversations:
        row = _Row(head)
        for exchange in conversation:
            tail, start = next(tails), len(row.ids)
            row.add(tail, len(head))
            for _ in exchange.responses:
                reply, begin = next(replies), len(row.ids)
                predictors = [start + len(tail) - 1, *range(begin, begin + len(reply) - 1)]
                row.targets += zip(predictors, reply, strict=True)
                row.add(reply, len(head) + len(tail))
                row.close(begin, len(reply))
            row.close(start, len(tail))
        row.close(0, len(head))
        rows.append(row)
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    depths = torch.zeros(len(rows), width, dtype=torch.int64)
    until = torch.full((len(rows), width), width)
    for i, row in enumerate(rows):
        size = len(row.ids)
        input_ids[i, :size], depths[i, :size] = torch.tensor(row.ids), torch.tensor(row.depths)
        until[i, :size] = torch.tensor(row.until)
    index = torch.arange(width)
    visible = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < until[:, None, :])
    predictors = [i * width + predictor for i, row in enumerate(rows) for predictor, _ in row.targets]
    targets = [target for row in rows for _, target in row.targets]
    pixels = patchify(np.stack([scene.pixels for scene in scenes]))
    return Batch(input_ids, depths, visible[:, None], torch.tensor(targets), torch.tensor(predictors), pixels)

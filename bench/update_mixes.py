"""The mixes that ``bench.update`` takes updates of: prompts, responses and images of the lab-width model, by their lengths.

PxRxG: prompts of P tokens with G responses of R, a sixteenth of lengths that GRPO and DPO have in practice, so that the share
of repeated tokens, G (P + R) / (P + G R), is theirs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from specs_fast.data.processor import IMAGE_TOKEN
from specs_fast.data.types import EncodedImage, EncodedPrompt, Tree
from specs_fast.lab.model import new_model
from specs_fast.lab.processor import SPECIAL, VISION_END, VISION_START, build_tokenizer
from specs_fast.models.load import vision_tower

TOKENIZER = build_tokenizer()
IMAGE, VISION_BEGIN, VISION_STOP = TOKENIZER.convert_tokens_to_ids([IMAGE_TOKEN, VISION_START, VISION_END])
PATCH, MERGE, TEMPORAL = 8, 2, 1


@dataclass(frozen=True)
class Mix:
    """Lengths are (smallest, largest); a prompt's include its image. grid: time, height, width of an image in patches.

    without_native: there is an arm without the native library as well.
    """

    name: str
    prompts: int
    prompt_tokens: tuple[int, int]
    responses: int
    response_tokens: tuple[int, int]
    grid: tuple[int, int, int] | None = None
    vision: Literal["trained", "frozen"] = "frozen"
    loss: Literal["grpo", "dpo"] = "grpo"
    without_native: bool = False

    @property
    def image_tokens(self) -> int:
        return 0 if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2] // MERGE**2

    @property
    def shape(self) -> dict[str, Any]:
        """What a result's section says of it."""
        return {**asdict(self), "image_tokens": self.image_tokens}


def grpo(prompt: int, response: int, group: int, prompts: int) -> Mix:
    return Mix(f"{prompt}x{response}x{group}", prompts, (prompt, prompt), group, (response, response))


def with_images(name: str, *sizes: Any, grid: tuple[int, int, int], without_native: bool = True) -> list[Mix]:
    """The mix with the vision tower trained, and frozen."""
    return [
        Mix(f"{name}, tower {vision}", *sizes, grid, vision, without_native=without_native)  # type: ignore[arg-type]
        for vision in ("trained", "frozen")
    ]


LAB = [
    *with_images("8x(86+8x40), image of 64 tokens", 8, (86, 86), 8, (40, 40), grid=(1, 16, 16)),
    *with_images("8x(86+8x40), image of 12 tokens", 8, (86, 86), 8, (40, 40), grid=(1, 4, 12)),
    *with_images("lab: 16x(~35+8x~20), image of 12 tokens", 16, (32, 38), 8, (14, 26), grid=(1, 4, 12)),
]
IMAGE_HEAVY = with_images(
    "image-heavy: 600x60x8, image of 576 tokens", 1, (600, 600), 8, (60, 60), grid=(1, 48, 48), without_native=False
)
MIXES = [
    *LAB,
    *IMAGE_HEAVY,
    grpo(32, 32, 8, prompts=4),
    grpo(256, 64, 8, prompts=1),
    grpo(256, 16, 8, prompts=1),
    grpo(512, 64, 16, prompts=1),
    grpo(64, 256, 8, prompts=1),
    Mix("128x32x2, DPO pairs", 8, (128, 128), 2, (16, 48), loss="dpo"),
    Mix("one long sequence", 1, (256, 256), 1, (1792, 1792)),
    Mix("many short sequences", 64, (8, 24), 1, (4, 40)),
]
TINY = [
    *with_images("8x(86+8x40), image of 64 tokens", 2, (14, 14), 2, (3, 4), grid=(1, 4, 4)),
    Mix("128x32x2, DPO pairs", 2, (5, 7), 2, (2, 4), loss="dpo"),
    Mix("many short sequences", 3, (2, 4), 1, (1, 4)),
]


def lab_width_model(*, freeze_vision: bool, seed: int = 0) -> PreTrainedModel:
    """The lab's Qwen3-VL with random weights: 1.4 M parameters."""
    model = new_model(TOKENIZER, seed)
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(not freeze_vision)
    return model


def make_trees(mix: Mix, seed: int = 0) -> list[Tree]:
    """Random prompts, each with one image of its own where the mix has images, and random responses, of the mix's lengths."""
    generator = torch.Generator().manual_seed(seed)

    def length(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    def text(count: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), len(TOKENIZER), (count,), generator=generator)

    def prompt_of(index: int) -> EncodedPrompt:
        if mix.grid is None:
            ids = text(length(mix.prompt_tokens))
            return EncodedPrompt(str(index), ids, torch.zeros_like(ids))
        pixels = torch.randn(mix.image_tokens * MERGE**2, 3 * TEMPORAL * PATCH * PATCH, generator=generator)
        image = torch.full((mix.image_tokens,), IMAGE)
        head, tail = 6, length(mix.prompt_tokens) - 6 - 2 - len(image)
        ids = torch.cat((text(head), torch.tensor([VISION_BEGIN]), image, torch.tensor([VISION_STOP]), text(tail)))
        shown = EncodedImage(f"{mix.name} {index}", pixels, mix.grid)
        return EncodedPrompt(str(index), ids, (ids == IMAGE).long(), (shown,))

    prompts = [prompt_of(index) for index in range(mix.prompts)]
    return [Tree(prompt, tuple(text(length(mix.response_tokens)) for _ in range(mix.responses))) for prompt in prompts]

"""Pre-training of the base in two stages: first the vision tower learns to see, then the whole model learns to talk.

Step budgets, not time budgets, and one generator: the same seed and thread count give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from specs_fast.lab.examples import (
    IMAGE_TOKENS,
    NO_DIGIT,
    Batch,
    Exchange,
    cell_targets,
    draw_scenes,
    grid,
    make_batch,
    patchify,
)
from specs_fast.lab.model import HIDDEN
from specs_fast.lab.questions import ASKED_TAGS, OTHER_TAGS, draw_question
from specs_fast.lab.responses import NO_MISTAKES, READING, STYLES, Mistakes, draw_style, write_response
from specs_fast.lab.scenes import PLAIN, VARIED

Progress = Callable[[str, int, int, float], None]
"""(stage, step, steps, loss)."""


@dataclass(frozen=True)
class Recipe:
    """Step budgets and learning rates of the base.

    vision_steps: per-image-token digit reading. skill_steps: responses that reason only. style_steps: the full style mix, with
    mistakes. varied: share of language images with the warm-up's disturbances. asked_tags: share of prompts asking for the tags
    of post-training.
    """

    seed: int = 0
    vision_batch: int = 64
    vision_steps: int = 1200
    vision_lr: float = 3e-3
    skill_steps: int = 700
    style_steps: int = 600
    language_lr: float = 1.5e-3
    images_per_step: int = 24
    questions_per_image: int = 2
    responses_per_question: int = 2
    weight_decay: float = 0.01
    varied: float = 0.3
    asked_tags: float = 0.4
    styles: dict[str, float] = field(default_factory=lambda: dict(STYLES))
    mistakes: Mistakes = Mistakes()


def _schedule(step: int, steps: int, warmup: int = 50) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    settings = [{"params": parameters, "lr": lr, "peak_lr": lr}]
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), weight_decay=weight_decay)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter], scale: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    optimizer.step()


def train_vision(
    model: Qwen3VLForConditionalGeneration, recipe: Recipe, rng: np.random.Generator, progress: Progress
) -> float:
    """Teaches the tower which digit each image token shows; the reading head is thrown away afterwards.

    Returns the share of training digits read rightly in the last 50 steps.
    """
    tower = model.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        head = nn.Linear((1 + len(tower.deepstack_visual_indexes)) * HIDDEN, NO_DIGIT + 1)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = _adamw(parameters, recipe.vision_lr, recipe.weight_decay)
    recent: list[float] = []
    for step in range(recipe.vision_steps):
        digits = [rng.integers(0, 10, int(rng.integers(1, 6))).tolist() for _ in range(recipe.vision_batch)]
        looks = [VARIED if rng.random() < 0.7 else PLAIN for _ in digits]
        scenes = draw_scenes(digits, looks, rng)
        target = cell_targets(scenes, digits)
        seen = tower(
            patchify(np.stack([scene.pixels for scene in scenes])), grid_thw=grid(len(scenes)), return_dict=True
        )
        features = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=-1)
        logits = head(features).view(len(scenes), IMAGE_TOKENS, NO_DIGIT + 1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
        _step(optimizer, loss, parameters, _schedule(step, recipe.vision_steps))
        recent.append(read_rate(logits, target))
        progress("vision", step + 1, recipe.vision_steps, loss.item())
    return float(np.mean(recent[-50:]))


def read_rate(logits: Tensor, target: Tensor) -> float:
    """Share of clearly visible digits (a cell with at least half of one) whose strongest digit class is right."""
    visible = target[..., :NO_DIGIT].amax(-1) >= 0.5
    hit = logits[..., :NO_DIGIT].argmax(-1) == target[..., :NO_DIGIT].argmax(-1)
    return float(hit[visible].float().mean())


def language_loss(model: Qwen3VLForConditionalGeneration, batch: Batch, positions_P: Tensor, *, frozen: bool) -> Tensor:
    """Mean cross-entropy over response tokens. ``positions_P`` int64 ``[3, P]``: M-RoPE position of each depth."""
    count = batch.input_ids.shape[0]
    with torch.set_grad_enabled(not frozen):
        seen = model.model.get_image_features(batch.pixel_values, grid(count), return_dict=True)
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.visible,
        position_ids=positions_P[:, batch.depths],
        image_grid_thw=grid(count),
        mm_encoder_outputs={"image": seen},
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.predictors])
    return F.cross_entropy(logits, batch.targets)


def lab_positions(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, width: int) -> Tensor:
    """M-RoPE positions int64 ``[3, width]``: every lab prompt starts with the same three tokens and one image."""
    types = torch.zeros(1, width, dtype=torch.int32)
    types[:, 3 : 3 + IMAGE_TOKENS] = 1
    ids = torch.full((1, width), int(tokenizer.eos_token_id))
    return model.model.get_rope_index(ids, types, image_grid_thw=grid(1))[0][:, 0]


def draw_language_batch(
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    styles: dict[str, float],
    mistakes: Mistakes,
    rng: np.random.Generator,
) -> Batch:
    """Fresh images, questions about each, and responses to each question in independent styles."""
    conversations, looks = [], []
    for _ in range(recipe.images_per_step):
        digits = rng.integers(0, 10, int(rng.integers(3, 5))).tolist()
        exchanges = []
        for _ in range(recipe.questions_per_image):
            pair = ASKED_TAGS if rng.random() < recipe.asked_tags else OTHER_TAGS[int(rng.integers(len(OTHER_TAGS)))]
            question = draw_question(rng, digits=digits, tags=(pair,))
            drawn = [draw_style(rng, styles) for _ in range(recipe.responses_per_question)]
            exchanges.append(
                Exchange(question, tuple(write_response(question, style, rng, mistakes) for style in drawn))
            )
        conversations.append(exchanges)
        looks.append(VARIED if rng.random() < recipe.varied else PLAIN)
    scenes = draw_scenes([conversation[0].question.digits for conversation in conversations], looks, rng)
    return make_batch(tokenizer, conversations, scenes)


def train_language(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rng: np.random.Generator,
    progress: Progress,
) -> None:
    """First only responses that reason (the skill), then the style mix with mistakes (the habit), under one schedule.
    The vision tower stays as the first stage left it."""
    positions = lab_positions(model, tokenizer, 256)
    tower = {id(parameter) for parameter in model.model.visual.parameters()}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in tower]
    optimizer = _adamw(parameters, recipe.language_lr, recipe.weight_decay)
    skill = {style: share for style, share in recipe.styles.items() if style in READING}
    steps = recipe.skill_steps + recipe.style_steps
    for step in range(steps):
        learning = step < recipe.skill_steps
        styles, mistakes = (skill, NO_MISTAKES) if learning else (recipe.styles, recipe.mistakes)
        batch = draw_language_batch(tokenizer, recipe, styles, mistakes, rng)
        loss = language_loss(model, batch, positions, frozen=True)
        _step(optimizer, loss, parameters, _schedule(step, steps))
        progress("skill" if learning else "style", step + 1, steps, loss.item())


def pretrain(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, progress: Progress
) -> dict[str, float]:
    """Both stages on a fresh model, in place. Returns what the stages measured."""
    rng = np.random.default_rng(recipe.seed)
    model.train()
    read = train_vision(model, recipe, rng, progress)
    train_language(model, tokenizer, recipe, rng, progress)
    model.eval()
    return {"train_read_rate": read}

"""Pre-training of the base in two stages: first the vision tower learns to see, then the whole model learns to talk.

Step budgets, not time budgets, and one generator: the same seed and thread count give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from specs_fast.lab.examples import IMAGE_TOKENS, NO_DIGIT, Batch, cell_targets, draw_scenes, grid, make_batch, patchify
from specs_fast.lab.model import HIDDEN
from specs_fast.lab.questions import ASKED_TAGS, OTHER_TAGS, draw_question
from specs_fast.lab.responses import READING, STYLES, Mistakes, draw_style, write_response
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
    batch_size: int = 64
    vision_steps: int = 1000
    vision_lr: float = 3e-3
    skill_steps: int = 700
    style_steps: int = 700
    language_lr: float = 1.5e-3
    tower_lr_ratio: float = 0.2
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


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], scale: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(list(parameters), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    optimizer.step()


def _adamw(groups: list[tuple[list[nn.Parameter], float]], weight_decay: float) -> torch.optim.AdamW:
    settings = [{"params": params, "lr": lr, "peak_lr": lr} for params, lr in groups]
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), weight_decay=weight_decay)


def train_vision(
    model: Qwen3VLForConditionalGeneration, recipe: Recipe, rng: np.random.Generator, progress: Progress
) -> float:
    """Teaches the tower which digit each image token shows; the reading head is thrown away afterwards.

    Returns the share of training digits read rightly in the last 50 steps.
    """
    tower = model.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        head = nn.Linear(HIDDEN, NO_DIGIT + 1)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = _adamw([(parameters, recipe.vision_lr)], recipe.weight_decay)
    recent: list[float] = []
    for step in range(recipe.vision_steps):
        digits = [rng.integers(0, 10, int(rng.integers(1, 6))).tolist() for _ in range(recipe.batch_size)]
        looks = [VARIED if rng.random() < 0.7 else PLAIN for _ in digits]
        scenes = draw_scenes(digits, looks, rng)
        target = cell_targets(scenes, digits)
        features = tower(patchify(np.stack([s.pixels for s in scenes])), grid_thw=grid(len(scenes))).pooler_output
        logits = head(features).view(len(scenes), IMAGE_TOKENS, NO_DIGIT + 1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
        _step(optimizer, loss, parameters, _schedule(step, recipe.vision_steps))
        recent.append(read_rate(logits, target))
        progress("vision", step + 1, recipe.vision_steps, float(loss))
    return float(np.mean(recent[-50:]))


def read_rate(logits: Tensor, target: Tensor) -> float:
    """Share of clearly visible digits (a cell with at least half of one) whose strongest digit class is right."""
    visible = target[..., :NO_DIGIT].amax(-1) >= 0.5
    hit = logits[..., :NO_DIGIT].argmax(-1) == target[..., :NO_DIGIT].argmax(-1)
    return float(hit[visible].float().mean())


def language_loss(model: Qwen3VLForConditionalGeneration, batch: Batch, position_ids: Tensor) -> Tensor:
    """Mean cross-entropy over response tokens. Rows are right-padded and attention is causal, so no mask is needed."""
    rows, width = batch.input_ids.shape
    hidden = model.model(
        input_ids=batch.input_ids,
        position_ids=position_ids[:, :, :width].expand(3, rows, width),
        pixel_values=batch.pixel_values,
        image_grid_thw=grid(rows),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][batch.loss_mask[:, 1:]])
    return F.cross_entropy(logits, batch.input_ids[:, 1:][batch.loss_mask[:, 1:]])


def lab_positions(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, width: int) -> Tensor:
    """M-RoPE positions int64 ``[3, 1, width]``: every lab prompt starts with the same three tokens and one image."""
    types = torch.zeros(1, width, dtype=torch.int32)
    types[:, 3 : 3 + IMAGE_TOKENS] = 1
    ids = torch.full((1, width), int(tokenizer.eos_token_id))
    return model.model.get_rope_index(ids, types, image_grid_thw=grid(1))[0]


def draw_language_batch(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, styles: dict[str, float], mistakes: Mistakes, rng: np.random.Generator
) -> Batch:
    """One batch of fresh questions, images and responses."""
    questions = []
    for _ in range(recipe.batch_size):
        pair = ASKED_TAGS if rng.random() < recipe.asked_tags else OTHER_TAGS[int(rng.integers(len(OTHER_TAGS)))]
        questions.append(draw_question(rng, tags=(pair,)))
    responses = [write_response(question, draw_style(rng, styles), rng, mistakes) for question in questions]
    looks = [VARIED if rng.random() < recipe.varied else PLAIN for _ in questions]
    scenes = draw_scenes([question.digits for question in questions], looks, rng)
    return make_batch(tokenizer, questions, responses, scenes)


def train_language(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rng: np.random.Generator,
    progress: Progress,
) -> None:
    """First only responses that reason (the skill), then the style mix with mistakes (the habit), under one schedule."""
    position_ids = lab_positions(model, tokenizer, 256)
    tower = list(model.model.visual.parameters())
    inside = {id(parameter) for parameter in tower}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    optimizer = _adamw([(rest, recipe.language_lr), (tower, recipe.language_lr * recipe.tower_lr_ratio)], recipe.weight_decay)
    skill = {style: share for style, share in recipe.styles.items() if style in READING}
    steps = recipe.skill_steps + recipe.style_steps
    for step in range(steps):
        learning = step < recipe.skill_steps
        batch = draw_language_batch(
            tokenizer, recipe, skill if learning else recipe.styles, Mistakes(0, 0, 0) if learning else recipe.mistakes, rng
        )
        loss = language_loss(model, batch, position_ids)
        _step(optimizer, loss, [*rest, *tower], _schedule(step, steps))
        progress("skill" if learning else "style", step + 1, steps, float(loss))


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

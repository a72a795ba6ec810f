"""AdamW with warm-up and a schedule, and one guarded step."""

from __future__ import annotations

import math

import torch
from torch import nn

from specs_fast.config import OptimConfig


class Optimizer:
    """AdamW over the trainable parameters of a model, with clipping and a learning-rate schedule.

    Parameters in bfloat16 are stepped through fp32 master copies: at learning rates of 1e-6 an update is far below a
    bfloat16 weight's spacing, and stepping the weights themselves would silently lose it. Gradients are summed in the
    parameter's dtype and cast once; the model holds the rounded master weights.

    Weight decay applies to matrices only (not to biases, norms or embeddings' one-dimensional scales).
    lr(step) = lr * min(1, step / warmup_steps) * shape, shape being 1 (constant), or falling from 1 to 0 over
    ``total_steps`` linearly or along a half cosine; steps are counted from 1.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.step_count = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter; check model.freeze_vision")
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        groups = [
            {"params": [p for p in self.masters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.masters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=tuple(config.betas),  # type: ignore[arg-type]
            eps=config.eps,
            foreach=True,
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (from 1)."""
        warmup = self.config.warmup_steps
        rate = self.config.lr * min(1.0, step / warmup) if warmup else self.config.lr
        if self.config.schedule == "constant" or step <= warmup:
            return rate
        done = (step - warmup) / max(1, self.total_steps - warmup + 1)
        if self.config.schedule == "linear":
            return rate * max(0.0, 1.0 - done)
        return rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    def step(self) -> tuple[float, float]:
        """Clip, step, clear gradients: (gradient norm before clipping, learning rate used).

        A non-finite gradient norm raises FloatingPointError before any weight changes.
        """
        self.step_count += 1
        rate = self.learning_rate(self.step_count)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        copied = [(p, master) for p, master in zip(self.parameters, self.masters, strict=True) if p is not master]
        for parameter, master in copied:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        limit = self.config.max_grad_norm if self.config.max_grad_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.masters, limit))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {norm} at optimizer step {self.step_count}; no weight was changed. "
                "Lower the learning rate, or look for non-finite rewards or log-probs in metrics.jsonl"
            )
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in copied:
                parameter.copy_(master)
        return norm, rate

"""How a model runs while it is scored: no dropout anywhere, and gradient checkpointing where it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def scoring_mode(model: PreTrainedModel) -> Iterator[None]:
    """Layers with gradient checkpointing on count as training inside this context; flags are restored on leaving.

    transformers checkpoints a layer only while that layer is in training mode, so a model in eval mode would silently keep all
    activations. The layer's children, where dropout lives, keep their mode.

    Raises ValueError where a module would drop activations: log-probs of a sampled policy must be those it sampled with.
    """
    layers = []
    for name, module in model.named_modules():
        if module.training and _dropout(module) > 0.0:
            raise ValueError(
                f"dropout {_dropout(module)} is on in {name or type(model).__name__}; call model.eval() first"
            )
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and torch.is_grad_enabled():
            layers.append(module)
    previous = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, previous, strict=True):
            layer.training = training


def _dropout(module: nn.Module) -> float:
    probability = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return float(probability) if isinstance(probability, int | float) else 0.0

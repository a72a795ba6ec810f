"""The language-model head as the numbers that `specs_kernels.linear_logprob` needs.

The one place where the trainer reads the head's weight.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

_SOFTCAP = "final_logit_softcapping"
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_MULTIPLIED_BY_DIVISOR = ("hyperclovax",)
"""Model types that multiply their logits by the entry that the others divide them by."""
# Configuration entries that name logits and do not touch the language-model head's output.
_UNRELATED = re.compile(
    r"router|attn|attention|attentive|output_logits|num_logits_to_keep|logit_scale_init|contrastive|auxiliary"
)
_LOGIT_ENTRY = re.compile(r"logit|lm_head_mult|output_mult")


@dataclass(frozen=True)
class Head:
    """Logits are ``softcap(logit_scale * hidden @ weight_VD.T + bias_V)``, ``softcap(x) = c * tanh(x / c)`` or the identity."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language or vision-language model, its logit scale and soft cap included.

    Raises ValueError for a head that is not a plain linear layer (an adapter on it, a tower of its own) and for
    configuration entries about logits whose effect on the head is not known here.
    """
    name = type(model).__name__
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        kind = "no head" if linear is None else f"a head of type {type(linear).__name__}"
        raise ValueError(
            f"{name} has {kind}; log-probs are computed from a plain nn.Linear head without an adapter on it"
        )
    softcap, scale = logit_transform(model)
    bias: Tensor | None = linear.bias
    if bias is not None and scale != 1.0:
        bias = bias * scale
    return Head(linear.weight, bias, softcap, scale)


def logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft cap and scale that a model's configuration puts on its logits: ``softcap(scale * (hidden @ weight.T + bias))``.

    An entry counts where the model's forward reads it: vision-language models often leave out what the language model of the
    same text configuration does (LLaVA around Gemma-2 has no soft cap).

    Raises ValueError for configuration entries about logits whose effect is not known here.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    softcap: float | None = None
    scale = 1.0
    for entry, value in config.to_dict().items():
        if not _LOGIT_ENTRY.search(entry) or value is None or isinstance(value, bool) or _UNRELATED.search(entry):
            continue
        if entry in (_SOFTCAP, *_MULTIPLIERS, *_DIVISORS) and not _reads(model, entry):
            continue
        if entry == _SOFTCAP:
            softcap = float(value)
        elif entry in _MULTIPLIERS or (entry in _DIVISORS and config.model_type in _MULTIPLIED_BY_DIVISOR):
            scale *= float(value)
        elif entry in _DIVISORS:
            scale /= float(value)
        else:
            raise ValueError(f"{name}: {entry} = {value!r} changes the logits in a way that is not supported")
    return softcap, scale


def _reads(model: PreTrainedModel, entry: str) -> bool:
    """Whether the forward that runs the head names this entry; True for one that leaves the head to another module."""
    names = inspect.unwrap(type(model).forward).__code__.co_names
    return entry in names or "lm_head" not in names

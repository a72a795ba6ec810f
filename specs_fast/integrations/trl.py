"""TRL's trainers take their per-token log-probs and entropies from ``linear_logprob``.

TRL computes both in one function that its head calls (``trl.kernels.ChunkedLogProbFunction``). It is replaced and nothing else:
masks, losses, generation, PEFT, DDP and FSDP stay TRL's. Tested with the trainers of GRPO, DPO, RLOO, KTO and SFT.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
import trl
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import utils

from specs_fast.integrations.logit_metrics import mean_and_top1
from specs_kernels import linear_logprob

VERSIONS = ("1.16",)
"""What the extra ``trl`` in pyproject.toml installs."""
_ARGUMENTS = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()
_OUTPUTS = {"log_probs", "entropy", "mean_logits", "is_top1"}


def use_linear_logprob() -> ExitStack:
    """From here on, in every TRL trainer of this process; until ``close()`` of what is returned, or the end of its ``with``.

    Raises RuntimeError for a TRL version that this was not written for and when already in use. Trainers then raise ValueError
    for ``DPOConfig(use_weighting=True)`` and RuntimeError under DeepSpeed ZeRO-3. The metrics ``logits/*`` and
    ``mean_token_accuracy`` cost one more product with the head for the tokens of probability 1/2 and less.
    """
    theirs = getattr(utils, "_ChunkedLogProbFunction", object)
    if theirs is _LinearLogprob:
        raise RuntimeError("TRL already takes its log-probs from linear_logprob; close() what the first call returned")
    arguments = list(inspect.signature(getattr(theirs, "forward", theirs)).parameters)[1:]
    if ".".join(trl.__version__.split(".")[:2]) not in VERSIONS or arguments != _ARGUMENTS:
        known = " or ".join(f"{version}.x" for version in VERSIONS)
        raise RuntimeError(f"trl {trl.__version__} is not known to this integration; install trl {known}")
    undo = ExitStack()
    undo.callback(setattr, utils, "_ChunkedLogProbFunction", theirs)
    utils._ChunkedLogProbFunction = _LinearLogprob
    return undo


class _LinearLogprob:
    """Called as TRL's function is. Per token: log-prob, entropy, log sum p^2, mean logit, whether the label is the argmax."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        if not set(outputs) <= _OUTPUTS:
            asked = "DPOConfig(use_weighting=True)" if "log_sum_sq_probs" in outputs else f"outputs={outputs}"
            raise ValueError(
                f"{asked} is not covered by linear_logprob; unset it, or train without use_linear_logprob()"
            )
        if is_deepspeed_zero3_enabled():
            raise RuntimeError(
                "DeepSpeed ZeRO-3 splits the head's weight again before the backward; use ZeRO-2 or FSDP2"
            )
        kind = hidden.device.type  # nn.Linear's rule: autocast's dtype where it is on
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype) * scale
        settings: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": scale}
        logp, entropy, _ = linear_logprob(hidden, weight, targets, **settings, return_entropy="entropy" in outputs)
        if not {"mean_logits", "is_top1"} & set(outputs):  # metrics of DPO, KTO and SFT
            return logp, entropy, None, None, None
        with torch.autocast(kind, enabled=False):
            mean, top1 = mean_and_top1(hidden, weight, bias, targets, logp, softcap=softcap, logit_scale=scale)
        return logp, entropy, None, mean / temperature, top1

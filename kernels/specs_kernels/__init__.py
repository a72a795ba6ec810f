"""Kernels for post-training language and vision-language models. Imports torch only.

``PackedLayout`` says which token of a packed row may see which. ``linear_logprob``, ``selective_logprob`` and
``packed_attention`` are differentiable ops with a reference (the definition) and memory-bounded backends;
``linear_loss`` forms the gradients of a whole loss in the forward; ``preference_loss`` and ``policy_loss`` turn packed
log-probs into a loss and its metrics; ``rms_norm`` and ``swiglu`` are the memory-bound layers in between, for CPU.
"""

from specs_kernels.layers import rms_norm, swiglu
from specs_kernels.layout import PackedLayout
from specs_kernels.linear_logprob import linear_logprob, linear_logprob_partials, merge_partials
from specs_kernels.linear_loss import linear_loss
from specs_kernels.packed_attention import packed_attention
from specs_kernels.policy_loss import policy_loss
from specs_kernels.preference_loss import preference_loss
from specs_kernels.results import TokenLogprobs
from specs_kernels.selective_logprob import selective_logprob

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "TokenLogprobs",
    "linear_logprob",
    "linear_logprob_partials",
    "linear_loss",
    "merge_partials",
    "packed_attention",
    "policy_loss",
    "preference_loss",
    "rms_norm",
    "selective_logprob",
    "swiglu",
]

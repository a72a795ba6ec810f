"""Log-prob, entropy and log-sum-exp of targets from logits that exist already."""

from specs_kernels.selective_logprob.op import selective_logprob

__all__ = ["selective_logprob"]

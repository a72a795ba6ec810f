"""Log-prob, entropy and log-sum-exp of targets from hidden states and the head's weight."""

from specs_kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_logprob"]

"""Log-prob, entropy and log-sum-exp of targets from hidden states and the head's weight."""

from specs_kernels.linear_logprob.modes import Mode, choose_mode
from specs_kernels.linear_logprob.op import linear_logprob
from specs_kernels.linear_logprob.partials import Partials, linear_logprob_partials, merge_partials

__all__ = ["Mode", "Partials", "choose_mode", "linear_logprob", "linear_logprob_partials", "merge_partials"]

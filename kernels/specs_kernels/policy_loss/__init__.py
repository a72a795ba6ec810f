"""Policy-gradient losses (GRPO family) on packed token log-probs."""

from specs_kernels.policy_loss.op import policy_loss

__all__ = ["policy_loss"]

"""Preference losses (DPO family) on packed token log-probs."""

from specs_kernels.preference_loss.op import preference_loss

__all__ = ["preference_loss"]

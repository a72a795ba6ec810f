"""A loss that is a sum over groups of targets, with its gradients formed in the forward."""

from specs_kernels.linear_loss.op import linear_loss

__all__ = ["linear_loss"]

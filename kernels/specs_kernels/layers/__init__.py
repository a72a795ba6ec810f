"""The memory-bound layers around attention and linear maps: RMSNorm and SwiGLU."""

from specs_kernels.layers.op import rms_norm, swiglu

__all__ = ["rms_norm", "swiglu"]

"""Attention over a packed forest of segments."""

from specs_kernels.packed_attention.op import packed_attention

__all__ = ["packed_attention"]

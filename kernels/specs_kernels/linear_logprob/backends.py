"""The row pass of each backend by name."""

from __future__ import annotations

from specs_kernels.linear_logprob.chunked import TorchRowPass
from specs_kernels.linear_logprob.native import NativeRowPass
from specs_kernels.linear_logprob.row_pass import RowPass


def row_pass(backend: str) -> RowPass:
    """A fresh row pass; one per call of an op, as it may hold workspace."""
    if backend == "chunked":
        return TorchRowPass()
    if backend == "native":
        return NativeRowPass()
    raise ValueError(f"backend {backend!r} has no row pass")

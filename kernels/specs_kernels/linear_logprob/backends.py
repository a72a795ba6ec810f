"""The row pass of each backend by name; imported when first asked for."""

from __future__ import annotations

from specs_kernels.linear_logprob import native
from specs_kernels.linear_logprob.chunked import TorchRowPass
from specs_kernels.linear_logprob.head import Tiling
from specs_kernels.linear_logprob.native import NativeLinear
from specs_kernels.linear_logprob.row_pass import RowPass


def row_pass(backend: str) -> RowPass:
    """A fresh row pass; one per call of an op, as it may hold workspace."""
    if backend == "chunked":
        return TorchRowPass()
    if backend == "native":
        return NativeLinear()
    if backend == "triton":
        from specs_kernels.linear_logprob.triton import TritonRowPass

        return TritonRowPass()
    raise ValueError(f"backend {backend!r} has no row pass")


def offset_tiles(backend: str, vocab_size: int, tiles: Tiling) -> int:
    """Tiles of columns that have offsets of their own in a cache of shifted scores."""
    return native.offset_tiles(vocab_size) if backend == "native" else -(-vocab_size // tiles.tile_columns)


def keeps_products(backend: str, same_dtype: bool) -> bool:
    """Whether a backend leaves products in a cache of the arithmetic dtype, rather than shifted scores."""
    return same_dtype and backend != "chunked"

"""The map from hidden states to products and scores, its tiles, and the GEMMs around a row pass.

Products are formed in blocks of exactly ``Tiling.row_block`` rows (the last one padded with zeros) by a number of columns that
depends on the vocabulary only. A GEMM library computes every row of a block of one shape in the same way, so a row's
products do not depend on the other rows; ``specs-kernels verify`` checks it bit by bit on the machine at hand.

Letters: M targets that count, D hidden size, V vocabulary, K rank of the low-rank addition, R rows and C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specs_kernels.linear_logprob.row_pass import Transform
from specs_kernels.softmax import accumulation_dtype


@dataclass(frozen=True, slots=True)
class Tiling:
    """row_block: rows of every score GEMM. tile_rows (a multiple of it), tile_columns: what a row pass gets at a time."""

    row_block: int
    tile_rows: int
    tile_columns: int


CPU_TILE_BYTES = 4 << 20
"""A tile and its temporary stay in the cache of the core that made them."""
CPU_TILING = Tiling(128, 512, 2048)
GPU_TILING = Tiling(1024, 8192, 8192)


def row_block(device: torch.device) -> int:
    """Rows of every score GEMM on this kind of device."""
    return (CPU_TILING if device.type == "cpu" else GPU_TILING).row_block


def tiling(device: torch.device, vocab_size: int, dtype: torch.dtype) -> Tiling:
    """Tile sizes: row block and columns depend on device type, vocabulary and dtype only, never on the batch."""
    if device.type != "cpu":
        return Tiling(GPU_TILING.row_block, GPU_TILING.tile_rows, min(vocab_size, GPU_TILING.tile_columns))
    columns = min(vocab_size, CPU_TILING.tile_columns * 4 // dtype.itemsize)
    blocks = CPU_TILE_BYTES // (columns * dtype.itemsize * CPU_TILING.row_block)
    return Tiling(CPU_TILING.row_block, CPU_TILING.row_block * min(32, max(1, blocks)), columns)


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """``[start, stop)`` in pieces of ``size``, the last one shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def product_(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta * out + alpha * a @ b``, summed in the dtype of ``out``; with beta 0 the old values are not read."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What GEMMs take. Only accelerators multiply half precision into fp32; elsewhere operands are upcast tile by tile."""
    return dtype if device.type == "cuda" else accumulation_dtype(dtype)


def kept_dtype(dtype: torch.dtype, softcap: float | None) -> torch.dtype:
    """In which scores are kept for the backward: that of the inputs. Under a soft cap the arithmetic one: the slope
    ``1 - (z / cap)^2`` of a saturated score vanishes in the rounding of z."""
    return dtype if softcap is None else accumulation_dtype(dtype)


@dataclass(frozen=True, slots=True)
class Head:
    """Scores are ``softcap(logit_scale * (hidden @ W.T + (hidden @ A.T) @ B.T) + bias) / temperature``.

    weight_VD, lora_A ``[K, D]``, lora_B ``[V, K]``: as given. bias_V and inverse_temperature_M: in the arithmetic dtype, the
    bias times ``early``. Without a softcap a scalar temperature is part of ``factor`` and ``early``, and the row pass sees 1.
    """

    weight_VD: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias_V: Tensor | None
    softcap: float | None
    inverse_temperature: float | Tensor
    factor: float
    early: float
    dtype: torch.dtype
    operand: torch.dtype

    @staticmethod
    def make(
        weight_VD: Tensor,
        bias_V: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> Head:
        """temperature: a number, or ``[M]``."""
        dtype = accumulation_dtype(weight_VD.dtype)
        early, late = 1.0, 1.0
        inverse: float | Tensor = late
        if isinstance(temperature, Tensor):
            inverse = temperature.to(dtype).reciprocal()
        elif softcap is None:
            early = 1.0 / temperature
        else:
            inverse = 1.0 / temperature
        if bias_V is not None:
            bias_V = bias_V.to(dtype).contiguous()
            bias_V = bias_V if early == 1.0 else bias_V * early
        operand = operand_dtype(weight_VD.dtype, weight_VD.device)
        return Head(weight_VD, lora_A, lora_B, bias_V, softcap, inverse, logit_scale * early, early, dtype, operand)

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def transform(self, rows: slice, columns: slice) -> Transform:
        bias_C = None if self.bias_V is None else self.bias_V[columns]
        inverse = self.inverse_temperature
        return Transform(
            bias_C, self.softcap, inverse[rows] if isinstance(inverse, Tensor) else inverse, bias_C is not None
        )

    def subset(self, index: Tensor | slice) -> Head:
        """The same head for some of the targets."""
        if not isinstance(self.inverse_temperature, Tensor):
            return self
        return replace(self, inverse_temperature=self.inverse_temperature[index])

    def columns(self, columns: slice) -> Columns:
        """The columns of one tile as GEMM operands."""
        weight_CD = self.weight_VD[columns].to(self.operand)
        return Columns(weight_CD, None if self.lora_B is None else self.lora_B[columns].to(self.operand), self.factor)

    def slope(self, target_score: Tensor) -> Tensor | float:
        """d z / d x of the target column, ``[M]`` or a number, from its score z."""
        if self.softcap is None:
            return self.inverse_temperature
        tanh = target_score / (self.softcap * self.inverse_temperature)
        return self.inverse_temperature * (1 - tanh * tanh)


@dataclass(frozen=True, slots=True)
class Columns:
    """``[C, D]`` of the weight and ``[C, K]`` of lora_B, and the factor of the products."""

    weight_CD: Tensor
    lora_CK: Tensor | None
    factor: float


_ALIGNMENT = 64
"""Bytes. A GEMM library may treat a row by where it lies in memory; aligned rows all lie alike."""


def _aligned_zeros(num_rows: int, like: Tensor) -> Tensor:
    """``[num_rows, columns of like]``, every row on a cache-line boundary."""
    size = like.dtype.itemsize
    width = -(-like.shape[1] * size // _ALIGNMENT) * _ALIGNMENT // size
    return like.new_zeros(num_rows, width)[:, : like.shape[1]]


def _aligned(data: Tensor) -> Tensor:
    """The same matrix with every row on a cache-line boundary; a copy only where it is not so already."""
    stride = data.stride(0) * data.dtype.itemsize
    lies_well = data.stride(1) == 1 and stride % _ALIGNMENT == 0 and data.data_ptr() % _ALIGNMENT == 0
    return data if lies_well or data.device.type != "cpu" else _aligned_zeros(data.shape[0], data).copy_(data)


class Rows:
    """Hidden states as GEMM operands: ``[M, D]``, and ``hidden @ A.T`` ``[M, K]`` where there is a low-rank addition."""

    def __init__(self, hidden_MD: Tensor, head: Head, row_block: int) -> None:
        self.count = hidden_MD.shape[0]
        self.row_block = row_block
        self.hidden_MD = _aligned(hidden_MD.to(head.operand))
        self._tails: dict[int, Tensor] = {}
        self.low_MK: Tensor | None = None
        if head.lora_A is not None:
            self._make_low(head.lora_A.to(head.operand), head.dtype)

    def _make_low(self, lora_A: Tensor, dtype: torch.dtype) -> None:
        """In a whole number of 16 columns: narrower products are not computed alike in every row."""
        rank = lora_A.shape[0]
        wide_A = lora_A.new_zeros(-(-rank // 16) * 16, lora_A.shape[1])
        wide_A[:rank] = lora_A
        low_PW = lora_A.new_empty(self.padded, wide_A.shape[0], dtype=dtype)
        for rows in slices(0, self.padded, self.row_block):
            product_(low_PW[rows], self._block(self.hidden_MD, rows), wide_A.T, 0, 1)
        self.low_MK = low_PW[: self.count, :rank].to(lora_A.dtype)

    @property
    def padded(self) -> int:
        """Rows including the padding of the last block."""
        return -(-self.count // self.row_block) * self.row_block

    def _block(self, data: Tensor, rows: slice) -> Tensor:
        """A block of rows; the last one, made once, is padded with zeros."""
        if rows.stop <= self.count:
            return data[rows]
        if id(data) not in self._tails:
            rest = self.count % self.row_block
            tail = _aligned_zeros(self.row_block, data)
            tail[:rest] = data[self.count - rest :]
            self._tails[id(data)] = tail
        return self._tails[id(data)]

    def products_(self, x_PC: Tensor, start: int, columns: Columns) -> None:
        """Fill ``x_PC`` (a multiple of the row block) with the products of the rows from ``start`` on."""
        weight_DC = columns.weight_CD.T
        for rows in slices(0, x_PC.shape[0], self.row_block):
            block = slice(start + rows.start, start + rows.stop)
            out = x_PC[rows]
            product_(out, self._block(self.hidden_MD, block), weight_DC, 0, columns.factor)
            if columns.lora_CK is not None and self.low_MK is not None:
                product_(out, self._block(self.low_MK, block), columns.lora_CK.T, 1, columns.factor)

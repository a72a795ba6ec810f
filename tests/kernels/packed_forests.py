"""Hypothesis strategies for packed forests, inputs for them, and a definition of visibility without the layout's integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from specs_kernels import PackedLayout


@dataclass(frozen=True)
class Forest:
    lengths: list[int]
    parents: list[int]
    spans: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def ancestors(self, segment: int) -> list[int]:
        """The segment itself, its parent, and so on to its root."""
        path = [segment]
        while self.parents[path[-1]] != -1:
            path.append(self.parents[path[-1]])
        return path

    def tokens(self, segment: int) -> list[int]:
        start = sum(self.lengths[:segment])
        return list(range(start, start + self.lengths[segment]))

    def path_tokens(self, segment: int) -> list[int]:
        """All tokens from the root to the end of the segment."""
        return [token for ancestor in reversed(self.ancestors(segment)) for token in self.tokens(ancestor)]

    def visible(self, window: int | None) -> Tensor:
        """Bool ``[T, T]`` from the words: own segment causally (or in one span), all ancestors, within the window."""
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for segment in range(len(self.lengths)):
            path = self.path_tokens(segment)
            for i in self.tokens(segment):
                for position, j in enumerate(path):
                    together = any(start <= i < end and start <= j < end for start, end in self.spans)
                    near = window is None or path.index(i) - position < window
                    mask[i, j] = (j <= i or together) and near
        return mask


@st.composite
def forests(draw: st.DrawFn, max_segments: int = 9, max_length: int = 12, spans: bool = True) -> Forest:
    """Segments in depth-first order, many of them empty or of one token; spans in some."""
    lengths: list[int] = []
    parents: list[int] = []
    path: list[int] = []
    for segment in range(draw(st.integers(0, max_segments))):
        depth = draw(st.integers(0, len(path)))
        path = path[:depth]
        parents.append(path[-1] if path else -1)
        path.append(segment)
        lengths.append(draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, max_length))))
    ranges = []
    start = 0
    for length in lengths:
        if spans and length and draw(st.booleans()):
            begin = draw(st.integers(0, length - 1))
            ranges.append((start + begin, start + draw(st.integers(begin + 1, length))))
        start += length
    return Forest(lengths, parents, ranges)


def make_inputs(
    layout: PackedLayout, heads: int, kv_heads: int, head_dim: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """query ``[T, heads, head_dim]``, key and value ``[T, kv_heads, head_dim]``; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(layout.num_tokens, h, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()

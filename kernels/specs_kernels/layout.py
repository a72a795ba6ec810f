"""PackedLayout: which token of a packed row may see which, and where each token stands on its path.

A row of T tokens holds a forest of segments in depth-first order. A segment attends to itself causally and to all of
its ancestors; siblings never see each other. In depth-first order the descendants of a segment are contiguous, so the
whole relation is two integers per token::

    key j is visible to query i   iff   visible_from[j] <= i < visible_until[j]

``visible_until[j]`` is the end of the subtree of j's segment. ``visible_from[j]`` is j (causal), or the start of the
bidirectional span that j belongs to. A sliding window W adds ``position_ids[i] - position_ids[j] < W``.

Letters: T tokens, S segments.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class PackedLayout:
    """An immutable packed forest of segments. Build it with :meth:`from_segments`; do not write into its tensors.

    visible_from, visible_until: int32 ``[T]``, the visibility rule above.
    segment_ids: int64 ``[T]``, the segment each token belongs to.
    position_ids: int64 ``[T]``, index along the path from the root: a segment's positions continue its parent's.
    segment_starts: int64 ``[S + 1]``, first token of each segment; the last entry is T.
    predictor_index: int64 ``[T]``, the token whose hidden state predicts this one: the previous token of its segment;
        for the first token of a segment the last token of the nearest non-empty ancestor; -1 where there is none.
    """

    visible_from: Tensor
    visible_until: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    segment_starts: Tensor
    predictor_index: Tensor
    lengths: tuple[int, ...]
    """Tokens per segment, on the host."""
    parents: tuple[int, ...]
    """Parent of each segment or -1, on the host."""
    subtree_ends: tuple[int, ...]
    """End of each segment's subtree: one past the last token of its last descendant, on the host."""
    bidirectional: tuple[tuple[int, int], ...]
    """Half-open bidirectional token ranges sorted by start, on the host."""
    description: Tensor = field(init=False)
    """int64 ``[2 + 2 S + 2 R]``, always on the host: S, R, lengths, parents, starts and ends of the R bidirectional ranges. The
    whole layout as one tensor, which is how it enters a compiled graph."""
    cache: dict[Any, Any] = field(default_factory=dict, init=False)
    """Derived plans of the backends (index tensors on this layout's device), computed once per layout."""

    def __post_init__(self) -> None:
        starts, ends = ([span[side] for span in self.bidirectional] for side in (0, 1))
        numbers = [len(self.lengths), len(starts), *self.lengths, *self.parents, *starts, *ends]
        description = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        object.__setattr__(self, "description", description)  # the class is frozen

    @classmethod
    @torch.inference_mode(False)  # a layout made during a rollout may serve a training step
    def from_segments(
        cls,
        lengths: Sequence[int] | Tensor,
        parents: Sequence[int] | Tensor,
        *,
        bidirectional: Sequence[tuple[int, int]] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> PackedLayout:
        """Lay out segments of these lengths in the given (depth-first) order.

        lengths: tokens per segment, >= 0; empty segments and T = 0 are legal.
        parents: per segment -1 (a root), or segment i-1, or an ancestor of segment i-1.
        bidirectional: half-open ``(start, end)`` token ranges, a list or int64 ``[n, 2]``, disjoint, each inside one
            segment; every token of a range sees the whole range.

        Raises ValueError, naming segment or range and its value, for anything else.
        """
        length_list = _int_list("lengths", lengths)
        parent_list = _int_list("parents", parents)
        if len(length_list) != len(parent_list):
            raise ValueError(
                f"lengths has {len(length_list)} entries but parents has {len(parent_list)}; pass one each"
            )
        num_tokens = sum(length_list)
        if num_tokens > _MAX_TOKENS:
            raise ValueError(f"the row has {num_tokens} tokens; at most {_MAX_TOKENS} fit one layout, split the batch")
        starts, ends, path_starts, first_predictors = _walk_forest(length_list, parent_list)
        spans = _check_spans(bidirectional, starts, length_list, num_tokens)

        lengths_S = torch.tensor(length_list, dtype=torch.int64)
        starts_S = torch.tensor(starts, dtype=torch.int64)
        segment_ids = torch.repeat_interleave(lengths_S, output_size=num_tokens)
        tokens = torch.arange(num_tokens)
        per_segment = torch.tensor([ends, path_starts], dtype=torch.int64).view(2, -1).index_select(1, segment_ids)
        position_ids = tokens - starts_S.index_select(0, segment_ids) + per_segment[1]
        predictor_index = tokens - 1
        nonempty = lengths_S > 0
        predictor_index[starts_S[nonempty]] = torch.tensor(first_predictors, dtype=torch.int64)[nonempty]
        visible_from = tokens.to(torch.int32)
        if spans:
            spans_n2 = torch.tensor(spans, dtype=torch.int64)
            sizes = spans_n2[:, 1] - spans_n2[:, 0]
            span_of = torch.repeat_interleave(sizes)
            within = torch.arange(span_of.shape[0]) - (sizes.cumsum(0) - sizes)[span_of]
            visible_from[spans_n2[span_of, 0] + within] = spans_n2[span_of, 0].to(torch.int32)
        layout = cls(
            visible_from=visible_from,
            visible_until=per_segment[0].to(torch.int32),
            segment_ids=segment_ids,
            position_ids=position_ids,
            segment_starts=torch.cat([starts_S, torch.tensor([num_tokens])]),
            predictor_index=predictor_index,
            lengths=tuple(length_list),
            parents=tuple(parent_list),
            subtree_ends=tuple(ends),
            bidirectional=tuple(spans),
        )
        return layout if device is None else layout.to(device)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.segment_ids.shape[0]

    @property
    def num_segments(self) -> int:
        """S, empty segments included."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.segment_ids.device

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> PackedLayout:
        """This layout with its tensors on ``device`` (itself when they are there already)."""
        target = torch.device(device)
        if target.type == self.device.type and target.index in (None, self.device.index):
            return self
        return PackedLayout(
            visible_from=self.visible_from.to(target),
            visible_until=self.visible_until.to(target),
            segment_ids=self.segment_ids.to(target),
            position_ids=self.position_ids.to(target),
            segment_starts=self.segment_starts.to(target),
            predictor_index=self.predictor_index.to(target),
            lengths=self.lengths,
            parents=self.parents,
            subtree_ends=self.subtree_ends,
            bidirectional=self.bidirectional,
        )

    def dense_mask(self, window: int | None = None) -> Tensor:
        """Bool ``[T, T]``: entry (i, j) says whether query i sees key j. For tests and references: O(T^2) memory."""
        query = torch.arange(self.num_tokens, device=self.device)[:, None]
        mask = (self.visible_from[None, :] <= query) & (query < self.visible_until[None, :])
        if window is not None:
            mask &= self.position_ids[:, None] - self.position_ids[None, :] < window
        return mask

    def __repr__(self) -> str:
        return (
            f"PackedLayout(num_tokens={self.num_tokens}, num_segments={self.num_segments}, "
            f"bidirectional={len(self.bidirectional)} ranges, device={str(self.device)!r})"
        )


def _int_list(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a 1-d integer tensor or a list of ints; got {values.dtype} {list(values.shape)}"
            )
        return values.tolist()
    result: list[int] = []
    for i, value in enumerate(values):
        if type(value) is int:
            result.append(value)
            continue
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise ValueError(f"{name}[{i}] must be an int; got {value!r}")
        result.append(operator.index(value))
    return result


def _walk_forest(lengths: list[int], parents: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Per segment: first token, end of its subtree, position of its first token, predictor of its first token.

    Keeps the path from the root to the current segment on a stack; a legal parent is on the path of the segment before.
    """
    starts: list[int] = []
    path_starts: list[int] = []
    first_predictors: list[int] = []
    ends = [0] * len(lengths)
    path: list[int] = []
    offset = 0
    for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        if length < 0:
            raise ValueError(f"lengths[{i}] is {length}; a segment has 0 or more tokens")
        while path and path[-1] != parent:
            ends[path.pop()] = offset
        if not path and parent != -1:
            raise ValueError(
                f"parents[{i}] is {parent}; it must be -1, segment {i - 1}, or an ancestor of segment {i - 1} "
                "(segments in depth-first order)"
            )
        starts.append(offset)
        if parent == -1:
            path_starts.append(0)
            first_predictors.append(-1)
        else:
            path_starts.append(path_starts[parent] + lengths[parent])
            parent_end = starts[parent] + lengths[parent]
            first_predictors.append(parent_end - 1 if lengths[parent] else first_predictors[parent])
        path.append(i)
        offset += length
    while path:
        ends[path.pop()] = offset
    return starts, ends, path_starts, first_predictors


def _check_spans(
    bidirectional: Sequence[tuple[int, int]] | Tensor | None, starts: list[int], lengths: list[int], num_tokens: int
) -> list[tuple[int, int]]:
    """The ranges sorted by start, without empty ones."""
    if bidirectional is None:
        return []
    if isinstance(bidirectional, Tensor):
        whole = not (bidirectional.is_floating_point() or bidirectional.dtype == torch.bool)
        if not whole or bidirectional.dim() != 2 or bidirectional.shape[1] != 2:
            raise ValueError(
                "bidirectional must be int64 [n, 2] or a list of (start, end); "
                f"got {bidirectional.dtype} {list(bidirectional.shape)}"
            )
        pairs: list[Any] = bidirectional.tolist()
    else:
        pairs = list(bidirectional)
    spans: list[tuple[int, int]] = []
    for n, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"bidirectional[{n}] is {pair!r}; pass (start, end)")
        start, end = _int_list(f"bidirectional[{n}]", pair)
        if not 0 <= start <= end <= num_tokens:
            raise ValueError(f"bidirectional[{n}] is ({start}, {end}); need 0 <= start <= end <= {num_tokens}")
        if start < end:
            spans.append((start, end))
    spans.sort()
    segment = 0
    for n, (start, end) in enumerate(spans):
        if n and start < spans[n - 1][1]:
            raise ValueError(f"bidirectional ranges {spans[n - 1]} and {(start, end)} overlap; they must be disjoint")
        while starts[segment] + lengths[segment] <= start:
            segment += 1
        if end > starts[segment] + lengths[segment]:
            raise ValueError(
                f"bidirectional range {(start, end)} crosses the end of segment {segment} "
                f"(tokens {starts[segment]} to {starts[segment] + lengths[segment]}); give one range per segment"
            )
    return spans

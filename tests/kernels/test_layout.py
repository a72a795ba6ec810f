"""PackedLayout: anchors worked out by hand, the rule against a definition in words, and every error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forests import Forest, forests

from specs_kernels import PackedLayout


def test_prompt_with_two_responses_and_a_second_prompt_by_hand() -> None:
    layout = PackedLayout.from_segments([3, 2, 2, 1, 2], [-1, 0, 0, -1, 3])
    assert layout.num_tokens == 10
    assert layout.num_segments == 5
    assert layout.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert layout.segment_starts.tolist() == [0, 3, 5, 7, 8, 10]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1, 2]
    assert layout.visible_from.tolist() == list(range(10))
    assert layout.visible_until.tolist() == [7, 7, 7, 5, 5, 7, 7, 10, 10, 10]
    assert layout.predictor_index.tolist() == [-1, 0, 1, 2, 3, 2, 5, -1, 7, 8]


def test_first_token_below_empty_segments_is_predicted_by_the_nearest_ancestor_with_tokens() -> None:
    # 0 (2 tokens) -> 1 (empty) -> 2 (empty) -> 3 (1 token); 4 (empty root) -> 5 (1 token)
    layout = PackedLayout.from_segments([2, 0, 0, 1, 0, 1], [-1, 0, 1, 2, -1, 4])
    assert layout.predictor_index.tolist() == [-1, 0, 1, -1]
    assert layout.position_ids.tolist() == [0, 1, 2, 0]
    assert layout.visible_until.tolist() == [3, 3, 3, 4]
    assert layout.segment_starts.tolist() == [0, 2, 2, 2, 3, 3, 4]


def test_bidirectional_range_is_seen_from_its_start() -> None:
    layout = PackedLayout.from_segments([5, 2], [-1, 0], bidirectional=[(1, 4)])
    assert layout.visible_from.tolist() == [0, 1, 1, 1, 4, 5, 6]
    assert layout.visible_until.tolist() == [7] * 7
    assert layout.dense_mask()[1].tolist() == [True, True, True, True, False, False, False]


def test_bidirectional_accepts_a_tensor_in_any_order_and_ignores_empty_ranges() -> None:
    ranges = torch.tensor([[4, 6], [3, 3], [0, 2]])
    layout = PackedLayout.from_segments(torch.tensor([3, 3]), torch.tensor([-1, -1]), bidirectional=ranges)
    assert layout.visible_from.tolist() == [0, 0, 2, 3, 4, 4]
    assert layout.bidirectional == ((0, 2), (4, 6))


@pytest.mark.parametrize("lengths, parents", [([], []), ([0], [-1]), ([0, 0, 0], [-1, 0, 0])])
def test_a_row_without_tokens_is_legal(lengths: list[int], parents: list[int]) -> None:
    layout = PackedLayout.from_segments(lengths, parents)
    assert layout.num_tokens == 0
    assert layout.dense_mask().shape == (0, 0)
    assert layout.segment_starts.tolist() == [0] * (len(lengths) + 1)
    assert layout.visible_from.shape == layout.predictor_index.shape == (0,)


def test_dtypes() -> None:
    layout = PackedLayout.from_segments([2, 1], [-1, 0])
    assert layout.visible_from.dtype == layout.visible_until.dtype == torch.int32
    for name in ("segment_ids", "position_ids", "segment_starts", "predictor_index"):
        assert getattr(layout, name).dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(forest=forests(), window=st.one_of(st.none(), st.integers(1, 9)))
def test_visibility_is_the_rule_in_words(forest: Forest, window: int | None) -> None:
    layout = PackedLayout.from_segments(forest.lengths, forest.parents, bidirectional=forest.spans)
    assert torch.equal(layout.dense_mask(window), forest.visible(window))


@settings(max_examples=100, deadline=None)
@given(forest=forests(spans=False))
def test_positions_and_predictors_follow_the_path(forest: Forest) -> None:
    layout = PackedLayout.from_segments(forest.lengths, forest.parents)
    for segment in range(len(forest.lengths)):
        path = forest.path_tokens(segment)
        for token in forest.tokens(segment):
            position = path.index(token)
            assert layout.position_ids[token] == position
            assert layout.predictor_index[token] == (path[position - 1] if position else -1)
            assert layout.segment_ids[token] == segment


def test_layout_is_immutable_and_moves_by_copy() -> None:
    layout = PackedLayout.from_segments([2], [-1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.segment_ids = torch.zeros(2)  # type: ignore[misc]
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta" and layout.device.type == "cpu"
    assert moved.num_tokens == 2 and moved.lengths == (2,)
    assert PackedLayout.from_segments([2], [-1], device="meta").device.type == "meta"


def test_layout_made_in_inference_mode_serves_a_training_step() -> None:
    with torch.inference_mode():
        layout = PackedLayout.from_segments([2, 1], [-1, 0], bidirectional=[(0, 2)])
    assert not layout.predictor_index.is_inference()
    assert not layout.visible_from.is_inference()
    with torch.inference_mode():
        assert not layout.to("meta").predictor_index.is_inference()


@pytest.mark.parametrize(
    "lengths, parents, message",
    [
        ([1, 1], [-1], "lengths has 2 entries but parents has 1"),
        ([1, -2], [-1, 0], r"lengths\[1\] is -2"),
        ([1, 1.5], [-1, 0], r"lengths\[1\] must be an int; got 1.5"),
        ([1, True], [-1, 0], r"lengths\[1\] must be an int; got True"),
        ([1, 1], [-1, 1], r"parents\[1\] is 1"),
        ([1, 1], [0, 0], r"parents\[0\] is 0"),
        ([1, 1], [-1, -2], r"parents\[1\] is -2"),
        ([1, 1, 1, 1], [-1, 0, 0, 1], r"parents\[3\] is 1; it must be -1, segment 2, or an ancestor of segment 2"),
        ([1, 1, 1], [-1, -1, 0], r"parents\[2\] is 0"),
        ([2**31], [-1], "at most 2147483647"),
    ],
)
def test_a_forest_that_is_none_is_refused(lengths: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_segments(lengths, parents)


def test_integers_of_numpy_are_integers() -> None:
    layout = PackedLayout.from_segments(np.array([2, 3]), np.array([-1, 0]), bidirectional=np.array([[0, 2]]))
    assert layout.lengths == (2, 3) and layout.bidirectional == ((0, 2),)
    assert all(type(value) is int for value in layout.lengths + layout.parents)


def test_lengths_must_be_integers() -> None:
    with pytest.raises(ValueError, match="lengths must be a 1-d integer tensor"):
        PackedLayout.from_segments(torch.tensor([1.0]), [-1])


@pytest.mark.parametrize(
    "spans, message",
    [
        ([(0, 7)], r"bidirectional\[0\] is \(0, 7\); need 0 <= start <= end <= 6"),
        ([(2, 1)], r"\(2, 1\)"),
        ([(-1, 1)], r"\(-1, 1\)"),
        ([(0, 2), (1, 3)], r"\(0, 2\) and \(1, 3\) overlap"),
        ([(2, 5)], r"\(2, 5\) crosses the end of segment 0 \(tokens 0 to 4\)"),
        ([(0, 1, 2)], r"pass \(start, end\)"),
        ([(0, 1), (1.5, 3)], r"bidirectional\[1\]\[0\] must be an int; got 1.5"),
        (torch.tensor([[False, True]]), r"must be int64 \[n, 2\]"),
        (torch.zeros(2), r"must be int64 \[n, 2\]"),
    ],
)
def test_bad_bidirectional_ranges_are_refused(spans: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_segments([4, 2], [-1, 0], bidirectional=spans)

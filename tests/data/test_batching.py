"""Micro-batches keep order and budget; epochs visit every row."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from specs_fast.data.batching import epochs, micro_batches
from specs_fast.data.types import EncodedPrompt, Tree


def tree(prompt: int, *responses: int) -> Tree:
    ids = torch.zeros(prompt, dtype=torch.int64)
    return Tree(EncodedPrompt("p", ids, ids), tuple(torch.zeros(n, dtype=torch.int64) for n in responses))


def test_packed_budget_counts_the_prompt_once_and_padded_counts_rows() -> None:
    trees = [tree(10, 5, 3), tree(10, 5, 5), tree(4, 1)]
    assert micro_batches(trees, 38, packing="shared") == [[0, 1], [2]]
    assert micro_batches(trees, 38, packing="none") == [[0], [1, 2]]
    assert micro_batches(trees, 43, packing="shared") == [[0, 1, 2]]


def test_a_tree_over_the_budget_is_alone_and_none_is_lost() -> None:
    trees = [tree(3, 1), tree(100, 50), tree(3, 1)]
    assert micro_batches(trees, 20, packing="shared") == [[0], [1], [2]]
    assert micro_batches([], 20, packing="shared") == []
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        micro_batches(trees, 0, packing="shared")


def test_epochs_visit_every_row_once_per_pass_and_repeat_for_a_seed() -> None:
    steps = list(islice(epochs(7, 3, seed=1), 7))
    flat = [index for step in steps for index in step]
    assert all(sorted(flat[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert steps == list(islice(epochs(7, 3, seed=1), 7))
    assert steps != list(islice(epochs(7, 3, seed=2), 7))

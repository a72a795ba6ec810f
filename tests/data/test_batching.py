"""Values follow trees into micro-batches and back; epochs visit every row."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from specs_fast.data.batching import cut, epochs, gather, plan_trees, scatter
from specs_fast.data.types import EncodedPrompt, Tree


def tree(prompt: int, *responses: int) -> Tree:
    ids = torch.zeros(prompt, dtype=torch.int64)
    return Tree(EncodedPrompt("p", ids, ids), tuple(torch.zeros(n, dtype=torch.int64) for n in responses))


def test_packed_budget_counts_the_prompt_once_and_padded_counts_rows() -> None:
    trees = [tree(10, 5, 3), tree(10, 5, 5)]
    assert plan_trees(trees, 38, packing="shared").tokens == (38,)
    assert plan_trees(trees, 60, packing="none").tokens == (60,)
    assert plan_trees([], 20, packing="shared").tokens == ()
    with pytest.raises(ValueError, match="micro_batch_tokens must be at least 1, got 0"):
        plan_trees(trees, 0, packing="shared")


@pytest.mark.parametrize("max_tokens", [1, 14, 20, 1000])
def test_values_follow_responses_into_parts_and_back(max_tokens: int) -> None:
    trees = [tree(3, 4, 0, 5, 2), tree(9), tree(2, 7), tree(0, 1, 1)]
    starts = [0, 11, 11, 18]
    values = [torch.arange(start, start + t.num_response_tokens) for start, t in zip(starts, trees, strict=True)]
    numbered = [
        Tree(t.prompt, tuple(v.split([len(r) for r in t.responses]))) for t, v in zip(trees, values, strict=True)
    ]
    back = [torch.full_like(value, -1) for value in values]
    for parts in plan_trees(trees, max_tokens, packing="shared").micro_batches:
        taken = gather(values, trees, parts)
        shown = [response for piece in cut(numbered, parts) for response in piece.responses]
        assert torch.equal(taken, torch.cat([*shown, taken[:0]]))
        scatter(taken, trees, parts, back)
    assert all(torch.equal(a, b) for a, b in zip(back, values, strict=True))


def test_epochs_visit_every_row_once_per_pass_and_repeat_for_a_seed() -> None:
    steps = list(islice(epochs(7, 3, seed=1), 7))
    flat = [index for step in steps for index in step]
    assert all(sorted(flat[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert steps == list(islice(epochs(7, 3, seed=1), 7))
    assert steps != list(islice(epochs(7, 3, seed=2), 7))

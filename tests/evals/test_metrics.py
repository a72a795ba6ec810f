"""Metrics against published anchors and against brute force."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specs_fast.evals.metrics import (
    generalization_factor,
    mean,
    pass_at_k,
    rollout_branching_factor,
    standard_error,
)


def test_pass_at_k_anchor() -> None:
    assert pass_at_k(8, 2, 4) == pytest.approx(1 - 15 / 70) == pytest.approx(0.785714, abs=1e-6)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_outside_its_range_is_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        pass_at_k(*case)


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [(98.0, 69.2, 73.52), (98.8, 89.6, 91.30), (98.8, 94.6, 95.41), (97, 25.3, 29.69), (27, 0.8, 0.99)],
)
def test_generalization_factor_anchors(inside: float, outside: float, expected: float) -> None:
    assert generalization_factor(inside, outside) == pytest.approx(expected, abs=0.006)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 4))
def test_generalization_factor_lies_between_and_scales(inside: float, outside: float, beta: float) -> None:
    value = generalization_factor(inside, outside, beta)
    assert min(inside, outside) * (1 - 1e-9) <= value <= max(inside, outside) * (1 + 1e-9)
    assert generalization_factor(100 * inside, 100 * outside, beta) == pytest.approx(100 * value)


def test_generalization_factor_of_nothing_is_zero_and_of_losses_undefined() -> None:
    assert generalization_factor(0.0, 0.0) == generalization_factor(0.0, 0.5) == generalization_factor(0.5, 0.0) == 0.0
    for arguments in [(-0.1, 0.5), (0.5, -0.1), (math.nan, 0.5)]:
        with pytest.raises(ValueError, match="0 or"):
            generalization_factor(*arguments)
    with pytest.raises(ValueError, match="beta=0"):
        generalization_factor(0.5, 0.5, beta=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_branching_factor_counts_the_nucleus(dtype: torch.dtype) -> None:
    uniform = torch.zeros(3, 100, dtype=dtype)
    certain = torch.full((1, 100), -50.0, dtype=dtype)
    certain[0, 7] = 50.0
    assert rollout_branching_factor(uniform, 0.95) == 95
    assert rollout_branching_factor(certain, 0.95) == 1
    assert rollout_branching_factor(torch.cat([uniform, certain]), 0.95) == (3 * 95 + 1) / 4


def test_branching_factor_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.04, 0.03, 0.03]], dtype=torch.float64).log()
    assert rollout_branching_factor(logits, 0.8) == (2 + 1) / 2
    assert rollout_branching_factor(logits, 0.95) == (3 + 3) / 2
    assert rollout_branching_factor(logits, 1.0) == 4


def test_branching_factor_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        rollout_branching_factor(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="top_p is 0"):
        rollout_branching_factor(torch.zeros(1, 4), 0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_standard_error_is_over_prompts(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, abs=1e-9)
    assert mean(values) == pytest.approx(statistics.fmean(values))


def test_too_few_values() -> None:
    assert math.isnan(standard_error([0.5])) and math.isnan(standard_error([]))
    with pytest.raises(ValueError, match="no values"):
        mean([])

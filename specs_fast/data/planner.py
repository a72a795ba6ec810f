"""Packing trees into micro-batches: as few as a token budget allows, then even in tokens and attention.

The planner sees lengths only and knows nothing of tensors, so a plan costs no model and is the same wherever it is made.

Letters: B trees, S responses of all trees, I parts (whole trees, or pieces of split ones), K micro-batches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from specs_fast.data.bin_packing import Floats, Ints, best_fit, divided, evened, fill_rows, next_fit, spread

MAX_LENGTH = 2**24


class Part(NamedTuple):
    """A tree, or some of its responses under their prompt; response indices ascend."""

    tree: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """K micro-batches that hold every response once, heaviest first; parts within one in the order of the trees.

    tokens, pairs: per micro-batch, what the model computes on, padding included, and the (query, key) pairs that attention
    sees. padding: tokens that are padding. num_split_trees: trees cut because they exceed the budget; extra_prompt_tokens: what
    repeating their prompts costs. over_budget: parts that exceed the budget and cannot be cut, each a micro-batch of its own.
    """

    micro_batches: tuple[tuple[Part, ...], ...]
    tokens: tuple[int, ...]
    pairs: tuple[int, ...]
    max_tokens: int
    padding: int
    num_split_trees: int
    extra_prompt_tokens: int
    over_budget: int

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def fill(self) -> float:
        """Tokens over the budget of all micro-batches; 0 without any."""
        return sum(self.tokens) / (len(self) * self.max_tokens) if len(self) else 0.0

    @property
    def padding_waste(self) -> float:
        """Share of tokens that are padding."""
        return self.padding / sum(self.tokens) if self.padding else 0.0

    def metrics(self) -> dict[str, float]:
        """What a step logs; balance is the largest micro-batch over their mean, 1 at best."""
        return {
            "packing/micro_batches": float(len(self)),
            "packing/fill": self.fill,
            "packing/padding_waste": self.padding_waste,
            "packing/balance_tokens": _largest_over_mean(self.tokens),
            "packing/balance_pairs": _largest_over_mean(self.pairs),
            "packing/split_trees": float(self.num_split_trees),
            "packing/extra_prompt_tokens": float(self.extra_prompt_tokens),
            "packing/over_budget": float(self.over_budget),
        }


def plan(
    prompt_lengths: ArrayLike,
    num_responses: ArrayLike,
    response_lengths: ArrayLike,
    max_tokens: int,
    *,
    packing: str,
    keep_whole: bool = False,
    multiple_of: int = 1,
) -> Plan:
    """Micro-batches of at most ``max_tokens`` tokens each.

    prompt_lengths, num_responses: integers ``[B]``. response_lengths: integers ``[S]``, tree by tree. Zeros are allowed.

    packing "shared": a tree of P prompt tokens and responses R_i counts P + sum R_i tokens and sees
    P (P + 1) / 2 + sum (R_i P + R_i (R_i + 1) / 2) pairs. Trees are placed best fit decreasing, which needs at most 11/9 of the
    fewest micro-batches plus one, or in their own order where that needs fewer. Then the same number is filled again, the
    costliest tree first, each into the cheapest micro-batch with room, and taken if its largest cost is smaller; and trees move
    or change places as long as that lowers the largest cost (a tree's share of all tokens plus its share of all pairs).

    packing "none": a micro-batch of n rows, the longest of L tokens, counts n L tokens and n L (L + 1) / 2 pairs. Trees of
    similar length go together; evenness is not traded for padding.

    A tree over the budget is split by responses into as few parts as best fit decreasing finds, its prompt in each; with
    ``keep_whole`` (pairs, whose loss needs both sides) it is not. What is over the budget even so (a kept tree, a prompt with
    one response) is a micro-batch of its own and counted. ``multiple_of`` raises the number of micro-batches to a multiple (equal
    counts for ranks), with empty ones where there are fewer parts than that.

    Deterministic: equal lengths are taken in the order of trees. O(S + I log I) and a bounded search for changes.

    ValueError for a budget or ``multiple_of`` that is no integer of at least 1, an unknown packing, lengths that are no integers
    of 0 to 2^24 or whose pairs may not fit 64 bits, and numbers of entries that do not match.
    """
    if packing not in ("shared", "none"):
        raise ValueError(f"packing is {packing!r}; allowed: 'shared', 'none'")
    max_tokens, multiple_of = _count("max_tokens", max_tokens), _count("multiple_of", multiple_of)
    trees = _Trees.checked(prompt_lengths, num_responses, response_lengths)
    shared = packing == "shared"
    parts, costs, split = _parts(trees, max_tokens, shared=shared, keep_whole=keep_whole)
    order = np.lexsort((-costs.pairs, -costs.longest, -costs.tokens) if shared else (-costs.rows, -costs.longest))
    over = costs.tokens[order] > max_tokens
    bin_I = np.empty(len(parts), np.int64)
    bin_I[order[over]] = np.arange(over.sum())
    bin_I[order[~over]] = over.sum() + _packed(
        order[~over], costs, max_tokens, int(over.sum()), multiple_of, shared=shared
    )
    count = -(-int(bin_I.max(initial=-1) + 1) // multiple_of) * multiple_of
    tokens_K, pairs_K = costs.totals(bin_I, count, shared=shared)
    heaviest_first = np.lexsort((np.arange(count), -_share(tokens_K, pairs_K)))
    bins: list[list[Part]] = [[] for _ in range(count)]
    for part, index in zip(parts, np.argsort(heaviest_first)[bin_I].tolist(), strict=True):
        bins[index].append(part)
    return Plan(
        micro_batches=tuple(map(tuple, bins)),
        tokens=tuple(tokens_K[heaviest_first].tolist()),
        pairs=tuple(pairs_K[heaviest_first].tolist()),
        max_tokens=max_tokens,
        padding=int(tokens_K.sum() - costs.useful.sum()),
        num_split_trees=split,
        extra_prompt_tokens=int(costs.prompt.sum() - trees.prompt_B.sum()) if shared else 0,
        over_budget=int(over.sum()),
    )


@dataclass(frozen=True)
class _Trees:
    """Checked lengths: prompt_B, num_B ``[B]``, response_S ``[S]``; start_B is where a tree's responses begin in response_S."""

    prompt_B: Ints
    num_B: Ints
    response_S: Ints
    start_B: Ints

    @staticmethod
    def checked(prompts: ArrayLike, counts: ArrayLike, responses: ArrayLike) -> _Trees:
        prompt_B, num_B = _integers("prompt_lengths", prompts), _integers("num_responses", counts)
        response_S = _integers("response_lengths", responses)
        if len(prompt_B) != len(num_B):
            raise ValueError(
                f"prompt_lengths has {len(prompt_B)} entries, num_responses {len(num_B)}; one each per tree"
            )
        if num_B.sum() != len(response_S):
            raise ValueError(f"num_responses sum to {num_B.sum()}, but response_lengths has {len(response_S)} entries")
        longest = int(prompt_B.max(initial=0)) + int(response_S.max(initial=0))
        rows = len(prompt_B) + len(response_S)
        if rows * (longest + 1) ** 2 >= 2**63:
            raise ValueError(
                f"{rows} rows of up to {longest} tokens: their (query, key) pairs may not fit 64 bits; plan fewer at a time"
            )
        return _Trees(prompt_B, num_B, response_S, np.cumsum(num_B) - num_B)


def _count(name: str, value: int) -> int:
    """The value as a Python integer of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return count


def _integers(name: str, values: ArrayLike) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be integers in one dimension, got {array.dtype} of shape {array.shape}")
    bad = np.flatnonzero((array < 0) | (array > MAX_LENGTH))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}; allowed: 0 to {MAX_LENGTH}")
    return array.astype(np.int64)


@dataclass(frozen=True)
class _Costs:
    """What each part costs, int64 ``[I]``: prompt tokens; rows, the longest one; tokens, pairs; tokens that are no padding."""

    prompt: Ints
    rows: Ints
    longest: Ints
    tokens: Ints
    pairs: Ints
    useful: Ints

    @staticmethod
    def of(parts: Sequence[Part], trees: _Trees, *, shared: bool) -> _Costs:
        tree_I = np.fromiter((part.tree for part in parts), np.int64, len(parts))
        rows_I = np.fromiter((len(part.responses) for part in parts), np.int64, len(parts))
        part_of = np.repeat(np.arange(len(parts)), rows_I)
        chosen = np.fromiter((r for part in parts for r in part.responses), np.int64, int(rows_I.sum()))
        length = trees.response_S[trees.start_B[tree_I][part_of] + chosen]
        prompt_I = trees.prompt_B[tree_I]

        longest_I = np.zeros(len(parts), np.int64)
        np.maximum.at(longest_I, part_of, length + prompt_I[part_of])
        if not shared:
            padded = rows_I * longest_I
            useful = _sums(length + prompt_I[part_of], part_of, len(parts))
            return _Costs(prompt_I, rows_I, longest_I, padded, padded * (longest_I + 1) // 2, useful)
        tokens_I = prompt_I + _sums(length, part_of, len(parts))
        seen = length * prompt_I[part_of] + length * (length + 1) // 2
        pairs_I = prompt_I * (prompt_I + 1) // 2 + _sums(seen, part_of, len(parts))
        return _Costs(prompt_I, rows_I, longest_I, tokens_I, pairs_I, tokens_I)

    def totals(self, bin_I: Ints, count: int, *, shared: bool) -> tuple[Ints, Ints]:
        """Tokens and pairs of each of ``count`` micro-batches, of which part i lies in ``bin_I[i]``."""
        if shared:
            return _sums(self.tokens, bin_I, count), _sums(self.pairs, bin_I, count)
        longest_K = np.zeros(count, np.int64)
        np.maximum.at(longest_K, bin_I, self.longest)
        tokens_K = _sums(self.rows, bin_I, count) * longest_K
        return tokens_K, tokens_K * (longest_K + 1) // 2


def _sums(values: Ints, groups: Ints, count: int) -> Ints:
    """The values added up per group."""
    total = np.zeros(count, np.int64)
    np.add.at(total, groups, values)
    return total


def _share(tokens: Ints, pairs: Ints) -> Floats:
    """Cost: the share of all tokens plus the share of all pairs."""
    return tokens / max(1, tokens.sum()) + pairs / max(1, pairs.sum())


def _parts(trees: _Trees, max_tokens: int, *, shared: bool, keep_whole: bool) -> tuple[list[Part], _Costs, int]:
    """Parts in the order of trees and of their first responses, their costs, and how many trees are split."""
    every = {count: tuple(range(count)) for count in np.unique(trees.num_B).tolist()}
    whole = [Part(tree, every[count]) for tree, count in enumerate(trees.num_B.tolist())]
    costs = _Costs.of(whole, trees, shared=shared)
    over_B = (costs.tokens > max_tokens) & (trees.num_B > 1)
    if keep_whole or not over_B.any():
        return whole, costs, 0
    parts: list[Part] = []
    for part, over in zip(whole, over_B.tolist(), strict=True):
        parts += _split(part.tree, trees, max_tokens, shared=shared) if over else [part]
    return parts, _Costs.of(parts, trees, shared=shared), int(over_B.sum())


def _split(tree: int, trees: _Trees, max_tokens: int, *, shared: bool) -> list[Part]:
    """Parts of a tree that is over the budget."""
    prompt = int(trees.prompt_B[tree])
    lengths = trees.response_S[trees.start_B[tree] : trees.start_B[tree] + trees.num_B[tree]]
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths[order].tolist()
    bins = (
        best_fit(sizes, max_tokens - prompt)
        if shared
        else fill_rows([1] * len(sizes), [prompt + size for size in sizes], max_tokens)
    )
    groups: list[list[int]] = [[] for _ in range(max(bins) + 1)]
    for response, index in sorted(zip(order, bins, strict=True)):
        groups[index].append(response)
    return sorted(Part(tree, tuple(group)) for group in groups)


def _packed(order: Ints, costs: _Costs, max_tokens: int, num_alone: int, multiple_of: int, *, shared: bool) -> Ints:
    """Micro-batch of each part of ``order``, largest first, all of which fit the budget."""
    in_order = np.argsort(order)  # positions in ``order`` that bring the parts back to their own order
    best, plain = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    rows, longest, tokens = costs.rows[order], costs.longest[order], costs.tokens[order]
    if shared:
        best[:] = best_fit(tokens.tolist(), max_tokens)
        plain[in_order] = next_fit(tokens[in_order].tolist(), max_tokens)
    else:
        best[:] = fill_rows(rows.tolist(), longest.tolist(), max_tokens)
        plain[in_order] = fill_rows(rows[in_order].tolist(), longest[in_order].tolist(), max_tokens)
    chosen = min(best, plain, key=lambda bins: bins.max(initial=-1))
    fewest = int(chosen.max(initial=-1)) + 1
    count = -(-(fewest + num_alone) // multiple_of) * multiple_of - num_alone
    if count > fewest:
        chosen = divided(chosen, tokens, fewest, count)
    if not shared or count < 2:
        return chosen
    share = _share(tokens, costs.pairs[order])
    even = spread(share, tokens, count, max_tokens)
    if even is not None:
        chosen = min(chosen, even, key=lambda bins: np.bincount(bins, share, count).max())
    return evened(chosen, share, tokens, count, max_tokens)


def _largest_over_mean(values: Sequence[int]) -> float:
    total: Any = sum(values)
    return max(values) * len(values) / total if total else 1.0

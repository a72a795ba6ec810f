"""Bins for sizes: best fit, next fit, padded rows, and bins of even cost. Results give the bin of each item.

Letters: C candidates to change places with.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """A bin per size; sizes descend. Each goes where the least room is left after it, the bin that came to it first among equals.

    A size above the capacity has a bin of its own.
    """
    capacity = min(capacity, sum(sizes))
    rooms = _Rooms(capacity)
    bins: list[int] = []
    count = 0
    for size in sizes:
        room, index = rooms.take(size) or (capacity, count)
        count += index == count
        bins.append(index)
        rooms.put(room - size, index)
    return bins


class _Rooms:
    """Bins by the room that is left in them; the least room of at least a size is found in constant time.

    Bit r of a word says that a bin with room r (its lower bits) is there, bit w of ``words`` that word w is not zero.
    """

    def __init__(self, capacity: int) -> None:
        self.shift = max(1, max(capacity, 0).bit_length() // 2)
        self.low = (1 << self.shift) - 1
        self.bits = [0] * ((max(capacity, 0) >> self.shift) + 1)
        self.words = 0
        self.bins: dict[int, deque[int]] = {}

    def put(self, room: int, index: int) -> None:
        """Room below zero is none."""
        if room < 0:
            return
        self.bins.setdefault(room, deque()).append(index)
        self.bits[room >> self.shift] |= 1 << (room & self.low)
        self.words |= 1 << (room >> self.shift)

    def take(self, size: int) -> tuple[int, int] | None:
        """Room and index of the bin, which is taken out; None where no bin has room."""
        word = size >> self.shift
        if word >= len(self.bits):
            return None
        bits = self.bits[word] >> (size & self.low) << (size & self.low)
        if not bits:
            words = self.words >> (word + 1) << (word + 1)
            if not words:
                return None
            word = (words & -words).bit_length() - 1
            bits = self.bits[word]
        room = (word << self.shift) + (bits & -bits).bit_length() - 1
        index = self.bins[room].popleft()
        if not self.bins[room]:
            self.bits[word] ^= 1 << (room & self.low)
            if not self.bits[word]:
                self.words ^= 1 << word
        return room, index


def next_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """A bin per size: the last one as long as it has room."""
    bins: list[int] = []
    room, last = -1, -1
    for size in sizes:
        if size > room:
            room, last = capacity, last + 1
        room -= size
        bins.append(last)
    return bins


def fill_rows(rows: Sequence[int], longest: Sequence[int], capacity: int) -> list[int]:
    """A bin per group of rows: the last one as long as all its rows, padded to the longest, fit."""
    bins: list[int] = []
    held, height, last = 0, 0, -1
    for count, length in zip(rows, longest, strict=True):
        held, height = held + count, max(height, length)
        if last < 0 or held * height > capacity:
            held, height, last = count, length, last + 1
        bins.append(last)
    return bins


def spread(share: Floats, tokens: Ints, count: int, capacity: int) -> Ints | None:
    """The costliest part first, each into the cheapest of ``count`` bins that has room; None where one finds no room.

    Looking past bins without room is given up after as many looks as there are parts, so the search stays short.
    """
    bins = np.empty(len(share), np.int64)
    rooms = [capacity] * count
    heap = [(0.0, index) for index in range(count)]
    looks = len(share)
    sizes, costs = tokens.tolist(), share.tolist()
    for item in np.argsort(-share, kind="stable").tolist():
        passed = []
        while heap and rooms[heap[0][1]] < sizes[item] and looks:
            passed.append(heapq.heappop(heap))
            looks -= 1
        if not heap or rooms[heap[0][1]] < sizes[item]:
            return None
        cost, index = heap[0]
        heapq.heapreplace(heap, (cost + costs[item], index))
        rooms[index] -= sizes[item]
        bins[item] = index
        for entry in passed:
            heapq.heappush(heap, entry)
    return bins


def divided(bins: Ints, tokens: Ints, fewest: int, count: int) -> Ints:
    """The bins as ``count`` of them: every second part of the largest that has two goes to a new one, as often as possible."""
    members = np.split(np.argsort(bins, kind="stable"), np.cumsum(np.bincount(bins, minlength=fewest))[:-1])
    heap = [(-int(tokens[items].sum()), index) for index, items in enumerate(members) if len(items) > 1]
    heapq.heapify(heap)
    while heap and len(members) < count:
        largest = heapq.heappop(heap)[1]
        members.append(members[largest][1::2])
        members[largest] = members[largest][::2]
        for index in (largest, len(members) - 1):
            if len(members[index]) > 1:
                heapq.heappush(heap, (-int(tokens[members[index]].sum()), index))
    result = np.empty_like(bins)
    for index, items in enumerate(members):
        result[items] = index
    return result


LOOKS = 4_000_000
"""Pairs of items that `evened` compares at most: about a tenth of a second."""


def evened(bins: Ints, share: Floats, tokens: Ints, count: int, capacity: int) -> Ints:
    """Items move out of the bin of the largest share, or change places with items elsewhere, as long as that lowers it.

    Each time the change after which the larger share of the two bins is least, within the capacity.
    """
    bins = bins.copy()
    load, held = np.bincount(bins, share, count), np.zeros(count, np.int64)
    np.add.at(held, bins, tokens)
    looks = LOOKS
    while True:
        largest = int(load.argmax())
        ours, theirs = np.flatnonzero(bins == largest), np.flatnonzero(bins != largest)
        # An item may also change places with nothing: one more candidate per bin.
        share_C = np.append(share[theirs], np.zeros(count))
        tokens_C = np.append(tokens[theirs], np.zeros(count, np.int64))
        bin_C = np.append(bins[theirs], np.arange(count))
        looks -= len(ours) * len(bin_C)
        if looks < 0 or not len(ours):
            return bins
        gained = share[ours, None] - share_C
        moved = tokens[ours, None] - tokens_C
        after = np.maximum(load[largest] - gained, load[bin_C] + gained)
        fits = (held[bin_C] + moved <= capacity) & (held[largest] - moved <= capacity) & (bin_C != largest)
        after[~fits] = np.inf
        item, other = np.unravel_index(after.argmin(), after.shape)
        if not after[item, other] < load[largest] * (1 - 1e-9):
            return bins
        target = int(bin_C[other])
        bins[ours[item]] = target
        if other < len(theirs):
            bins[theirs[other]] = largest
        for index, sign in ((largest, -1), (target, 1)):
            load[index] += sign * gained[item, other]
            held[index] += sign * moved[item, other]

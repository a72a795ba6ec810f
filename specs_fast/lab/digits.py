"""Real handwriting: the 1,797 scanned digits that ship inside scikit-learn, split so that no scan is shared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Scans:
    """Scanned digits of one split.

    pixels: uint8 ``[N, 8, 8]``, 0 background to 255 ink. labels: int64 ``[N]``, 0..9.
    indices: int64 ``[N]``, row of the scan in scikit-learn's ``load_digits``.
    by_label: for each digit the positions of its scans within this split.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    by_label: tuple[NDArray[np.int64], ...]

    def draw(self, digits: list[int], rng: np.random.Generator) -> NDArray[np.int64]:
        """A random scan of each of these digits: positions ``[len(digits)]`` within this split."""
        return np.array([rng.choice(self.by_label[digit]) for digit in digits], dtype=np.int64)


@cache
def load_scans(split: Split) -> Scans:
    """The scans of a split: every fourth scan is held out for ``test``.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI), as bundled by ``sklearn.datasets``.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not one of 'train', 'test'")
    from sklearn.datasets import load_digits

    data = load_digits()
    indices = np.arange(len(data.target))
    indices = indices[(indices % 4 == 3) == (split == "test")]
    pixels = np.clip(np.rint(data.images[indices] * (255.0 / 16.0)), 0, 255).astype(np.uint8)
    labels = data.target[indices].astype(np.int64)
    by_label = tuple(np.flatnonzero(labels == digit) for digit in range(10))
    return Scans(pixels, labels, indices.astype(np.int64), by_label)

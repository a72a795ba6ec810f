"""Images of a few scanned digits in a row, 32 x 96 pixels, with as much disturbance as a look asks for.

Letters: H, W canvas height and width (32, 96).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from specs_fast.lab.digits import Scans

HEIGHT, WIDTH = 32, 96
DIGIT_SIZE = 16


@dataclass(frozen=True)
class Look:
    """How digits are placed and disturbed.

    lift: largest vertical shift from the middle, pixels. scale: range of sizes relative to 16 pixels. angle: largest rotation,
    degrees. noise: range of the standard deviation of Gaussian pixel noise (0..255). invert: share of images with ink and
    paper swapped. contrast: range of the ink's strength. speckles: largest number of random bright dots.
    """

    lift: float = 4.0
    scale: tuple[float, float] = (0.95, 1.05)
    angle: float = 0.0
    noise: tuple[float, float] = (0.0, 8.0)
    invert: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    speckles: int = 0


PLAIN = Look()
VARIED = Look(lift=7.0, scale=(0.82, 1.15), angle=14.0, noise=(0.0, 30.0), invert=0.15, contrast=(0.6, 1.0), speckles=6)
SCATTERED = Look(lift=8.0, scale=(0.78, 1.2), angle=18.0)
NOISY = Look(noise=(25.0, 45.0), invert=0.5, contrast=(0.6, 0.9), speckles=8)


@dataclass(frozen=True)
class Scene:
    """pixels: uint8 ``[H, W]``. centres: float32 ``[digits, 2]``, (y, x) in pixels, left to right."""

    pixels: NDArray[np.uint8]
    centres: NDArray[np.float32]

    def image(self) -> Image.Image:
        """The scene as an RGB image, which is what a vision-language model expects."""
        return Image.fromarray(self.pixels).convert("RGB")


def _tile(pixels: NDArray[np.uint8], size: int, angle: float) -> NDArray[np.float32]:
    """One scan enlarged to ``size`` pixels, softened, and turned."""
    tile = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    tile = tile.filter(ImageFilter.GaussianBlur(0.5))
    if angle:
        tile = tile.rotate(angle, resample=Image.Resampling.BILINEAR)
    return np.asarray(tile, dtype=np.float32)


def compose(scans: Scans, chosen: NDArray[np.int64], look: Look, rng: np.random.Generator) -> Scene:
    """Draws the chosen scans left to right with random gaps.

    Raises ValueError where the digits cannot fit side by side (more than five at normal size).
    """
    count = len(chosen)
    sizes = np.clip(np.rint(rng.uniform(*look.scale, size=count) * DIGIT_SIZE), 8, HEIGHT).astype(int)
    if count * DIGIT_SIZE > WIDTH or count == 0:
        raise ValueError(f"{count} digits do not fit on a canvas of {WIDTH} pixels; use 1 to {WIDTH // DIGIT_SIZE}")
    if sizes.sum() > WIDTH:
        sizes = np.minimum(sizes, DIGIT_SIZE)
    free = WIDTH - int(sizes.sum())
    cuts = np.sort(rng.integers(0, free + 1, size=count))
    lefts = cuts + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    canvas = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    centres = np.zeros((count, 2), dtype=np.float32)
    for i, (scan, size, left) in enumerate(zip(chosen, sizes, lefts, strict=True)):
        middle = (HEIGHT - size) / 2
        top = int(np.clip(np.rint(middle + rng.uniform(-look.lift, look.lift)), 0, HEIGHT - size))
        angle = float(rng.uniform(-look.angle, look.angle)) if look.angle else 0.0
        region = canvas[top : top + size, left : left + size]
        np.maximum(region, _tile(scans.pixels[scan], int(size), angle), out=region)
        centres[i] = (top + size / 2, left + size / 2)
    canvas *= rng.uniform(*look.contrast)
    if look.speckles:
        dots = int(rng.integers(0, look.speckles + 1))
        canvas[rng.integers(0, HEIGHT, dots), rng.integers(0, WIDTH, dots)] = 200.0
    if look.noise[1] > 0:
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(*look.noise)
    if look.invert and rng.random() < look.invert:
        canvas = 255.0 - canvas
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), centres)

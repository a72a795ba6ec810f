"""Scans, scenes, and the two ways of cutting an image into patches."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from specs_fast.lab.digits import load_scans
from specs_fast.lab.examples import IMAGE_TOKENS, NO_DIGIT, cell_targets, patchify
from specs_fast.lab.processor import build_processor
from specs_fast.lab.scenes import HEIGHT, NOISY, PLAIN, SCATTERED, VARIED, WIDTH, Scene, compose

LOOKS = {"plain": PLAIN, "varied": VARIED, "scattered": SCATTERED, "noisy": NOISY}


def test_no_scan_is_in_both_splits_and_every_digit_is_in_each() -> None:
    train, test = load_scans("train"), load_scans("test")
    assert not set(train.indices.tolist()) & set(test.indices.tolist())
    assert len(train.indices) + len(test.indices) == len(load_digits().target)
    for scans in (train, test):
        assert all(len(positions) > 30 for positions in scans.by_label)


def test_scans_keep_the_label_and_pixels_of_their_row() -> None:
    source = load_digits()
    scans = load_scans("test")
    assert (source.target[scans.indices] == scans.labels).all()
    assert np.abs(source.images[scans.indices] * (255 / 16) - scans.pixels).max() <= 0.5


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'val'"):
        load_scans("val")  # type: ignore[arg-type]


def test_drawn_scans_show_the_digits_asked_for() -> None:
    scans = load_scans("train")
    chosen = scans.draw([3, 7, 1, 4], np.random.default_rng(0))
    assert scans.labels[chosen].tolist() == [3, 7, 1, 4]


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_digits_stand_left_to_right_inside_the_canvas(name: str, count: int) -> None:
    scans = load_scans("test")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = compose(scans, scans.draw([8] * count, rng), LOOKS[name], rng)
        assert scene.pixels.shape == (HEIGHT, WIDTH) and scene.pixels.dtype == np.uint8
        assert (np.diff(scene.centres[:, 1]) >= 8).all()
        assert (scene.centres >= 0).all() and (scene.centres <= (HEIGHT, WIDTH)).all()
        assert scene.pixels.std() > 10


def test_ink_is_where_the_centres_say() -> None:
    scans = load_scans("train")
    rng = np.random.default_rng(0)
    scene = compose(scans, scans.draw([0, 0, 0], rng), PLAIN, rng)
    near = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for y, x in scene.centres.astype(int):
        near[max(0, y - 10) : y + 10, max(0, x - 10) : x + 10] = True
    assert scene.pixels[near].mean() > 5 * scene.pixels[~near].mean()


@pytest.mark.parametrize("count", [0, 7])
def test_digits_that_do_not_fit_are_refused(count: int) -> None:
    scans = load_scans("train")
    with pytest.raises(ValueError, match=f"{count} digits"):
        compose(scans, np.zeros(count, dtype=np.int64), PLAIN, np.random.default_rng(0))


def test_fast_patches_equal_the_processors() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, HEIGHT, WIDTH), dtype=np.uint8)
    images = [Scene(image, np.zeros((0, 2), dtype=np.float32)).image() for image in pixels]
    expected = build_processor().image_processor(images, return_tensors="pt")["pixel_values"]
    assert (patchify(pixels) - expected).abs().max() < 1e-5


def test_cell_targets_are_distributions_and_share_a_digit_between_two_cells() -> None:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    centred = Scene(pixels, np.array([[8, 8]], dtype=np.float32))
    between = Scene(pixels, np.array([[8, 16], [24, 88]], dtype=np.float32))
    targets = cell_targets([centred, between], [[7], [3, 5]])
    assert targets.shape == (2, IMAGE_TOKENS, NO_DIGIT + 1)
    assert (targets.sum(-1) - 1).abs().max() < 1e-6
    assert targets[0, 0, 7] == 1 and targets[0, 1:, NO_DIGIT].min() == 1
    assert targets[1, 0, 3] == 0.5 and targets[1, 1, 3] == 0.5 and targets[1, -1, 5] == 1

"""scikit-learn's 1,797 real handwritten digits as a source: most to learn from unlabelled, the rest to be judged on."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.errors import ImagesError, nearest

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "a photo of the number {}.",
    "the handwritten digit {}.",
    "a handwritten number {}.",
    "a scan of the digit {} written with a pen.",
    "a small grey picture of a {}.",
    "{}",
)
SPLITS = ("train", "test")
TRAIN_COUNT = 1200


def load_digits(split: str) -> tuple[list[Image.Image], list[int]]:
    """Return the pictures of a split, 8x8 grey, white on black, and their digits: 1,200 in "train", 597 in "test"."""
    if split not in SPLITS:
        raise ImagesError(
            f"the digits have no split {split!r}{nearest(split, SPLITS)}",
            where=f"demo:digits/{split}",
            fix="use demo:digits/train or demo:digits/test",
        )
    values, digits = _dataset()
    order = np.random.default_rng(0).permutation(len(values))
    chosen = order[:TRAIN_COUNT] if split == "train" else order[TRAIN_COUNT:]
    return [to_image(values[i]) for i in chosen], [int(digits[i]) for i in chosen]


def to_image(values: NDArray[np.generic]) -> Image.Image:
    """Turn an 8x8 array of block counts, 0..16, into a grey picture, 0..255."""
    return Image.fromarray(np.rint(np.asarray(values, dtype=np.float64) * (255 / 16)).astype(np.uint8))


@functools.cache
def _dataset() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImagesError(
            "the demo's digits come with scikit-learn, which is not installed",
            where="demo:digits",
            fix="pip install 'prgkit[demo]'",
        ) from error
    bunch = datasets.load_digits()
    return np.asarray(bunch.images, dtype=np.float64), np.asarray(bunch.target, dtype=np.int64)

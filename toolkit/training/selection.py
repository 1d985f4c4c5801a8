"""Which images are learned from, and how often, by the teacher's confidence."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from prgkit.config.sections import Keep
from prgkit.errors import TargetsError


def sure_enough(confidence: NDArray[np.float32], config: Keep) -> NDArray[np.bool_]:
    """Return which images [n] are learned from.

    Raises:
        TargetsError: fewer than two images an epoch are left.
    """
    chosen: NDArray[np.bool_] = confidence >= config.min_confidence
    left = images_an_epoch(confidence[chosen]) if config.weighted else int(chosen.sum())
    if left < 2:
        raise TargetsError(
            f"{('no image is', 'only one image is')[left]} left to learn from: the teacher's confidence is at most "
            f"{float(confidence.max()):.2f}",
            where=f"data.keep.min_confidence: {config.min_confidence}",
            fix="lower it, or give class names and prompts that fit the images better",
        )
    return chosen


def images_an_epoch(shares: NDArray[np.float32]) -> int:
    """Return how many images an epoch has, each image [n] being in this share of the epochs."""
    return int(shares.sum(dtype=np.float64))


def systematic_sample(
    shares: NDArray[np.float32], count: int, *, epoch: int, epochs: int, seed: int
) -> NDArray[np.int64]:
    """Return the ``count`` images [count] of an epoch; over all epochs each one comes as often as its share says.

    Systematic sampling (Madow, 1949): the shares [n] lie end to end on a line, and ``count`` points at even distances
    pick the images they fall on. A share is at most one distance, so no image is picked twice. The first point moves on
    from epoch to epoch and visits ``epochs`` even places in a shuffled order: all points of a training are one even
    grid, and an image comes in as many epochs as its share of them is, rounded down or up. Where ``count`` is less
    than the sum of the shares, all of them count for that much less.

    Args:
        shares: of the epochs, each above 0 and at most 1.
        count: images in each epoch, at most the sum of the shares.
        epoch: from 0.
        epochs: of the whole training.
        seed: of the training.
    """
    ends = np.cumsum(shares, dtype=np.float64)
    # A stride near the golden section visits every place once, and never two neighbours in a row.
    stride = next(step for step in range(max(1, round(0.618 * epochs)), 2 * epochs) if math.gcd(step, epochs) == 1)
    within = np.random.default_rng(seed).integers(2**16) / 2**16  # coarse, so that no sum below rounds up to the end
    first = (within + epoch * stride % epochs) / epochs  # in distances
    points = (first + np.arange(count)) * (ends[-1] / count)
    picked: NDArray[np.int64] = np.searchsorted(ends, points, side="right").astype(np.int64)
    return picked

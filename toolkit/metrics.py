"""How right a model is where labels exist, and how faithful to another where none do; shares are in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]  # [images, classes]
Labels = NDArray[np.integer[Any]]  # [images]
Z_ONE_SIDED = 1.644854  # of a normal value, 95 % lie below
# Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, 2.042 is on the safe side.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Scores(NamedTuple):
    """Everything that can be said of a model's logits; None where what it needs is not known. Shares are in percent."""

    top1: float | None
    top1_interval: tuple[float, float] | None
    top5: float | None
    calibration_error: float | None
    agreement_teacher: float | None
    agreement_teacher_interval: tuple[float, float] | None
    agreement_fp32: float | None
    kl_teacher: float | None


def scores(
    logits: Logits, *, teacher: Logits | None = None, fp32: Logits | None = None, labels: Labels | None = None
) -> Scores:
    """Return everything that can be said of ``logits`` [images, classes] with what is known: of no image, nothing."""
    if len(logits) == 0:
        return Scores(*[None] * len(Scores._fields))
    classes = logits.shape[1]
    right = None if labels is None else int((logits.argmax(axis=1) == labels).sum())
    same = None if teacher is None else int((logits.argmax(axis=1) == teacher.argmax(axis=1)).sum())
    return Scores(
        top1=None if right is None else 100 * right / len(logits),
        top1_interval=None if right is None else wilson(right, len(logits)),
        # With five classes or fewer, top-5 is 100 whatever the model does.
        top5=None if labels is None or classes <= 5 else top5(logits, labels),
        calibration_error=None if labels is None else calibration_error(logits, labels),
        agreement_teacher=None if same is None else 100 * same / len(logits),
        agreement_teacher_interval=None if same is None else wilson(same, len(logits)),
        agreement_fp32=None if fp32 is None else agreement(logits, fp32),
        kl_teacher=None if teacher is None else kl(teacher, logits),
    )


def top1(logits: Logits, labels: Labels) -> float:
    """Return the share of images, in percent, whose highest logit is the label's."""
    return top_k(logits, labels, k=1)


def top5(logits: Logits, labels: Labels) -> float:
    """Return the share of images, in percent, whose label is among the five highest logits."""
    return top_k(logits, labels, k=5)


def top_k(logits: Logits, labels: Labels, *, k: int) -> float:
    """Return the share of images, in percent, whose label is among the ``k`` highest; ties go to the lower index."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]  # [images, k]
    return 100 * float((best == labels[:, None]).any(axis=1).mean())


def agreement(logits: Logits, reference: Logits) -> float:
    """Return the share of images, in percent, on which two models give the same answer."""
    return 100 * float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())


def wilson(hits: int, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95 % interval, in percent, of a share of which ``hits`` of ``count`` were seen.

    Unlike the normal approximation it stays within 0 and 100, and is not empty when every image is right.
    """
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    low, high = 100 * (centre - half), 100 * (centre + half)
    return 0.0 if hits == 0 else low, 100.0 if hits == count else high  # to the last bit


def paired_bound(won: int, lost: int, count: int, *, z: float = Z_ONE_SIDED) -> float:
    """Return the lower bound, in percent points, of the difference between two shares of the same ``count`` images.

    ``won`` are the images that only the first has right, ``lost`` those that only the second has. The bound is
    one-sided, at 95 %, by the score test of Tango (Statistics in Medicine 17, 1998), which holds where differences are
    few: without one it is -z^2 / (count + z^2). The upper bound is minus the lower one of the two exchanged.
    """
    low, high = -1.0, (won - lost) / count
    for _ in range(50):  # the statistic falls as the difference rises
        middle = (low + high) / 2
        linear = (2 * count - won + lost) * middle - won - lost
        least = (
            lost * middle * (1 - middle)
        )  # likeliest share of lost ones, were the difference the middle: a quadratic
        share = (math.sqrt(max(0.0, linear**2 + 8 * count * least)) - linear) / (4 * count)
        variance = count * (2 * share + middle * (1 - middle))
        if won - lost - count * middle > z * math.sqrt(max(0.0, variance)):
            low = middle
        else:
            high = middle
    return 100 * low


def mean_interval(values: Sequence[float], minus: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``values``, or of that mean less the mean of ``minus``, by Student's t.

    With ``minus`` it is Welch's (Biometrika 34, 1947), whose degrees of freedom are rounded down. A single value has no
    spread that could be known: alone its interval is empty.
    """
    groups = [np.asarray(group, np.float64) for group in (values, minus) if group is not None]
    mean = float(groups[0].mean() - (groups[1].mean() if minus is not None else 0.0))
    parts = [(float(group.var(ddof=1)) / len(group), len(group) - 1) for group in groups if len(group) > 1]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return mean, mean
    freedom = int(variance**2 / sum(part**2 / free for part, free in parts) + 1e-9)
    half = T[min(freedom, len(T)) - 1] * math.sqrt(variance)
    return mean - half, mean + half


def kl(reference: Logits, other: Logits) -> float:
    """Return the mean over images of KL(reference || other) between their softmaxes, in nats."""
    return float(divergences(reference, other).mean())


def divergences(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """Return KL(reference || other) of the softmax over classes for each image [images], in nats.

    It is never below zero, where rounding would take it.
    """
    log_p, log_q = log_softmax(reference), log_softmax(other)  # [images, classes]
    per_image: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return np.maximum(per_image, 0)


def calibration_error(logits: Logits, labels: Labels, *, bins: int = 15) -> float:
    """Return the expected calibration error, in percent points: how far confidence is from accuracy.

    Images are binned by confidence in equal widths; each bin's gap is weighted by its share of the images.
    """
    probabilities = np.exp(log_softmax(logits))
    confidence = probabilities.max(axis=1)  # [images]
    right = probabilities.argmax(axis=1) == labels  # [images]
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)  # [images]
    gaps = np.bincount(which, weights=right - confidence, minlength=bins)  # [bins], summed over images
    return 100 * float(np.abs(gaps).sum()) / len(logits)


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the logarithm of the softmax over classes, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result

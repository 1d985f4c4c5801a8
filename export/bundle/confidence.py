"""What a student's confidences are worth: their temperature, how often sure answers are right, what shows no class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from prgkit.data.ticks import Tick, ticked
from prgkit.export.bundle.manifest import Confidence, Manifest, RejectionScore
from prgkit.metrics import Logits, calibration_error, log_softmax, wilson

LEAST_IMAGES = 20  # with fewer, neither a temperature nor a share of right answers says anything
LEAST_TICKS = 50  # of held-out images; with fewer, the teacher's answers to all of them say more
IMAGES_A_BIN = 50  # of the calibration error: of fewer, the share of right answers differs by chance alone
TEMPERATURES = (0.05, 20.0)  # the least and the largest
PASSING = 0.95  # of the held-out images
NORMALISED = 1e-3  # the largest energy of logits that are logarithms of probabilities, as dho's are: rounding

Right = NDArray[np.bool_]  # [images]


def measure_confidence(
    logits: Logits, teacher: Logits, *, keys: Sequence[str] = (), ticks: Iterable[Tick] = (), classes: Sequence[str]
) -> Confidence | None:
    """Return what the confidences in a student's logits [n, C] are worth; None where n is too small.

    An answer is right where it is the teacher's; where `LEAST_TICKS` of the images are ticked, these alone are looked
    at, and an answer is right where a person says so. One of which nobody knows counts as wrong.

    Args:
        logits: the student's, of held-out images.
        teacher: the teacher's logits [n, C] of the same images.
        keys: their content keys [n], by which ticks find them.
        ticks: what a person said of some of them.
        classes: C names.
    """
    if len(logits) < LEAST_IMAGES:
        return None
    answers = logits.argmax(axis=1)  # [n]
    by_key = {tick.key: tick for tick in ticked(ticks)}
    seen = [place for place, key in enumerate(keys) if key in by_key]
    judged, right = logits, answers == teacher.argmax(axis=1)
    if by_ticks := len(seen) >= LEAST_TICKS:
        judged = logits[seen]
        right = np.array([classes[answers[place]] == by_key[keys[place]].truth for place in seen])
    temperature = fit_temperature(judged, right)
    confidence = np.floor(1e4 * confidences(judged / temperature)) / 1e4
    labels = np.where(right, judged.argmax(axis=1), -1)
    bins = max(1, min(15, len(judged) // IMAGES_A_BIN))
    by: RejectionScore = "probability" if np.abs(energy(logits)).max() < NORMALISED else "energy"
    return Confidence(
        temperature=temperature,
        fitted_to="ticks" if by_ticks else "teacher",
        images=len(judged),
        calibration_error=calibration_error(judged / temperature, labels, bins=bins),
        uncalibrated_error=calibration_error(judged, labels, bins=bins),
        right=tuple(np.sort(confidence[right]).tolist()),
        wrong=tuple(np.sort(confidence[~right]).tolist()),
        held_out=len(logits),
        reject_below=float(np.quantile(rejection_score(logits / temperature, by), 1 - PASSING, method="lower")),
        reject_by=by,
    )


def fit_temperature(logits: Logits, right: Right) -> float:
    """Return the temperature T at which the confidence of softmax(logits / T) is the chance that an answer is right.

    Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017), by the likelihood of `right`
    [n] alone, which needs no right class where the answer is wrong. With the smoothed targets of Platt
    ("Probabilistic Outputs for Support Vector Machines", 1999), n right answers of n are no certainty.
    """
    hits, misses = int(right.sum()), int((~right).sum())
    targets = np.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2))  # [n]
    low, high = TEMPERATURES
    for _ in range(4):  # to 0.1 %
        tried = np.geomspace(low, high, 17)
        best = int(np.argmin([cross_entropy(confidences(logits / value), targets) for value in tried]))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, 16)]
    return round(float(tried[best]), 4)


def cross_entropy(confidence: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """Return the mean binary cross-entropy between confidences [n] and targets [n], in nats."""
    sure = confidence.clip(1e-12, 1 - 1e-12)
    return float(-(targets * np.log(sure) + (1 - targets) * np.log(1 - sure)).mean())


def confidences(logits: Logits) -> NDArray[np.float64]:
    """Return the largest probability of each image [n]."""
    largest: NDArray[np.float64] = np.exp(log_softmax(logits).max(axis=1))
    return largest


def rejection_score(logits: Logits, by: RejectionScore) -> NDArray[np.float64]:
    """Return a score of each image [n], by its logits over the temperature: low where it shows none of the classes.

    Logarithms of probabilities have no energy but what the temperature gives them, which is largest for flat answers.
    """
    return energy(logits) if by == "energy" else confidences(logits)


def energy(logits: Logits) -> NDArray[np.float64]:
    """Return ln of the sum of exp of the logits, for each image [n]: low where an image shows none of the classes.

    The negative energy of Liu et al., "Energy-based Out-of-distribution Detection", 2020.
    """
    energies: NDArray[np.float64] = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    return energies


def describe_confidence(facts: Confidence | None) -> str:
    """Say in a sentence how confidences were calibrated, and how well that went."""
    if facts is None:
        return f"confidences are not calibrated: that takes {LEAST_IMAGES} held-out images"
    whose, where = truth_of(facts)
    every = f"; every answer is {whose} there, so their number alone bounds it" if not facts.wrong else ""
    return (
        f"confidences: temperature {facts.temperature:.3g}, fitted on {facts.images:,} {where} images{every}; expected "
        f"calibration error {facts.calibration_error:.1f} points, {facts.uncalibrated_error:.1f} without"
    )


def promise(facts: Confidence, least: float) -> str:
    """Say how often answers with a confidence of ``least`` or more are right, and how many images get one."""
    whose, where = truth_of(facts)
    right, wrong = (sum(value >= least for value in values) for values in (facts.right, facts.wrong))
    answered = right + wrong
    if answered < LEAST_IMAGES:
        return (
            f"{answered} of {facts.images:,} {where} images have an answer at {least:g} or above: too few to say how "
            "often such answers are right"
        )
    return (
        f"of the answers at {least:g} or above, at least {wilson(right, answered)[0]:.1f} % were {whose} on {where} "
        f"images ({right:,} of {answered:,}; lower 95 % bound); {100 * answered / facts.images:.1f} % of the "
        f"{facts.images:,} images have one"
    )


def truth_of(facts: Confidence) -> tuple[str, str]:
    """Return what a right answer is called, and the images on which it was."""
    return ("right", "ticked held-out") if facts.fitted_to == "ticks" else ("the teacher's", "held-out")


def uncalibrated(manifest: Manifest) -> str:
    """Say why a bundle's confidences are not calibrated, and what calibrates them."""
    if manifest.relabelled:
        return "confidences are not calibrated: prgkit relabel gave other classes, and nothing was measured with those"
    return f"confidences are not calibrated: prgkit export does so, with {LEAST_IMAGES} held-out images or more"

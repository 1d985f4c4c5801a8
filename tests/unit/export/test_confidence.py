"""What confidences are worth: temperatures and promises worked out by hand, ticks, and what shows no class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from prgkit.data.ticks import Tick
from prgkit.export.bundle.confidence import (
    TEMPERATURES,
    confidences,
    describe_confidence,
    energy,
    fit_temperature,
    measure_confidence,
    promise,
    rejection_score,
)
from prgkit.export.bundle.manifest import Confidence

CLASSES = ("cat", "dog", "fox")


def two_classes(margin: float, images: int) -> np.ndarray[Any, Any]:
    """Logits whose confidence at temperature T is the logistic function of margin / T."""
    return np.tile(np.array([margin, 0], dtype=np.float32), (images, 1))


@pytest.mark.parametrize(
    ("right", "wrong", "confidence"),
    [
        (15, 5, (15 * 16 / 17 + 5 / 7) / 20),  # the mean of Platt's targets, 16/17 and 1/7
        (62, 0, 63 / 64),  # no wrong answer is no certainty
    ],
)
def test_a_temperature_by_hand(right: int, wrong: int, confidence: float) -> None:
    temperature = 4 / math.log(confidence / (1 - confidence))
    found = fit_temperature(two_classes(4, right + wrong), np.arange(right + wrong) < right)
    assert found == pytest.approx(temperature, rel=2e-3)


def test_a_student_that_is_never_right_has_the_largest_temperature() -> None:
    assert fit_temperature(two_classes(4, 30), np.zeros(30, dtype=bool)) == TEMPERATURES[1]


def facts(**other: Any) -> Confidence:
    given = {
        "temperature": 2.0, "fitted_to": "teacher", "images": 50, "calibration_error": 1.25, "uncalibrated_error": 8.5,
        "right": (0.5,) * 20 + (0.8,) * 10 + (0.9,) * 15, "wrong": (0.4,) * 4 + (0.8,), "held_out": 50,
        "reject_below": 1.0,
    }  # fmt: skip
    return Confidence.model_validate({**given, **other})


def test_a_promise_is_the_lower_bound_of_what_was_seen() -> None:
    # 25 right and 1 wrong of 26; Wilson: (25/26 + z²/52 - z sqrt(25/26/26/26 + z²/4/26²)) / (1 + z²/26) = 0.8111
    assert promise(facts(), 0.8) == (
        "of the answers at 0.8 or above, at least 81.1 % were the teacher's on held-out images (25 of 26; lower 95 % "
        "bound); 52.0 % of the 50 images have one"
    )
    assert promise(facts(fitted_to="ticks"), 0.8).startswith(
        "of the answers at 0.8 or above, at least 81.1 % were right on ticked held-out images (25 of 26;"
    )
    assert promise(facts(), 0.85) == (
        "15 of 50 held-out images have an answer at 0.85 or above: too few to say how often such answers are right"
    )


def test_the_export_says_how_it_went() -> None:
    assert describe_confidence(facts()) == (
        "confidences: temperature 2, fitted on 50 held-out images; expected calibration error 1.2 points, 8.5 without"
    )
    assert "; every answer is the teacher's there, so their number alone bounds it;" in describe_confidence(
        facts(wrong=())
    )
    assert describe_confidence(None) == "confidences are not calibrated: that takes 20 held-out images"


def test_the_teacher_decides_where_few_are_ticked_and_ticks_where_many_are() -> None:
    logits = np.zeros((60, 3), dtype=np.float32)
    logits[:, 0] = np.linspace(1, 3, 60)  # the student says cat
    teacher = np.zeros((60, 3), dtype=np.float32)
    teacher[np.arange(60), np.where(np.arange(60) < 45, 0, 1)] = 5  # 45 times the teacher does
    keys = [f"{number:032x}" for number in range(60)]
    right = [Tick(number, "", keys[number], "cat", "", right=True) for number in range(30)]
    named = [Tick(number, "", keys[number], "dog", "", right=False, named="cat") for number in range(50, 55)]
    unknown = [Tick(number, "", keys[number], "dog", "", right=False) for number in range(30, 45)]
    unticked = [Tick(number, "", keys[number], "dog", "") for number in range(45, 50)]
    few = measure_confidence(
        logits, teacher, keys=keys, ticks=[*right, *named, *unknown[1:], *unticked], classes=CLASSES
    )
    assert few is not None
    assert (few.fitted_to, few.images, len(few.right), len(few.wrong)) == ("teacher", 60, 45, 15)
    found = measure_confidence(logits, teacher, keys=keys, ticks=[*right, *named, *unknown, *unticked], classes=CLASSES)
    assert found is not None
    assert (found.fitted_to, found.images, found.held_out) == ("ticks", 50, 60)
    assert (len(found.right), len(found.wrong)) == (35, 15), "what nobody knows is not right"
    assert found.right == tuple(sorted(found.right))
    assert found.reject_below == pytest.approx(np.sort(energy(logits / found.temperature))[2])  # of 60, 5 % are 3
    assert measure_confidence(logits[:19], teacher[:19], classes=CLASSES) is None


def test_students_of_two_heads_reject_what_is_flat_and_not_what_is_sure() -> None:
    """Their logits are logarithms of probabilities: with T > 1 the energy is largest where all classes are alike."""
    torch = pytest.importorskip("torch")
    heads = pytest.importorskip("prgkit.student.heads")
    first = 9 * torch.eye(3)[torch.arange(60) % 3] * torch.linspace(1, 3, 60)[:, None]  # every answer is sure
    head = heads.DualHead(4, 3)
    logits = head.mix(first, first).numpy()
    teacher = np.eye(3, dtype=np.float32)[np.where(np.arange(60) < 45, np.arange(60), np.arange(60) + 1) % 3]
    found = measure_confidence(logits, teacher, classes=CLASSES)
    assert found is not None
    assert found.temperature > 2, "a quarter of what is so sure is wrong"
    assert found.reject_by == "probability"
    assert found.reject_below == pytest.approx(confidences(logits / found.temperature)[2], rel=1e-6)  # 9.0 to 9.6 rise
    flat, sure = (head.mix(given, given).numpy() for given in (torch.zeros(1, 3), 30 * torch.eye(3)[:1]))
    scores = [rejection_score(given / found.temperature, found.reject_by)[0] for given in (flat, sure)]
    assert scores[0] == pytest.approx(1 / 3)
    assert scores[0] < found.reject_below < scores[1]
    assert measure_confidence(3 * logits + 1, teacher, classes=CLASSES).reject_by == "energy"  # type: ignore[union-attr]


def test_energy_is_what_all_classes_together_say() -> None:
    assert energy(np.log(np.array([[1, 2, 5], [1, 1, 2]], dtype=np.float32))) == pytest.approx(
        [math.log(8), math.log(4)]
    )
    assert energy(np.array([[1000, 1000]], dtype=np.float32)) == pytest.approx([1000 + math.log(2)])

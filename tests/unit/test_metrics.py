"""Accuracy, fidelity and calibration, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prgkit import metrics
from prgkit.metrics import Z_ONE_SIDED, paired_bound

# Four images, three classes; the answers are 0, 1, 2 and 0.
LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [2.0, 1.0, 0.0]], dtype=np.float32)


def test_top_k_counts_the_label_among_the_highest() -> None:
    labels = np.array([0, 2, 2, 2])
    assert metrics.top1(LOGITS, labels) == 50.0  # images 0 and 2
    assert metrics.top_k(LOGITS, labels, k=2) == 75.0  # and image 1, whose label comes second
    assert metrics.top5(LOGITS, labels) == 100.0


def test_a_model_that_says_nothing_is_not_right_by_ties() -> None:
    labels = np.arange(10)
    assert metrics.top1(np.zeros((10, 10)), labels) == 10.0
    assert metrics.top5(np.zeros((10, 10)), labels) == 50.0


def test_agreement_compares_answers_not_logits() -> None:
    other = np.array([[9.0, 0.0, 0.0], [0.0, 0.1, 0.0], [5.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert metrics.agreement(LOGITS, other) == 75.0


def test_wilson_interval() -> None:
    # By hand, z = 1.96: centre (0.5 + 1.9208 / 100) / (1 + 3.8415 / 100) = 0.5, half-width 0.0962
    assert metrics.wilson(50, 100) == pytest.approx((40.383, 59.617), abs=1e-3)
    # Newcombe (1998), table I: 81 of 263 is 25.5 % to 36.6 %, 0 of 20 is 0 to 16.1 %
    assert metrics.wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert metrics.wilson(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)
    low, high = metrics.wilson(20, 20)
    assert (low, high) == pytest.approx((83.89, 100.0), abs=0.01)
    assert high <= 100.0
    ends = [(metrics.wilson(0, count)[0], metrics.wilson(count, count)[1]) for count in range(1, 2500)]
    assert set(ends) == {(0.0, 100.0)}, "or the same share again were a better or a worse one"


def test_the_interval_of_a_mean_is_students_and_of_a_difference_welchs() -> None:
    half = 4.303 / math.sqrt(3)  # two degrees of freedom, a deviation of 1
    assert metrics.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))
    # Variances of 2 / 2 each, of one degree of freedom: 2^2 / (1 + 1) = 2 of them together.
    half = 4.303 * math.sqrt(2)
    assert metrics.mean_interval([4.0, 6.0], minus=[1.0, 3.0]) == pytest.approx((3 - half, 3 + half))
    # All of the variance is that of two values: one degree of freedom is left.
    assert metrics.mean_interval([1.0, 3.0], minus=[5.0] * 9) == pytest.approx((-3 - 12.706, -3 + 12.706))
    assert metrics.mean_interval([7.0]) == (7.0, 7.0)
    half = 2.042 * math.sqrt(40 / 39) / math.sqrt(40)  # beyond 30 degrees of freedom
    assert metrics.mean_interval([0.0, 2.0] * 20) == pytest.approx((1 - half, 1 + half))


@pytest.mark.parametrize("counts", [(4, 4), (12, 12), (11, 12)])
def test_the_interval_of_a_difference_holds_it_nineteen_times_in_twenty(counts: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(1500):
        after, before = generator.normal(5.0, 1.0, counts[0]), generator.normal(3.0, 1.0, counts[1])
        low, high = metrics.mean_interval(after.tolist(), minus=before.tolist())
        held += low <= 2.0 <= high
    assert 0.935 < held / 1500 < 0.975  # rounding its degrees of freedom down is on the safe side


def test_kl_of_two_coins() -> None:
    teacher = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    student = np.log(np.array([[0.9, 0.1], [0.9, 0.1]]))
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.5108
    assert metrics.kl(teacher, student) == pytest.approx(first / 2)
    assert metrics.kl(teacher, teacher) == 0.0
    # The teacher's distribution weighs the difference: the other way round it is another number.
    assert metrics.kl(student, teacher) == pytest.approx((0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2)


def test_kl_survives_large_logits_and_ignores_their_offset() -> None:
    teacher = np.array([[1000.0, 0.0]], dtype=np.float32)
    assert metrics.kl(teacher, teacher + 500) == 0.0
    assert metrics.kl(teacher, -teacher) == pytest.approx(1000.0)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    # Two images at confidence 0.9, one right: the gap in that bin is 0.4. Two at 0.6, both right: also 0.4.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    assert metrics.calibration_error(logits, np.array([0, 1, 0, 0])) == pytest.approx(40.0)
    # In one bin the gaps cancel: mean confidence 0.75, accuracy 0.75.
    assert metrics.calibration_error(logits, np.array([0, 1, 0, 0]), bins=1) == pytest.approx(0.0, abs=1e-9)
    certain = np.array([[100.0, 0.0]])
    assert metrics.calibration_error(certain, np.array([0])) == pytest.approx(0.0, abs=1e-9)


def test_scores_say_what_can_be_known_and_no_more() -> None:
    unlabelled = metrics.scores(LOGITS, teacher=LOGITS, fp32=LOGITS)
    assert unlabelled.top1 is unlabelled.top5 is unlabelled.top1_interval is unlabelled.calibration_error is None
    assert unlabelled.agreement_teacher == unlabelled.agreement_fp32 == 100.0
    assert unlabelled.kl_teacher == 0.0
    labelled = metrics.scores(LOGITS, labels=np.array([0, 1, 2, 2]))
    assert labelled.top1 == 75.0
    assert labelled.top5 is None  # of three classes, five are always enough
    assert labelled.agreement_teacher is labelled.agreement_teacher_interval is labelled.kl_teacher is None
    assert labelled.top1_interval == pytest.approx((30.06, 95.44), abs=0.01)


def test_the_bound_of_a_paired_difference() -> None:
    squared = Z_ONE_SIDED**2
    assert paired_bound(0, 0, 40) == pytest.approx(-100 * squared / (40 + squared))
    assert paired_bound(0, 40, 40) == pytest.approx(-100)
    assert paired_bound(90, 90, 2000) == pytest.approx(-100 * Z_ONE_SIDED * (0.09 / 2000) ** 0.5, abs=0.02)
    # Fagerland, Lydersen and Laake (2014): 1 and 7 of 21 patients, 95 % of both sides: -0.517 to -0.026.
    bounds = paired_bound(1, 7, 21, z=1.959964), -paired_bound(7, 1, 21, z=1.959964)
    assert bounds == pytest.approx((-51.7, -2.6), abs=0.05)

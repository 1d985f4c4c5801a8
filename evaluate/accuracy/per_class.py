"""Class by class: how right student and teacher are where labels exist, how often they agree where none do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.schema import ClassShare, ConfusedPair, Int8Verdict, Interval, PerClass, Row
from prgkit.export.bundle.bundle import Evaluation
from prgkit.metrics import wilson

MOST_PAIRS = 8

Indices = NDArray[np.integer]  # [images], of classes


def per_class(
    evaluation: Evaluation,
    rows: Sequence[tuple[Row, NDArray[np.float32] | None]],
    int8: Sequence[Int8Verdict],
    names: Sequence[str],
) -> PerClass | None:
    """Return the report's section on the classes, for the artifact that its headline speaks of; None without logits.

    ``rows`` are those that ran, each with its logits [images, classes] or None.
    """
    lead = formatting.lead_row([row for row, _ in rows], int8)
    logits = next((logits for row, logits in rows if row is lead), None)
    if lead is None or logits is None:
        return None
    student, teacher = logits.argmax(axis=1), evaluation.teacher_logits.argmax(axis=1)  # [images]
    return by_class(formatting.row_name(lead), student, teacher, evaluation.labels, names)


def by_class(
    artifact: str, student: Indices, teacher: Indices, labels: Indices | None, names: Sequence[str]
) -> PerClass:
    """Return each class's shares in percent with Wilson intervals, and the pairs most often taken for each other.

    With labels, a class's images are those of its label and a share is that of right answers (recall). Without, they
    are those that the teacher gives the class, and the student's share is that of the same answer.
    """
    truth = teacher if labels is None else labels
    count = np.bincount(truth, minlength=len(names))  # [classes]
    right = np.bincount(truth[student == truth], minlength=len(names))
    taught = np.bincount(truth[teacher == truth], minlength=len(names))
    shares = []
    for name, images, student_hits, teacher_hits in zip(names, count, right, taught, strict=True):
        student_share, student_interval = share_of(student_hits, images)
        teacher_share, teacher_interval = (None, None) if labels is None else share_of(teacher_hits, images)
        shares.append(
            ClassShare(
                name=name,
                images=int(images),
                student=student_share,
                student_interval=student_interval,
                teacher=teacher_share,
                teacher_interval=teacher_interval,
            )
        )
    measure = "agreement" if labels is None else "recall"
    return PerClass(
        artifact=artifact, measure=measure, classes=shares, pairs=confused_pairs(student, teacher, truth, names)
    )


def share_of(hits: int, count: int) -> tuple[float | None, Interval | None]:
    """Return a share in percent with its interval; both are None where there is no image."""
    return (100 * int(hits) / int(count), wilson(int(hits), int(count))) if count else (None, None)


def confused_pairs(student: Indices, teacher: Indices, truth: Indices, names: Sequence[str]) -> list[ConfusedPair]:
    """Return the (class, answer) pairs that the student gets wrong on most images, the most frequent first."""
    wrong = np.flatnonzero(student != truth)  # the images
    pair_of_image = truth[wrong] * len(names) + student[wrong]  # a number for each pair
    pairs, counts = np.unique(pair_of_image, return_counts=True)
    order = sorted(range(len(pairs)), key=lambda place: (-counts[place], pairs[place]))
    return [
        ConfusedPair(
            name=names[int(pairs[place]) // len(names)],
            answer=names[int(pairs[place]) % len(names)],
            images=int(counts[place]),
            teacher_too=int((teacher[wrong][pair_of_image == pairs[place]] == pairs[place] % len(names)).sum()),
        )
        for place in order[:MOST_PAIRS]
    ]

"""Class by class: how right student and teacher are where labels exist, how often they agree where none do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.class_section import PerClass
from prgkit.evaluate.report.formatting import Report, Row
from prgkit.export.bundle.bundle import Evaluation
from prgkit.metrics import wilson

MOST_PAIRS = 8


def per_class(
    evaluation: Evaluation, rows: Iterable[tuple[Row, Any]], report: Report, names: Sequence[str]
) -> PerClass | None:
    """Return the report's section on the classes, for the artifact that its headline speaks of; None without logits.

    Args:
        evaluation: the images with the teacher's logits, and labels if any.
        rows: the rows that ran, each with its logits [images, classes] or None.
        report: what is known so far; its rows decide which artifact leads.
        names: the classes in the order of the logits.
    """
    lead = formatting.lead_row(report)
    logits = next((logits for row, logits in rows if row is lead), None)
    if lead is None or logits is None:
        return None
    student, teacher = logits.argmax(axis=1), evaluation.teacher_logits.argmax(axis=1)  # [images]
    return {"artifact": formatting.row_name(lead), **by_class(student, teacher, evaluation.labels, names)}


def by_class(student: Any, teacher: Any, labels: Any | None, names: Sequence[str]) -> PerClass:
    """Return each class's shares in percent with Wilson intervals, and the pairs most often taken for each other.

    With labels, a class's images are those of its label and a share is that of right answers (recall). Without, they
    are those that the teacher gives the class, and the student's share is that of the same answer.

    Args:
        student: its answers [images], as indices of classes.
        teacher: its answers [images].
        labels: the right answers [images], or None.
        names: the classes, in their order.
    """
    truth = teacher if labels is None else labels
    count = np.bincount(truth, minlength=len(names))  # [classes]
    right = np.bincount(truth[student == truth], minlength=len(names))
    taught = np.bincount(truth[teacher == truth], minlength=len(names))
    return {
        "measure": "agreement" if labels is None else "recall",
        "classes": [
            {
                "class": name,
                "images": int(count[index]),
                **share_of("student", right[index], count[index]),
                **share_of("teacher", None if labels is None else taught[index], count[index]),
            }
            for index, name in enumerate(names)
        ],
        "pairs": pairs(student, teacher, truth, names),
    }


def share_of(who: str, hits: Any, count: Any) -> dict[str, Any]:
    """Return a share in percent with its interval; both are None where no image, or nobody, was asked."""
    if hits is None or not count:
        return {who: None, f"{who}_interval": None}
    return {who: 100 * int(hits) / int(count), f"{who}_interval": list(wilson(int(hits), int(count)))}


def pairs(student: Any, teacher: Any, truth: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the (class, answer) pairs that the student gets wrong on most images, the most frequent first.

    ``teacher_too`` is on how many of a pair's images the teacher gives the same wrong answer.
    """
    wrong = np.flatnonzero(student != truth)  # the images
    which = truth[wrong] * len(names) + student[wrong]  # a number for each pair
    found, counts = np.unique(which, return_counts=True)
    order = sorted(range(len(found)), key=lambda place: (-counts[place], found[place]))
    return [
        {
            "class": names[int(found[place]) // len(names)],
            "answer": names[int(found[place]) % len(names)],
            "images": int(counts[place]),
            "teacher_too": int((teacher[wrong][which == found[place]] == found[place] % len(names)).sum()),
        }
        for place in order[:MOST_PAIRS]
    ]

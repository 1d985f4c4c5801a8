"""Which evaluation images the report shows: some by chance, and those on which the student differs most surely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prgkit.evaluate.report.examples import Picture
from prgkit.export.bundle.bundle import Evaluation
from prgkit.metrics import log_softmax

OF_EACH = 24


def choose_examples(evaluation: Evaluation, logits: Any, classes: Sequence[str], *, seed: int = 0) -> list[Picture]:
    """Return up to 24 images drawn by chance, then up to 24 others where the student's answer is not the teacher's.

    The second group is ordered by how sure the student is, so it shows its worst surprises, not typical ones.
    """
    count = len(evaluation.pixels)
    by_chance = np.sort(np.random.default_rng(seed).permutation(count)[:OF_EACH])
    student, teacher = np.exp(log_softmax(logits)), np.exp(log_softmax(evaluation.teacher_logits))  # [images, classes]
    differs = student.argmax(axis=1) != teacher.argmax(axis=1)  # [images]
    differs[by_chance] = False
    surest = np.argsort(np.where(differs, -student.max(axis=1), np.inf), kind="stable")[
        : min(OF_EACH, int(differs.sum()))
    ]
    chosen = [*((index, "sample") for index in by_chance), *((index, "differs") for index in surest)]
    return [
        Picture(
            pixels=evaluation.pixels[index],
            group=group,
            teacher=classes[int(teacher[index].argmax())],
            teacher_confidence=100 * float(teacher[index].max()),
            student=classes[int(student[index].argmax())],
            student_confidence=100 * float(student[index].max()),
            label=None if evaluation.labels is None else classes[int(evaluation.labels[index])],
        )
        for index, group in chosen
    ]

"""Which evaluation images a report shows, and the answers given to them: some by chance, some where answers differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.evaluate.report.sections import Answer, Chip, Example, Section
from prgkit.export.bundle.bundle import Evaluation
from prgkit.metrics import log_softmax

LARGEST_SIDE = 224  # a larger picture only makes the page heavier: it is shown smaller than this
PIXELATED_SIDE = 96  # below this, smoothing would show something that the student did not see
OF_EACH = 24


@dataclass(frozen=True)
class Picture:
    """An evaluation image with the answers given to it; confidences are in percent."""

    pixels: NDArray[np.uint8]  # [height, width, 3]
    group: str  # "sample": drawn by chance; "differs": chosen because the answers differ
    teacher: str
    teacher_confidence: float
    student: str
    student_confidence: float
    label: str | None
    heat_map: NDArray[np.uint8] | None = None  # [height, width, 3]: what spoke for the student's answer


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


def galleries(pictures: Sequence[Picture]) -> list[Section]:
    """Return the images as sections: some drawn by chance, then some on which the answers differ."""
    groups = {
        "sample": ("A sample", "Drawn by chance from the evaluation images."),
        "differs": (
            "Where teacher and student disagree",
            "Chosen, not typical: of the images with two answers, those on which the student is most sure of itself.",
        ),
    }
    shown = pictures[: 2 * OF_EACH]
    sections = [
        Section(title, about, examples=tuple(example(one) for one in shown if one.group == group), page_only=True)
        for group, (title, about) in groups.items()
    ]
    return [section for section in sections if section.examples]


def example(picture: Picture) -> Example:
    """Return an image with its verdict and each answer once, so that a long class name has the whole line."""
    label = picture.label
    givers: dict[str, tuple[str, ...]] = {} if label is None else {label: ("label",)}
    for who, name, confidence in (
        ("teacher", picture.teacher, picture.teacher_confidence),
        ("student", picture.student, picture.student_confidence),
    ):
        givers[name] = (*givers.get(name, ()), f"{who} {confidence:.0f} %")
    return Example(
        data_uri(picture.pixels),
        max(picture.pixels.shape[:2]) <= PIXELATED_SIDE,
        f"evaluation image; teacher: {picture.teacher}; student: {picture.student}",
        verdict(picture),
        tuple(Answer(name, who, label is not None and name != label) for name, who in givers.items()),
        "" if picture.heat_map is None else data_uri(picture.heat_map),
    )


def verdict(picture: Picture) -> Chip:
    """Return who is right, or whether both agree where there is no label."""
    if picture.label is None:
        return Chip("same answer", "good") if picture.teacher == picture.student else Chip("differ", "warn")
    teacher_right = picture.teacher == picture.label
    if picture.student == picture.label:
        return Chip("both right" if teacher_right else "student right", "good")
    return Chip("student wrong", "bad") if teacher_right else Chip("both wrong", "warn")


def data_uri(pixels: NDArray[np.uint8], *, largest_side: int = LARGEST_SIDE) -> str:
    """Return an image as part of the page: exact where it is small, compressed where it is a photograph."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= PIXELATED_SIDE:
        image.save(file, "PNG")
        kind = "png"
    else:
        image.thumbnail((largest_side, largest_side))
        image.save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

"""Pictures in HTML: evaluation images with the answers given to them, each embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST_SIDE = 224  # a larger picture only makes the page heavier: it is shown smaller than this
PIXELATED_SIDE = 96  # below this, smoothing would show something that the student did not see


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


def gallery(pictures: Sequence[Picture]) -> list[tuple[str, str, str]]:
    """Return the images [(title, about, HTML)]: some drawn by chance, then some on which the answers differ."""
    groups = [
        ("A sample", "Drawn by chance from the evaluation images.", [one for one in pictures if one.group == "sample"]),
        (
            "Where teacher and student disagree",
            "Chosen, not typical: of the images with two answers, those on which the student is most sure of itself.",
            [one for one in pictures if one.group == "differs"],
        ),
    ]
    return [
        (title, about, f'<ul class="sheet">{"".join(map(picture, chosen))}</ul>')
        for title, about, chosen in groups
        if chosen
    ]


def picture(one: Picture) -> str:
    """Return one image with its verdict and the answers."""
    kind, verdict = judge(one)
    small = ' class="small"' if max(one.pixels.shape[:2]) <= PIXELATED_SIDE else ""
    alt = f"evaluation image; teacher: {one.teacher}; student: {one.student}"
    return (
        f'<li><img{small} alt="{escape(alt)}" src="{data_uri(one.pixels)}"><div class="words">'
        f'<span class="chip {kind}">{verdict}</span>{answers(one)}</div></li>'
    )


def judge(one: Picture) -> tuple[str, str]:
    """Return the colour and the words for the two answers."""
    if one.label is None:
        return ("good", "same answer") if one.teacher == one.student else ("warn", "differ")
    if one.student == one.label:
        return ("good", "both right") if one.teacher == one.label else ("good", "student right")
    return ("bad", "student wrong") if one.teacher == one.label else ("warn", "both wrong")


def answers(one: Picture) -> str:
    """Return each answer with those who gave it, so that a long class name has the whole line."""
    by_name: dict[str, list[str]] = {} if one.label is None else {one.label: ["label"]}
    by_name.setdefault(one.teacher, []).append(f"teacher {one.teacher_confidence:.0f} %")
    by_name.setdefault(one.student, []).append(f"student {one.student_confidence:.0f} %")
    lines = []
    for name, givers in by_name.items():
        kind = "answer wrong" if one.label is not None and name != one.label else "answer"
        who = " ".join(f"<span>{giver}</span>" for giver in givers)
        lines.append(f'<p class="{kind}"><b>{escape(name)}</b> <small>{who}</small></p>')
    return "".join(lines)


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

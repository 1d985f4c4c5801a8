"""The teacher's answers to a source of images as a table: a row for every file, without training anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from prgkit.config.recipe import Recipe
from prgkit.device import best_device
from prgkit.progress import Progress
from prgkit.training.dataset import DistillationDataset, in_parts
from prgkit.training.prepare import prepare_answers
from prgkit.training.statistics import nearest_copies, outlier_floor

EXACT_COPY = "exact copy"


class ImageLabel(BaseModel, frozen=True, populate_by_name=True):
    """What the teacher says of one file; of one that cannot be read nothing but why."""

    path: str
    class_name: str | None = Field(None, alias="class")
    confidence: float | None = None  # the answer's probability
    second_class: str | None = None
    margin: float | None = None  # its probability less that of the second class
    corrected: bool | None = None  # whether the teacher by itself, without the recipe's targets, names another class
    near_copy: str | None = None  # the path of the image that it repeats, or nearly repeats
    outlier: bool | None = None  # whether it fits no class
    note: str | None = None  # "exact copy", of near_copy; or why it cannot be read


class Answers(NamedTuple):
    """The teacher's answers to the evaluation views of n images."""

    classes: NDArray[np.int64]  # [n, 2], the likeliest first
    probabilities: NDArray[np.float64]  # [n, 2]
    corrected: NDArray[np.bool_]  # [n]
    cosines: NDArray[np.float32]  # [n], with the class nearest to each, before any correction
    features: NDArray[np.float32]  # [n, D]


def label_images(recipe: Recipe, targets_root: Path, progress: Progress) -> list[ImageLabel]:
    """Return a row for every file of the recipe's images, in the order of the source.

    The teacher sees the evaluation view of what is not stored yet, and what it saw is kept for training. Exact copies
    have the answer to the image that they repeat.

    Raises:
        PrgkitError: for anything the user can mend.
    """
    dataset = prepare_answers(recipe, targets_root, progress)
    images, answers = dataset.image_index, answers_of(dataset, progress)
    progress.start("near copies", len(images), "img")
    nearest, _ = nearest_copies(answers.features, answers.classes[:, 0], progress.advance)
    paths = [images.source.path(index) for index in range(len(images.source))]
    repeated = [None if place < 0 else paths[images.indices[place]] for place in nearest.tolist()]
    for position, index in reversed(images.copies.tolist()):
        repeated[position] = paths[index]  # of several exact copies the first
    outliers = (answers.cosines < outlier_floor(answers.cosines)).tolist()
    rows: dict[int, ImageLabel] = {}
    for position, index in enumerate(images.indices.tolist()):
        best, second = answers.probabilities[position].tolist()
        rows[index] = ImageLabel(
            path=paths[index],
            class_name=recipe.classes[answers.classes[position, 0]],
            confidence=round(best, 4),
            second_class=recipe.classes[answers.classes[position, 1]],
            margin=round(best - second, 4),
            corrected=bool(answers.corrected[position]),
            near_copy=repeated[position],
            outlier=outliers[position],
        )
    for position, index in images.copies.tolist():
        original = rows[int(images.indices[position])]
        update = {"path": paths[index], "near_copy": original.path, "note": EXACT_COPY}
        rows[index] = original.model_copy(update=update)
    reasons = {skipped.name: skipped.reason for skipped in images.unreadable}
    for index in set(range(len(paths))) - rows.keys():
        rows[index] = ImageLabel(path=paths[index], note=f"unreadable: {reasons[images.source.name(index)]}")
    return [rows[index] for index in range(len(paths))]


def answers_of(dataset: DistillationDataset, progress: Progress) -> Answers:
    """Return what the teacher says of every image."""
    device = best_device()
    classifier, parts = dataset.classifier.to(device), []
    progress.start("answers", len(dataset.rows), "img")
    for rows in in_parts(dataset.rows):
        features = dataset.store.features(rows, np.zeros(len(rows), dtype=int)).to(device)
        combined = classifier.combine(classifier.per_prompt(features))
        raw = combined if classifier.average is None else classifier.raw_logits(features)
        best = torch.topk(classifier.correct(features, raw).double().softmax(dim=1), 2)
        corrected = raw.gather(1, best.indices[:, :1])[:, 0] < raw.amax(dim=1)
        cosines = combined.amax(dim=1) / classifier.logit_scale
        parts.append((best.indices, best.values, corrected, cosines, features))
        progress.advance(len(rows))
    return Answers(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def describe_labels(rows: Sequence[ImageLabel]) -> str:
    """Put into words how many files there are, and what stands out among them."""
    unreadable = sum(row.class_name is None for row in rows)
    exact = sum(row.note == EXACT_COPY for row in rows)
    near = sum(row.near_copy is not None for row in rows)
    return (
        f"{len(rows):,} files; {sum(bool(row.corrected) for row in rows):,} answers corrected, {near:,} with a near "
        f"copy ({exact:,} exact copies of another), {sum(bool(row.outlier) for row in rows):,} that fit no class, "
        f"{unreadable:,} unreadable"
    )


def as_csv(rows: Iterable[ImageLabel]) -> str:
    """Return the rows as CSV, with a header; what is not known is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.alias or name for name, field in ImageLabel.model_fields.items())
    for row in rows:
        writer.writerow(cell(value) for _, value in row)
    return text.getvalue()


def as_json_lines(rows: Iterable[ImageLabel]) -> str:
    """Return the rows as JSON, one object a line."""
    return "".join(row.model_dump_json(by_alias=True) + "\n" for row in rows)


def cell(value: object) -> str:
    """Return a value as a cell of a CSV."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4f}" if isinstance(value, float) else str(value or "")

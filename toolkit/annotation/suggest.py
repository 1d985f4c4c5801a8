"""Which images to label next: those whose answers lie farthest from what is labelled (PCoreSet, arXiv 2506.00910)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from prgkit.annotation.audit import NEXT_ANSWERS, in_percent
from prgkit.annotation.sheet import Card, sheet
from prgkit.config.recipe import Recipe
from prgkit.data.augment import evaluation_views
from prgkit.data.index import read_image_index, select_labelled
from prgkit.data.ticks import Tick, read_ticks, set_aside, ticked, write_ticks
from prgkit.device import best_device
from prgkit.errors import RunError
from prgkit.progress import Progress
from prgkit.storage.atomic import fingerprint, write_text
from prgkit.storage.run import Run
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.feature_store import embed
from prgkit.training.dataset import DistillationDataset
from prgkit.training.prepare import prepare_answers

Floats = NDArray[np.float32]


class Suggestions(BaseModel, frozen=True):
    """Where the images to label are listed, and how many there are."""

    table: str
    sheet: str
    suggested: int
    labelled: int  # before, by data.labelled and by what is ticked in the table
    images: int


def suggest_labels(
    recipe: Recipe, table: Path, targets_root: Path, *, count: int, student: Run | None, progress: Progress
) -> Suggestions:
    """Write ``count`` images to label into a CSV and an HTML sheet beside it, and return how many there are.

    What is ticked in the CSV already stays in it and counts as labelled, as data.labelled does; ticks of images that
    are not here are kept beside it. The answers are the teacher's, or those of a run's student.

    Raises:
        RunError: the student knows other classes than the recipe.
        PrgkitError: for anything else the user can mend.
    """
    if student is not None and student.recipe_file.exists() and student.recipe.classes != recipe.classes:
        fix = f"leave --by student out, or: prgkit suggest-labels {shlex.quote(str(student.recipe_file))} --by student"
        what = "the student knows other classes than the recipe, or the same in another order"
        raise RunError(what, where=student.folder, fix=f"{fix} --run {shlex.quote(str(student.folder))}")
    dataset = prepare_answers(recipe, targets_root, progress)
    images = dataset.image_index
    earlier = ticked(read_ticks(table, recipe.classes)) if table.exists() else []
    pool = probabilities(dataset, student, recipe, progress)
    numbers = {key: position for position, key in enumerate(images.keys)}
    kept = [tick for tick in earlier if tick.key in numbers]
    known = {tick.key for tick in kept}
    others = few_labelled(dataset, recipe, progress)
    labelled = np.empty((0, pool.shape[1]), np.float32)
    if others is not None:
        known |= set(others.image_index.keys)
        labelled = probabilities(others, student, recipe, progress)
    done = np.array([key in known for key in images.keys], dtype=bool)
    chosen = farthest_first(pool, np.concatenate([pool[done], labelled]), count, barred=done)
    fresh = [new_tick(dataset, position, pool[position], recipe.classes) for position in chosen]
    rows = [replace(tick, number=number) for number, tick in enumerate([*kept, *fresh], 1)]
    if lost := len(earlier) - len(kept):
        aside = set_aside(table)
        progress.note(f"{lost} of the {len(earlier)} ticks so far are of images that are not here: kept in {aside}")
    write_ticks(table, rows)
    page = table.with_suffix(".html")
    write_text(page, draw_sheet(rows, [numbers[row.key] for row in rows], dataset, pool, recipe, table))
    return Suggestions(
        table=str(table), sheet=str(page), suggested=len(chosen), labelled=len(known), images=len(images)
    )


def farthest_first(pool: Floats, labelled: Floats, count: int, *, barred: NDArray[np.bool_] | None = None) -> list[int]:
    """Return the ``count`` rows of ``pool`` [N, C] to label, in order: each time the one farthest from all others.

    The distance is Euclidean, between probabilities; of equals the lowest number goes first. Where nothing is labelled
    [m, C] yet, the first is the row nearest to the mean, a choice of ours: PCoreSet begins with one of each class.
    """
    barred = np.zeros(len(pool), dtype=bool) if barred is None else barred
    free, chosen = int((~barred).sum()), list[int]()
    nearest = np.full(len(pool), np.inf, dtype=np.float32)
    for row in labelled:
        np.minimum(nearest, ((pool - row) ** 2).sum(axis=1), out=nearest)
    if not len(labelled):
        nearest = -((pool - pool.mean(axis=0)) ** 2).sum(axis=1)
    nearest[barred] = -np.inf
    while len(chosen) < min(count, free):
        place = int(nearest.argmax())
        distances = ((pool - pool[place]) ** 2).sum(axis=1)
        nearest = np.minimum(nearest, distances) if len(labelled) or chosen else distances
        chosen.append(place)
        nearest[barred] = nearest[chosen] = -np.inf
    return chosen


def probabilities(dataset: DistillationDataset, student: Run | None, recipe: Recipe, progress: Progress) -> Floats:
    """Return the probabilities [n, C] that the teacher, or a run's student, gives to every image's evaluation view."""
    device, positions = best_device(), np.arange(len(dataset.image_index))
    if student is not None:
        network = load_student(student).to(device)
        views = evaluation_views(dataset.image_index, network.preprocessing, positions, workers=recipe.training.workers)
        return torch.from_numpy(student_logits(network, views)).softmax(dim=1).numpy()
    dataset = replace(dataset, classifier=dataset.classifier.to(device))
    progress.start("answers", len(positions), "img")
    parts = []
    for output in dataset.evaluation_outputs(positions):
        parts.append(output.logits.softmax(dim=1).cpu().numpy())
        progress.advance(len(output.labels))
    return np.concatenate(parts)


def few_labelled(dataset: DistillationDataset, recipe: Recipe, progress: Progress) -> DistillationDataset | None:
    """Return the images of data.labelled with what the teacher says of them, if the recipe names any."""
    spec, store = recipe.data.labelled_spec, dataset.store
    if spec is None:
        return None
    read = read_image_index(spec, progress, known=store, grey=dataset.image_index.source.grey)
    images, _ = select_labelled(read, recipe.classes, note=progress.note)
    views = np.ones(len(images), dtype=int)
    embed(store.stores, images, views=views, recipe=recipe, teacher=teacher_loader(progress), progress=progress)
    return replace(dataset, image_index=images, rows=store.rows(images.keys, views=1))


def new_tick(dataset: DistillationDataset, position: int, shares: Floats, classes: Sequence[str]) -> Tick:
    """Return an image's row of the CSV, its number left open."""
    images, best = dataset.image_index, int(shares.argmax())
    name = images.source.name(int(images.indices[position]))
    return Tick(0, name, images.keys[position], classes[best], in_percent(float(shares[best])))


def draw_sheet(
    rows: Sequence[Tick],
    positions: Sequence[int],
    dataset: DistillationDataset,
    pool: Floats,
    recipe: Recipe,
    table: Path,
) -> str:
    """Return the sheet of images to label, with every picture in it."""
    cards = []
    for row, position in zip(rows, positions, strict=True):
        likely = np.argsort(-pool[position])[1 : 1 + NEXT_ANSWERS]
        others = [(recipe.classes[label], in_percent(float(pool[position, label]))) for label in likely]
        cards.append(Card(row, dataset.image_index.read(position), others))
    return sheet(
        cards,
        title=f"{table.stem}: what is in these images?",
        about=f"{len(rows):,} of {len(dataset.image_index):,} images whose answers differ most from each other. They "
        "are no fair sample, and odd ones are among them: they teach a student and do not measure one.",
        classes=recipe.classes,
        ticks_file=str(table),
        made_from=fingerprint([row.key for row in rows]),
        base=fingerprint([[row.key, row.right, row.named] for row in rows]),
        learns_from=recipe.data.images,
    )


def describe_suggestions(found: Suggestions) -> str:
    """Put into words what is to be labelled."""
    return (
        f"{found.suggested:,} of {found.images:,} images to label, {found.labelled:,} are; put the ticks.csv that it "
        f"saves in the place of {found.table}"
    )

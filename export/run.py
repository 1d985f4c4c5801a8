"""What an export takes from a run: its best student, images it never learned from, the teacher's answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from prgkit.devices import best_device
from prgkit.export.pipeline import ExportOptions, HeldOut, export_student
from prgkit.files import read_json, sha256
from prgkit.images import Catalogue, match_labels
from prgkit.lesson import hold_out, read_catalogue
from prgkit.objectives.prg import prompt_logits, weighted_logits
from prgkit.recipe import Recipe
from prgkit.run import Run, locked
from prgkit.student import load_student, student_facts
from prgkit.targets import Targets, embed, open_targets
from prgkit.teacher import Teacher, load_teacher
from prgkit.watch import Watch

PARITY_IMAGES = 256
GOLDEN_IMAGES = 16
GOLDEN_CANDIDATES = 64
GOLDEN_SIDE = 1024  # of the shorter side: sixteen photographs of 24 megapixels would be most of a bundle


def export_run(
    run: Run,
    *,
    fp16: bool,
    trt: bool,
    backend: str | None = None,
    batch: tuple[int, int, int] | None = None,
    sm: tuple[str, ...] | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Export a run's best student into ``<run>/bundle`` and return the manifest.

    ``backend``, ``batch`` (by default the recipe's) and ``sm`` are for the engines.

    Raises:
        PrgkitError: the run has no student or is being worked on, an artifact disagrees with PyTorch, or a backend is
            missing.
    """
    with locked(run.folder, "run"):
        page = run.recipe.export
        options = ExportOptions(page.opset, fp16=fp16, trt=trt, batch=batch or page.batch, backend=backend, sm=sm)
        return export_best(run, options, watch)


def export_best(run: Run, options: ExportOptions, watch: Watch) -> dict[str, Any]:
    """Gather what the bundle is made from, and make it."""
    recipe, card = run.recipe, run.card
    student = load_student(run)
    learned = student_facts(run.weights)
    if not run.finished:
        watch.note(f"the run is not finished: this is its best student so far, of epoch {learned['epoch']}")
    images = read_catalogue(recipe.data.evaluation or recipe.data.images, recipe, watch)
    positions = evaluation_positions(images, recipe)
    labels = match_labels(images, recipe.classes)[positions] if recipe.data.evaluation else None
    weighted, uniform = teacher_logits(run, recipe, images, positions, watch)
    prepare = student.preprocessing.prepare
    checked = [prepare(picture) for picture in parity_pictures(images, positions, recipe, watch)]
    if len(checked) < PARITY_IMAGES:
        watch.note(f"there are {len(checked)} images to compare the exports on; {PARITY_IMAGES} would be better")

    return export_student(
        student.deployed(),
        run.bundle,
        pixels=np.stack(checked),
        golden=golden_pictures(images, positions),
        held_out=HeldOut(
            prepared=(prepare(images.read(int(position))) for position in positions),
            teacher_logits=weighted,
            teacher_uniform_logits=uniform,
            labels=labels,
            source=images.images.spec,
        ),
        classes=recipe.classes,
        preprocessing=student.preprocessing,
        facts={
            "run": {
                "name": run.name,
                "fingerprint": card["fingerprint"],
                "student_sha256": sha256(run.weights),
                "objective": recipe.objective_name,
                "epochs": recipe.training.epochs,
                "best_epoch": learned["epoch"],
                "images": card["images"]["used"],
                "training": run.metrics(),
                "quality": read_json(run.quality_file) if run.quality_file.exists() else None,
            },
            "recipe": recipe.model_dump(mode="json"),
            "teacher": {key: card["teacher"][key] for key in ("model", "weights", "fingerprint")},
            "student": {
                **{key: card["student"][key] for key in ("model", "initial", "parameters")},
                "image_size": recipe.student.image_size,
            },
        },
        options=options,
        note=watch.note,
    )


def evaluation_positions(images: Catalogue, recipe: Recipe) -> NDArray[np.int64]:
    """Return which images travel: labelled ones where the recipe names them, else those held out from training.

    The catalogue is ordered by content key, so the first ones are a random sample.
    """
    chosen = np.arange(len(images)) if recipe.data.evaluation else hold_out(images.keys, recipe.data.held_out)
    return chosen[: recipe.export.evaluation_images]


def parity_pictures(
    images: Catalogue, positions: NDArray[np.int64], recipe: Recipe, watch: Watch
) -> Iterator[Image.Image]:
    """Yield up to `PARITY_IMAGES` distinct pictures: the ones that travel, then others, then ones learned from.

    Two runtimes are compared on them, not a student and a truth, so having learned from them does no harm.
    """
    order = [*positions.tolist(), *np.setdiff1d(np.arange(len(images)), positions).tolist()][:PARITY_IMAGES]
    for position in order:
        yield images.read(position)
    if len(order) < PARITY_IMAGES and recipe.data.evaluation:
        seen = set(images.keys)
        learned = read_catalogue(recipe.data.images, recipe, watch)
        others = (position for position, key in enumerate(learned.keys) if key not in seen)
        for position in islice(others, PARITY_IMAGES - len(order)):
            yield learned.read(position)


def golden_pictures(images: Catalogue, positions: NDArray[np.int64]) -> list[Image.Image]:
    """Return `GOLDEN_IMAGES` pictures of moderate size; where there are too few of those, large ones are shrunk."""
    moderate: list[Image.Image] = []
    shrunk: list[Image.Image] = []
    for position in positions[:GOLDEN_CANDIDATES].tolist():
        picture = images.read(position)
        factor = GOLDEN_SIDE / min(picture.size)
        if factor >= 1:
            moderate.append(picture)
        elif len(shrunk) < GOLDEN_IMAGES:
            width, height = (max(1, round(factor * side)) for side in picture.size)
            shrunk.append(picture.resize((width, height), Image.Resampling.LANCZOS))
        if len(moderate) == GOLDEN_IMAGES:
            break
    return [*moderate, *shrunk][:GOLDEN_IMAGES]


def teacher_logits(
    run: Run, recipe: Recipe, images: Catalogue, positions: NDArray[np.int64], watch: Watch
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return W [n, C] of the evaluation view, with the recipe's prompt weighting and with uniform weights."""

    @cache
    def teacher() -> Teacher:  # asked only where the run's targets are gone
        watch.note(f"loading the teacher {recipe.teacher.model}")
        return load_teacher(recipe.teacher, best_device())

    targets: Targets = open_targets(recipe, Path(run.card["teacher"]["targets"]).parent, teacher)
    embed(targets, images, views=np.ones(len(images), dtype=int), recipe=recipe, teacher=teacher, watch=watch)
    prompts = targets.prompts(recipe.classes, recipe.templates, teacher)
    rows = targets.rows([images.keys[position] for position in positions], views=1)
    weighted, uniform = [], []
    for part in np.array_split(rows, max(1, len(rows) // 256)):
        features = targets.features(part, np.zeros(len(part), dtype=int))
        logits = prompt_logits(features, prompts, targets.logit_scale)
        weighted.append(weighted_logits(logits, recipe.prompt_weighting))
        uniform.append(weighted_logits(logits, "mean"))
    return torch.cat(weighted).numpy(), torch.cat(uniform).numpy()

"""What a distillation would take, told by a short probe: images, disk, and roughly how long."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prgkit.checkpoint import expected_bytes
from prgkit.devices import best_device, probe_precision
from prgkit.distill import check_trackers
from prgkit.files import free_bytes, readable_bytes, require_space
from prgkit.images import ENOUGH, Images, UnreadableImage, open_images
from prgkit.labels import class_indices
from prgkit.pictures import PICTURES, room_bytes
from prgkit.recipe import Recipe
from prgkit.run import require_own_folder
from prgkit.student import build_student
from prgkit.targets import Targets, existing_targets
from prgkit.teacher import Teacher, load_teacher
from prgkit.terminal import duration
from prgkit.watch import Watch

PROBE_SECONDS = 5.0
CPU_PROBE_BATCH = 8  # a CPU is as fast with few images as with many, and a large teacher takes seconds for each
SAMPLE_IMAGES = 256
SAMPLE_PICTURES = 8  # of those, decoded


def estimate(recipe: Recipe, folder: Path, targets_root: Path, watch: Watch) -> dict[str, Any]:
    """Count the images, time teacher and student for a moment each, and add it up.

    Neither the run nor the target store is touched. Weights and datasets that are named but not at hand are
    downloaded to their usual caches, as there is no counting or timing them without.

    Raises:
        PrgkitError: for whatever would also stop the real work at its start.
    """
    check_trackers(recipe.training)
    require_own_folder(folder, recipe)
    device = best_device()
    stored = existing_targets(recipe, targets_root)
    images = open_images(recipe.data.images)
    images_missing = count_missing(images, stored)
    pictures_bytes = len(images) * mean_picture_bytes(images)
    judged = open_evaluation(recipe) if recipe.data.evaluation else None
    judged_missing = count_missing(judged, stored) if judged else 0
    if judged:
        mean_picture_bytes(judged)  # one of them at least can be read

    watch.note(f"probing {recipe.teacher.model} and {recipe.student.model} for some seconds")
    teacher = load_teacher(recipe.teacher, device)
    student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=teacher.width)
    probe = probe_precision(student, device, recipe.training.batch_size)
    precision = probe["chosen"] if recipe.training.precision == "auto" else recipe.training.precision
    student_images_per_s = 1000 * probe["batch_size"] / probe["step_ms"][precision]
    views = 1 + recipe.views.count
    views_missing = images_missing * views + judged_missing
    figures = {
        "images": len(images),
        "images_missing": images_missing,
        "evaluation_images": len(judged) if judged else 0,
        "evaluation_missing": judged_missing,
        "views": views,
        "targets_bytes": views_missing * teacher.width * 2,
        "pictures_bytes": min(pictures_bytes, room_bytes(targets_root / PICTURES)),
        "run_bytes": expected_bytes(student),
        "teacher_s": round(views_missing / views_per_s(teacher), 1),
        "student_s": round(recipe.training.epochs * len(images) / student_images_per_s, 1),
    }
    require_space(targets_root, figures["targets_bytes"], "the target store")
    require_space(folder, figures["run_bytes"], "the run")
    return {**figures, "told": told(recipe, figures, device, free_bytes(folder))}


def open_evaluation(recipe: Recipe) -> Images:
    """Open the evaluation images; their labels are only matched with the classes."""
    labels = Path(recipe.data.evaluation_labels) if recipe.data.evaluation_labels else None
    images = open_images(recipe.data.evaluation or "", labels=labels)
    numbers = range(len(images))
    class_indices(
        [images.label(number) for number in numbers],
        recipe.classes,
        names=[images.name(number) for number in numbers],
        where=images.spec,
    )
    return images


def count_missing(images: Images, stored: Targets | None) -> int:
    """Return how many images the teacher has not seen yet, judged by a sample."""
    if stored is None:
        return len(images)
    rows = stored.rows([images.key(index) for index in sample_of(images)], views=1)
    return round(float((rows < 0).mean()) * len(images))


def mean_picture_bytes(images: Images) -> int:
    """Return what a decoded picture takes on average, judged by a few; or raise the first one's error if none can."""
    sizes: list[int] = []
    first: UnreadableImage | None = None
    for index in sample_of(images):
        try:
            picture = images.read(index, enough=ENOUGH)
        except UnreadableImage as error:
            first = first or error
            continue
        sizes.append(3 * picture.width * picture.height)
        if len(sizes) == SAMPLE_PICTURES:
            break
    if first and not sizes:
        raise first
    return sum(sizes) // len(sizes)


def sample_of(images: Images) -> list[int]:
    """Return evenly spaced images, in an order in which the first few are spread as well."""
    numbers: list[int] = np.unique(np.linspace(0, len(images) - 1, SAMPLE_IMAGES).astype(int)).tolist()
    stride = max(1, len(numbers) // SAMPLE_PICTURES)
    return [number for start in range(stride) for number in numbers[start::stride]]


def views_per_s(teacher: Teacher) -> float:
    """Return how many views a second the teacher embeds, measured for PROBE_SECONDS after one batch of warming up."""
    size = teacher.preprocessing.image_size
    count = CPU_PROBE_BATCH if teacher.device.type == "cpu" else teacher.batch_size
    batch = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    teacher.embed_images(batch)
    started, done, seconds = time.perf_counter(), 0, 0.0
    while done == 0 or seconds < PROBE_SECONDS:
        teacher.embed_images(batch).sum().item()  # item() waits for a GPU
        done += count
        seconds = time.perf_counter() - started
    return done / seconds


def told(recipe: Recipe, figures: dict[str, Any], device: torch.device, free: int) -> dict[str, str]:
    """Put the figures into words."""
    judged = "none"
    if recipe.data.evaluation:
        judged = (
            f"{figures['evaluation_images']:,} in {recipe.data.evaluation}, "
            f"{figures['evaluation_missing']:,} new to the teacher"
        )
    most = "at most" if recipe.data.keep.asks else "about"  # how many images are kept is known from their features
    templates = "1 template" if len(recipe.templates) == 1 else f"{len(recipe.templates)} templates"
    return {
        "images": f"{figures['images']:,} in {recipe.data.images}, {figures['images_missing']:,} new to the teacher",
        "evaluation": judged,
        "classes": f"{len(recipe.classes)}, {templates}",
        "teacher": f"{recipe.teacher.model}, {figures['views']} views an image, about {duration(figures['teacher_s'])}",
        "student": f"{recipe.student.model} at {recipe.student.image_size} px, {recipe.training.epochs} epochs, "
        f"{most} {duration(figures['student_s'])} on {device}",
        "disk": f"{readable_bytes(figures['targets_bytes'])} of targets, "
        f"up to {readable_bytes(figures['pictures_bytes'])} of decoded pictures, "
        f"{readable_bytes(figures['run_bytes'])} for the run; {readable_bytes(free)} are free",
    }

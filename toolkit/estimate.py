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
from prgkit.files import readable_bytes
from prgkit.images import Images, UnreadableImage, open_images
from prgkit.recipe import Recipe
from prgkit.student import build_student
from prgkit.targets import existing_targets
from prgkit.teacher import Teacher, load_teacher
from prgkit.watch import Watch

PROBE_SECONDS = 3.0
CPU_PROBE_BATCH = 8  # a CPU is as fast with few images as with many, and a large teacher takes seconds for each
SAMPLE_IMAGES = 256


def estimate(recipe: Recipe, targets_root: Path, watch: Watch) -> dict[str, Any]:
    """Count the images, time teacher and student for a moment each, and add it up; nothing is written.

    Raises:
        PrgkitError: for whatever would also stop the real work at its start.
    """
    check_trackers(recipe.training)
    device = best_device()
    images = open_images(recipe.data.images)
    labels = Path(recipe.data.evaluation_labels) if recipe.data.evaluation_labels else None
    judged = len(open_images(recipe.data.evaluation, labels=labels)) if recipe.data.evaluation else 0
    sample = np.unique(np.linspace(0, len(images) - 1, SAMPLE_IMAGES).astype(int)).tolist()
    require_one_readable(images, sample)
    stored = existing_targets(recipe, targets_root)
    rows = stored.rows([images.key(index) for index in sample], views=1) if stored else np.full(len(sample), -1)
    images_missing = round(float((rows < 0).mean()) * len(images))

    watch.note(f"probing {recipe.teacher.model} and {recipe.student.model} for some seconds")
    teacher = load_teacher(recipe.teacher, device)
    student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=teacher.width)
    probe = probe_precision(student, device, recipe.training.batch_size)
    precision = probe["chosen"] if recipe.training.precision == "auto" else recipe.training.precision
    student_images_per_s = 1000 * probe["batch_size"] / probe["step_ms"][precision]
    views = 1 + recipe.views.count
    figures = {
        "images": len(images),
        "images_missing": images_missing,
        "evaluation_images": judged,
        "views": views,
        "targets_bytes": images_missing * views * teacher.width * 2,
        "run_bytes": expected_bytes(student),
        "teacher_s": round(images_missing * views / views_per_s(teacher), 1),
        "student_s": round(recipe.training.epochs * len(images) / student_images_per_s, 1),
    }
    return {**figures, "told": told(recipe, figures, device)}


def require_one_readable(images: Images, sample: list[int]) -> None:
    """Raise the first image's own error where none of the sample can be read."""
    first: UnreadableImage | None = None
    for index in sample:
        try:
            images.read(index)
            return
        except UnreadableImage as error:
            first = first or error
    if first:
        raise first


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


def told(recipe: Recipe, figures: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Put the figures into words."""
    judged = f"{figures['evaluation_images']:,} in {recipe.data.evaluation}" if recipe.data.evaluation else "none"
    templates = "1 template" if len(recipe.templates) == 1 else f"{len(recipe.templates)} templates"
    return {
        "images": f"{figures['images']:,} in {recipe.data.images}, {figures['images_missing']:,} new to the teacher",
        "evaluation": judged,
        "classes": f"{len(recipe.classes)}, {templates}",
        "teacher": f"{recipe.teacher.model}, {figures['views']} views an image, about {duration(figures['teacher_s'])}",
        "student": f"{recipe.student.model} at {recipe.student.image_size} px, {recipe.training.epochs} epochs, "
        f"about {duration(figures['student_s'])} on {device}",
        "disk": f"{readable_bytes(figures['targets_bytes'])} of targets, "
        f"{readable_bytes(figures['run_bytes'])} for the run",
    }


def duration(seconds: float) -> str:
    """Return a time as people say it: ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"

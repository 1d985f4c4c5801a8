"""What a distillation would take, told by a short probe: images, disk, and roughly how long."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prgkit.devices import best_device, probe_precision
from prgkit.files import readable_bytes
from prgkit.images import open_images
from prgkit.recipe import Recipe
from prgkit.student import build_student
from prgkit.targets import open_targets
from prgkit.teacher import Teacher, load_teacher
from prgkit.watch import Watch

PROBE_SECONDS = 5.0
SAMPLE_IMAGES = 256


def estimate(recipe: Recipe, targets_root: Path, watch: Watch) -> dict[str, Any]:
    """Count the images, time teacher and student for a moment each, and add it up.

    Raises:
        PrgkitError: for whatever would also stop the real work at its start.
    """
    device = best_device()
    images = open_images(recipe.data.images)
    teacher = load_teacher(recipe.teacher, device)
    stored = open_targets(recipe, targets_root, lambda: teacher) if targets_root.exists() else None
    sample = np.unique(np.linspace(0, len(images) - 1, SAMPLE_IMAGES).astype(int))
    share_missing = 1.0
    if stored is not None:
        keys = [images.key(int(index)) for index in sample]
        share_missing = float((stored.rows(keys, views=1) < 0).mean())
    watch.note("probing the teacher and the student for a few seconds")
    student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=teacher.width)
    probe = probe_precision(student, device, recipe.training.batch_size)

    missing = round(share_missing * len(images)) * (1 + recipe.views.count)
    teacher_s = missing / views_per_s(teacher, [images.read(int(index)) for index in sample[:1]])
    step_ms = (
        min(probe["step_ms"].values())
        if recipe.training.precision == "auto"
        else probe["step_ms"][recipe.training.precision]
    )
    student_s = recipe.training.epochs * len(images) * step_ms / 1000 / probe["batch_size"]
    targets_bytes = missing * teacher.width * 2
    # The checkpoint holds the student, its average and two moments of the optimizer; the best student stands beside it.
    run_bytes = 5 * 4 * sum(parameter.numel() for parameter in student.parameters())
    figures = {
        "images": len(images),
        "images_missing": missing // (1 + recipe.views.count),
        "views": 1 + recipe.views.count,
        "targets_bytes": targets_bytes,
        "run_bytes": run_bytes,
        "teacher_s": round(teacher_s, 1),
        "student_s": round(student_s, 1),
    }
    return {**figures, "told": told(recipe, figures, device)}


def views_per_s(teacher: Teacher, pictures: list[Any]) -> float:
    """Return how many views a second the teacher embeds at its fixed batch size, measured for at most 5 s."""
    prepared = np.stack([teacher.preprocessing.prepare(picture) for picture in pictures])
    batch = torch.from_numpy(prepared).expand(teacher.batch_size, -1, -1, -1)
    teacher.embed_images(batch)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        teacher.embed_images(batch).sum().item()
        count += len(batch)
    return count / (time.perf_counter() - started)


def told(recipe: Recipe, figures: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Put the figures into words."""
    return {
        "images": f"{figures['images']:,} in {recipe.data.images}, {figures['images_missing']:,} new to the teacher",
        "classes": f"{len(recipe.classes)}, {len(recipe.templates)} templates",
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

"""What a distillation would take, estimated by a short probe: images, disk, and roughly how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel

from prgkit.config.image_size import size_told
from prgkit.config.recipe import Recipe
from prgkit.config.sections import ImageSpec, TeacherConfig
from prgkit.data.cache import PICTURES, room_bytes
from prgkit.data.decode import REDUCED_SIDE, UnreadableImage
from prgkit.data.labels import class_indices
from prgkit.data.sources import ImageSource, measure_deep_greys, open_images
from prgkit.device import best_device
from prgkit.progress import Progress, duration
from prgkit.storage.atomic import free_bytes, readable_bytes, require_space
from prgkit.storage.run import Run, require_own_folder
from prgkit.student.model import Student, build_student
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.ensemble import as_learned
from prgkit.teacher.feature_store import FeatureStore, existing_store
from prgkit.teacher.prompt_context import load_context
from prgkit.training.checkpoint import expected_bytes, held_bytes
from prgkit.training.distributed import check_trackers, probe_precision
from prgkit.training.few_shot import VALIDATION_SHARE
from prgkit.training.prepare import hold_out

PROBE_SECONDS = 5.0
CPU_PROBE_BATCH = 8  # a CPU is as fast with few images as with many, and a large teacher takes seconds for each
SAMPLE_IMAGES = 256
SAMPLE_PICTURES = 8  # of those, decoded


class TeacherEstimate(BaseModel, frozen=True):
    """What one teacher would take."""

    teacher: str
    width: int
    views_missing: int
    targets_bytes: int
    teacher_s: float


class DistillEstimate(BaseModel, frozen=True):
    """What a distillation would take, and the same in words."""

    images: int
    images_missing: int  # not yet embedded by a teacher
    evaluation_images: int
    evaluation_missing: int
    views: int  # of an image, with the evaluation view
    mixtures: int = 0  # of all images, at most: how many a teacher has seen is known when every image is read
    teachers: tuple[TeacherEstimate, ...]
    targets_bytes: int
    pictures_bytes: int
    run_bytes: int
    teacher_s: float
    student_s: float
    shards: tuple[int, ...] = ()  # images of each
    summary: dict[str, str] = {}


def estimate(recipe: Recipe, folder: Path, targets_root: Path, progress: Progress, shards: int = 0) -> DistillEstimate:
    """Count the images, time teacher and student for a moment each, and add it up; also of so many ``shards``.

    Neither the run nor the target store is touched. Weights and datasets that are named but not at hand are
    downloaded to their usual caches, as there is no counting or timing them without.

    Raises:
        PrgkitError: for whatever would also stop the real work at its start.
    """
    check_trackers(recipe.training)
    for config in recipe.teacher:
        load_context(config)
    require_own_folder(folder, recipe)
    device = best_device()
    learned = as_learned(recipe, run, targets_root) if (run := Run(folder)).begun else recipe
    stored = [existing_store(config, recipe.views, targets_root) for config in learned.teacher]
    images = with_deep_greys(open_images(recipe.data.image_spec, note=progress.note))
    if images.left_out:
        progress.note(f"{images.spec}: {images.left_out}")
    views = 1 + recipe.views.count
    missing = count_missing(images, stored, views, recipe.data.held_out)
    pictures_bytes = len(images) * mean_picture_bytes(images)
    evaluation = open_matched(recipe, recipe.data.evaluation_spec, images, progress)
    few = open_matched(recipe, recipe.data.labelled_spec if recipe.learns_labels else None, images, progress)
    judged = count_missing(evaluation, stored, 1)
    labelled = count_missing(few, stored, views, VALIDATION_SHARE)
    if evaluation:
        mean_picture_bytes(evaluation)  # one of them at least can be read

    progress.note(f"probing {recipe.teacher_name} and {recipe.student.model} for some seconds")
    counts = zip(recipe.teacher, zip(missing, judged, labelled, strict=True), strict=True)
    mixtures = count_mixtures(recipe, len(images))
    teachers = tuple(teacher_pass(config, mixtures + sum(one.views for one in each), device) for config, each in counts)
    student, images_per_s = time_student(recipe, sum(teacher.width for teacher in teachers), device)
    result = DistillEstimate(
        images=len(images),
        images_missing=max(one.images for one in missing),
        evaluation_images=len(evaluation) if evaluation else 0,
        evaluation_missing=max(one.images for one in judged),
        views=views,
        mixtures=mixtures,
        teachers=teachers,
        targets_bytes=sum(teacher.targets_bytes for teacher in teachers),
        pictures_bytes=min(pictures_bytes, room_bytes(targets_root / PICTURES)),
        run_bytes=expected_bytes(student, recipe.kept_floats * len(images)),
        teacher_s=round(sum(teacher.teacher_s for teacher in teachers), 1),
        shards=tuple(np.bincount(images.shard_numbers(shards), minlength=shards).tolist()) if shards else (),
        student_s=round(recipe.training.epochs * len(images) / images_per_s, 1),
    )
    require_space(targets_root, result.targets_bytes, "the target store")
    require_space(folder, result.run_bytes - held_bytes(run), "the run")
    return result.model_copy(update={"summary": in_words(recipe, result, device, free_bytes(folder))})


def time_student(recipe: Recipe, teacher_width: int, device: torch.device) -> tuple[Student, float]:
    """Return the student, untrained, and how many images a second it learns from, timed for a moment."""
    student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=teacher_width)
    if recipe.reads_stages:
        student.stage_widths()
    probe = probe_precision(student, device, recipe.training.batch_size)
    precision = probe.chosen if recipe.training.precision == "auto" else recipe.training.precision
    return student, 1000 * probe.batch_size / probe.step_ms[precision]


def with_deep_greys(images: ImageSource) -> ImageSource:
    """Return the images with a range for deep greys where the first few have any: their keys depend on it."""
    sample = sample_of(images)
    deep = measure_deep_greys(images, sample) if measure_deep_greys(images, sample[:SAMPLE_PICTURES]) else None
    return images.with_grey(deep.grey if deep else None)


def open_matched(
    recipe: Recipe, spec: ImageSpec | None, unlabelled: ImageSource, progress: Progress
) -> ImageSource | None:
    """Open labelled images, where there are any; their labels are only matched with the classes."""
    if not spec:
        return None
    images = open_images(spec)
    numbers = range(len(images))
    labels = zip(numbers, images.labels(numbers, recipe.classes, note=progress.note), strict=True)
    known = [(number, label) for number, label in labels if label is not None or not images.partly_labelled]
    class_indices(
        [label for _, label in known],
        recipe.classes,
        names=[images.name(number) for number, _ in known],
        where=images.spec,
        first_number=images.first_number,
        note=progress.note,
    )
    return images.with_grey(unlabelled.grey)


class Missing(NamedTuple):
    """What a teacher has not embedded of some images."""

    images: int  # of which it has seen nothing
    views: int


def count_missing(
    images: ImageSource | None, stored: Sequence[FeatureStore | None], views: int, held_out: float = 0
) -> list[Missing]:
    """Return what each teacher has not embedded of ``views`` views of each image, judged by a sample.

    One that is held out wants its evaluation view alone.
    """
    if not images:
        return [Missing(0, 0)] * len(stored)
    keys = [images.key(index) for index in sample_of(images)] if any(stored) else ["0" * 32]
    wanted = np.full(len(keys), views)
    if held_out and any(stored):
        wanted[hold_out(keys, held_out)] = 1
    seen = [store.stored_views(keys) if store else np.zeros(len(keys), int) for store in stored]
    left = [np.where(views_seen > 0, np.maximum(wanted - views_seen, 0), views) for views_seen in seen]
    shares = [((views_seen == 0).mean(), views_left.mean()) for views_seen, views_left in zip(seen, left, strict=True)]
    return [Missing(round(new * len(images)), round(each * len(images))) for new, each in shares]


def count_mixtures(recipe: Recipe, images: int) -> int:
    """Return how many mixtures a teacher is shown, one view each, of those ``images`` that are not held out."""
    return round((recipe.views.mixed or 0) * (1 - recipe.data.held_out) * images)


def teacher_pass(config: TeacherConfig, views: int, device: torch.device) -> TeacherEstimate:
    """Return what it takes to have a teacher see so many views, in seconds and bytes, timed for a moment."""
    teacher = load_teacher(config, device)
    return TeacherEstimate(
        teacher=config.name,
        width=teacher.width,
        views_missing=views,
        targets_bytes=views * teacher.width * 2,
        teacher_s=round(views / views_per_s(teacher), 1),
    )


def mean_picture_bytes(images: ImageSource) -> int:
    """Return what a decoded picture takes on average, judged by a few; or raise the first one's error if none can."""
    sizes: list[int] = []
    first: UnreadableImage | None = None
    for index in sample_of(images):
        try:
            picture = images.read(index, min_side=REDUCED_SIDE)
        except UnreadableImage as error:
            first = first or error
            continue
        sizes.append(3 * picture.width * picture.height)
        if len(sizes) == SAMPLE_PICTURES:
            break
    if first and not sizes:
        raise first
    return sum(sizes) // len(sizes)


def sample_of(images: ImageSource) -> list[int]:
    """Return evenly spaced images, in an order in which the first few are spread as well."""
    numbers: list[int] = np.unique(np.linspace(0, len(images) - 1, SAMPLE_IMAGES).astype(int)).tolist()
    stride = max(1, len(numbers) // SAMPLE_PICTURES)
    return [number for start in range(stride) for number in numbers[start::stride]]


def views_per_s(teacher: Teacher) -> float:
    """Return how many views a second the teacher embeds, measured for PROBE_SECONDS after one batch of warming up."""
    count = CPU_PROBE_BATCH if teacher.device.type == "cpu" else teacher.batch_size
    batch = torch.zeros(count, *teacher.shape, dtype=torch.uint8)
    teacher.embed_images(batch)
    started, done, seconds = time.perf_counter(), 0, 0.0
    while done == 0 or seconds < PROBE_SECONDS:
        teacher.embed_images(batch).sum().item()  # item() waits for a GPU
        done += count
        seconds = time.perf_counter() - started
    return done / seconds


def in_words(recipe: Recipe, figures: DistillEstimate, device: torch.device, free: int) -> dict[str, str]:
    """Put the figures into words."""
    judged, the_teacher = "none", "the teacher" if len(recipe.teacher) == 1 else "a teacher"
    if recipe.data.evaluation:
        judged = (
            f"{figures.evaluation_images:,} in {recipe.data.evaluation}, "
            f"{figures.evaluation_missing:,} new to {the_teacher}"
        )
    most = "at most" if recipe.data.keep.asks else "about"  # how many images are kept is known from their features
    mixtures = f"{figures.mixtures:,} mixtures at most, " if figures.mixtures else ""
    templates = "1 template" if len(recipe.templates) == 1 else f"{len(recipe.templates)} templates"
    return {
        "images": f"{figures.images:,} in {recipe.data.images}, {figures.images_missing:,} new to {the_teacher}",
        "evaluation": judged,
        "classes": f"{len(recipe.classes)}, {templates}",
        "teacher": f"{recipe.teacher_name}, {figures.views} views an image, {mixtures}"
        f"about {duration(figures.teacher_s)}{gpu_hours(figures, device)}{each_teacher(figures.teachers)}",
        **shards_in_words(figures),
        "student": f"{recipe.student.model} at {size_told(recipe.student.image_size)} px, "
        f"{recipe.training.epochs} epochs, {most} {duration(figures.student_s)} on {device}",
        "disk": f"{readable_bytes(figures.targets_bytes)} of targets, "
        f"up to {readable_bytes(figures.pictures_bytes)} of decoded pictures, "
        f"{readable_bytes(figures.run_bytes)} for the run; {readable_bytes(free)} are free",
    }


def gpu_hours(figures: DistillEstimate, device: torch.device) -> str:
    """Return what the pass takes of GPUs, where this is one."""
    return f", {figures.teacher_s / 3600:,.2f} GPU hours" if device.type == "cuda" else ""


def shards_in_words(figures: DistillEstimate) -> dict[str, str]:
    """Say how even the shards are, and how long the largest takes."""
    if not figures.shards:
        return {}
    most = max(figures.shards)
    longest = duration(figures.teacher_s * most / figures.images)
    return {
        "shards": f"{len(figures.shards)} of {min(figures.shards):,} to {most:,} images, at most about {longest} each"
    }


def each_teacher(passes: Sequence[TeacherEstimate]) -> str:
    """Say what each of several teachers takes; nothing of a single one."""
    if len(passes) == 1:
        return ""
    each = [f"{one.teacher} {duration(one.teacher_s)} and {readable_bytes(one.targets_bytes)}" for one in passes]
    return f" ({', '.join(each)})"

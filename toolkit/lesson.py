"""What there is to learn from: the images, which of them are held out, and the teacher's answers to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit import quality
from prgkit.devices import best_device
from prgkit.errors import ImagesError
from prgkit.files import fingerprint, write_json
from prgkit.images import Catalogue, catalogue, match_labels, open_images
from prgkit.objectives import TeacherSide
from prgkit.objectives.prg import prompt_logits, weighted_logits
from prgkit.recipe import Recipe
from prgkit.run import Run
from prgkit.targets import Targets, embed, open_targets
from prgkit.teacher import Teacher, check_teacher, load_teacher
from prgkit.views import default_workers
from prgkit.watch import Watch


@dataclass(frozen=True)
class Lesson:
    """What there is to learn from: the images, and the teacher's answers to them."""

    catalogue: Catalogue
    targets: Targets
    rows: NDArray[np.int64]  # [images], in the target store
    held_out: NDArray[np.int64]  # positions that select the checkpoint
    learned: NDArray[np.int64]  # positions that the student learns from
    prompts: Tensor  # T [M, C, D]
    prompt_weighting: str

    def fingerprint(self) -> str:
        """Return what changes when other images are learned from, or when they are seen by another teacher."""
        return fingerprint([self.targets.folder.name, [self.catalogue.keys[position] for position in self.learned]])

    def answer(self, positions: NDArray[np.int64], views: NDArray[np.int64], device: torch.device) -> TeacherSide:
        """Return the teacher's side (I, W, y) of these views."""
        features = self.targets.features(self.rows[positions], views).to(device)  # I [B, D]
        per_prompt = prompt_logits(features, self.prompts.to(device), self.targets.logit_scale)  # W_m [B, M, C]
        logits = weighted_logits(per_prompt, self.prompt_weighting)  # W [B, C]
        return TeacherSide(features, logits, logits.argmax(dim=1))


def prepare(recipe: Recipe, targets_root: Path, watch: Watch, run: Run | None = None) -> Lesson:
    """Read the images, split off the held-out ones, and have the teacher see what it has not seen yet."""

    @cache
    def teacher() -> Teacher:  # loaded once, and only if something is missing
        watch.note(f"loading the teacher {recipe.teacher.model}")
        return load_teacher(recipe.teacher, best_device())

    check_teacher(recipe.teacher)
    images = read_catalogue(recipe.data.images, recipe, watch)
    targets = open_targets(recipe, targets_root, teacher)
    for place in targets.damaged:
        watch.note(f"damaged block in {targets.folder}: {place}; its images are embedded again")
    evaluation = read_evaluation(recipe, images, watch) if recipe.data.evaluation else None
    if run is not None:
        run.update_card(images=facts_of(images), evaluation=facts_of(evaluation) if evaluation else None)
    held_out = hold_out(images.keys, recipe.data.held_out)
    views = np.full(len(images), 1 + recipe.views.count)
    views[held_out] = 1  # the evaluation view alone
    embed(targets, images, views=views, recipe=recipe, teacher=teacher, watch=watch)
    if evaluation is not None:
        embed(targets, evaluation, views=np.ones(len(evaluation), int), recipe=recipe, teacher=teacher, watch=watch)
    lesson = Lesson(
        catalogue=images,
        targets=targets,
        rows=targets.rows(images.keys, views=1),
        held_out=held_out,
        learned=np.setdiff1d(np.arange(len(images)), held_out),
        prompts=targets.prompts(recipe.classes, recipe.templates, teacher),
        prompt_weighting=recipe.prompt_weighting,
    )
    if run is None or not run.quality_file.exists():
        tell_quality(lesson, recipe, watch, run)
    return lesson


def tell_quality(lesson: Lesson, recipe: Recipe, watch: Watch, run: Run | None) -> None:
    """Say how far the pseudo-labels can be trusted, and keep it in the run."""
    # The catalogue is ordered by content, so evenly spaced positions are a random sample.
    count = min(len(lesson.catalogue), quality.MOST_IMAGES)
    positions = np.unique(np.linspace(0, len(lesson.catalogue) - 1, count).astype(int))
    features, logits, template_labels = [], [], []
    for part in np.array_split(lesson.rows[positions], max(1, len(positions) // 256)):
        features.append(lesson.targets.features(part, np.zeros(len(part), dtype=int)))
        per_prompt = prompt_logits(features[-1], lesson.prompts, lesson.targets.logit_scale)  # [part, M, C]
        logits.append(weighted_logits(per_prompt, lesson.prompt_weighting))
        template_labels.append(per_prompt.argmax(dim=2).T)  # [M, part]
    found = quality.assess(
        torch.cat(features).numpy(),
        torch.cat(logits).numpy(),
        torch.cat(template_labels, dim=1).numpy(),
        logit_scale=lesson.targets.logit_scale,
        classes=recipe.classes,
        templates=recipe.templates,
        names=[lesson.catalogue.images.name(int(index)) for index in lesson.catalogue.indices[positions]],
    )
    watch.note("the teacher's answers:")
    for name, line in quality.summary(found):
        watch.note(f"  {name:<12}{line}")
    if run is not None:
        write_json(run.quality_file, found)


def read_catalogue(spec: str, recipe: Recipe, watch: Watch) -> Catalogue:
    """Read every image of ``spec`` once: which are readable, which are the same, and the content key of each."""
    labels = recipe.data.evaluation_labels if spec == recipe.data.evaluation else None
    images = open_images(spec, labels=Path(labels) if labels else None)
    watch.start("images", len(images), "img")
    found = catalogue(images, workers=default_workers(), progress=watch.advance)
    if found.unreadable:
        first = found.unreadable[0]
        watch.note(f"{len(found.unreadable)} of {len(images)} images are unreadable, e.g. {first.name}: {first.reason}")
    return found


def read_evaluation(recipe: Recipe, learned: Catalogue, watch: Watch) -> Catalogue:
    """Read the labelled images, and say now rather than after training if their labels fit no class.

    Nothing of a label goes any further: the teacher will see these images, and the student only when it is measured.
    """
    evaluation = read_catalogue(recipe.data.evaluation or "", recipe, watch)
    match_labels(evaluation, recipe.classes)
    if shared := len(set(evaluation.keys) & set(learned.keys)):
        watch.note(f"{shared} evaluation images are also among those to learn from: accuracy on them flatters")
    return evaluation


def facts_of(images: Catalogue) -> dict[str, Any]:
    """Return what a run's card says of its images: how many, and each unreadable one with its reason."""
    unreadable = [{"name": file.name, "reason": file.reason} for file in images.unreadable]
    return {
        "source": images.images.spec,
        "used": len(images),
        "duplicates": images.duplicates,
        "unreadable": unreadable,
    }


def hold_out(keys: Sequence[str], share: float) -> NDArray[np.int64]:
    """Return the positions of the images that select the checkpoint, chosen by their content alone."""
    places = np.array([int(key[-8:], 16) / 2**32 for key in keys])
    chosen = np.flatnonzero(places < share)
    if len(keys) < 4:
        raise ImagesError(
            f"{len(keys)} images are too few to learn from", fix="give at least four, better some hundreds"
        )
    return chosen if 0 < len(chosen) < len(keys) - 1 else np.argsort(places)[:1]

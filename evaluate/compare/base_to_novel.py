"""Base to novel: a student is taught with the first half of the class names, and asked for the others by name alone.

The protocol is that of CoOp and PromptKD, but for what is learned from: the unlabelled images may show any class, and
no name of the second half is known to teacher or student until training is over. A student needs features in the
teacher's space for it; one whose objective trains none is asked for the first half only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.config.recipe import Recipe
from prgkit.data.augment import evaluation_views
from prgkit.data.index import ImageIndex
from prgkit.device import best_device
from prgkit.errors import RecipeError
from prgkit.evaluate.compare.schema import NovelScores
from prgkit.metrics import top1
from prgkit.progress import Progress
from prgkit.storage.run import Run
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.answers import teacher_answers
from prgkit.teacher.prompt_context import context_classes


@dataclass(frozen=True)
class Novel:
    """The half that no one was taught: its names, its images, and their labels among those names [n]."""

    names: tuple[str, ...]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


def halves(classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the base and the novel classes; of an odd number the base has one more."""
    middle = (len(classes) + 1) // 2
    return tuple(classes[:middle]), tuple(classes[middle:])


def require_two_halves(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be split, or whose answers are put right class by class.

    Raises:
        RecipeError: there are fewer than four classes, no labelled images, a correction of the base classes' prior, or
            a learned context that knows the novel ones.
    """
    if len(recipe.classes) < 4:
        raise RecipeError("base to novel needs four classes or more", where="data.classes")
    if recipe.data.evaluation is None:
        raise RecipeError("base to novel needs labelled images to judge by", where="data.evaluation")
    if recipe.targets.corrects:
        raise RecipeError(
            "a correction fitted to the base classes says nothing of the novel ones, as the prior of the base classes",
            where="targets",
            fix="leave the section out: --set targets={}",
        )
    base, novel = halves(recipe.classes)
    for page in recipe.teacher:
        path = Path(os.path.expanduser(page.context or ""))
        if path.is_file() and (known := context_classes(path) & set(novel)):
            raise RecipeError(
                f"the learned context has seen labels of novel classes: {', '.join(sorted(known)[:3])}",
                where=path,
                fix=f"adapt the teacher to the first {len(base)} classes alone: no others in data.labelled",
            )


def judge_novel(run: Run, recipe: Recipe, images: ImageIndex, novel: Novel, progress: Progress) -> NovelScores:
    """Return how right the student, and the teacher, are among the novel classes, in percent."""
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": novel.names})})
    teacher = teacher_answers(run, recipe, images, novel.positions, progress)
    top1_student = None
    if any(objective.aligns_features for objective in recipe.objective):
        student = load_student(run)
        student.use_class_vectors(teacher.classifier.class_vectors(), teacher.classifier.logit_scale)
        student = student.to(best_device())
        views = evaluation_views(images, student.preprocessing, novel.positions, workers=recipe.training.workers)
        top1_student = top1(student_logits(student, views), novel.labels)
    return NovelScores(
        classes=len(novel.names),
        images=len(novel.positions),
        top1=top1_student,
        teacher_top1=top1(teacher.logits, novel.labels),
    )

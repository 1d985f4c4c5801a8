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
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from prgkit.config.recipe import Recipe
from prgkit.config.sections import TeacherConfig
from prgkit.data.augment import evaluation_views
from prgkit.data.index import ImageIndex
from prgkit.device import best_device
from prgkit.errors import RecipeError
from prgkit.export.from_run import teacher_logits
from prgkit.metrics import top1
from prgkit.progress import Progress
from prgkit.storage.run import Run
from prgkit.storage.tensors import load_facts
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.ensemble import open_targets


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
            "the prior of the base classes says nothing of the novel ones", where="targets", fix="leave the section out"
        )
    base, novel = halves(recipe.classes)
    for page in recipe.teacher:
        path = Path(os.path.expanduser(page.context or ""))
        if path.is_file() and (known := set(load_facts(path).get("classes", ())) & set(novel)):
            raise RecipeError(
                f"the learned context has seen labels of novel classes: {', '.join(sorted(known)[:3])}",
                where=path,
                fix=f"adapt the teacher to the first {len(base)} classes alone: no others in data.labelled",
            )


def judge_novel(run: Run, recipe: Recipe, images: ImageIndex, novel: Novel, progress: Progress) -> dict[str, Any]:
    """Return how right the student, and the teacher, are among the novel classes, in percent."""
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": novel.names})})
    weighted, _ = teacher_logits(run, asked, images, novel.positions, progress)
    found = {
        "classes": len(novel.names),
        "images": len(novel.positions),
        "top1": None,
        "teacher_top1": top1(weighted, novel.labels),
    }
    if any(page.aligns_features for page in recipe.objective):
        student, targets = load_student(run), open_targets(asked, run.target_stores[0].parent, load)
        prompts = targets.prompts(asked.classes, asked.templates, load)  # stored when the teacher was asked just now
        student.score_by(F.normalize(prompts.mean(dim=0), dim=1), targets.logit_scale)
        student = student.to(best_device())
        workers = recipe.training.workers
        shown = evaluation_views(images, student.preprocessing, novel.positions, workers=workers)
        found["top1"] = top1(student_logits(student, shown), novel.labels)
    return found


def load(page: TeacherConfig) -> Teacher:
    """Load the teacher, should what it said be gone again."""
    return load_teacher(page, best_device())

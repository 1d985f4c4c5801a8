"""The teacher's answers to images that it judges with a run's student: those of an export, or of a comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prgkit.config.recipe import Recipe
from prgkit.data.index import ImageIndex
from prgkit.errors import ExportError
from prgkit.progress import Progress
from prgkit.storage.run import Run
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import as_learned, averaged, open_targets
from prgkit.teacher.feature_store import embed
from prgkit.teacher.zero_shot import ZeroShotClassifier, classifier_of


class TeacherAnswers(NamedTuple):
    """What the teacher says of n images, and what it says it with."""

    logits: NDArray[np.float32]  # W [n, C] as the student learned it, adjusted where the run adjusts
    uniform_logits: NDArray[np.float32]  # W [n, C] unadjusted, the teacher's prompts weighted equally
    features: NDArray[np.float32]  # I [n, D]
    classifier: ZeroShotClassifier


def teacher_answers(
    run: Run, recipe: Recipe, images: ImageIndex, positions: NDArray[np.int64], progress: Progress
) -> TeacherAnswers:
    """Return what the teacher says of the evaluation view of some images; it is loaded where they are not stored yet.

    Raises:
        ExportError: the teacher is not the one that the run's student learned from.
    """
    teacher = teacher_loader(progress)
    root = run.target_stores[0].parent
    targets = open_targets(as_learned(recipe, run, root), root, teacher)
    if targets.facts().fingerprint != run.teacher_facts.fingerprint:
        raise ExportError(
            f"the teacher, or its learned context, is not the one that the student learned from: {recipe.teacher_name}",
            where=run.folder,
            fix="put the old one back, or distil again into a new run",
        )
    views = np.ones(len(images), dtype=int)
    embed(targets.stores, images, views=views, recipe=recipe, teacher=teacher, progress=progress)
    prompts = targets.prompts(recipe.classes, recipe.templates, teacher)
    classifier = averaged(classifier_of(run, recipe, prompts, targets.logit_scale), targets, recipe)
    rows = targets.rows([images.keys[position] for position in positions], views=1)
    features = targets.features(rows, np.zeros(len(rows), dtype=int))
    return TeacherAnswers(*both_logits(classifier, features), features.numpy(), classifier)


def both_logits(
    classifier: ZeroShotClassifier, features: torch.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the logits W [n, C] of features I [n, D] twice: of the classifier, and of the teacher by itself."""
    by_itself = replace(classifier.uncorrected, prompt_weighting="mean")
    parts = torch.split(features, 256)
    given, uniform = ([answering.logits(part) for part in parts] for answering in (classifier, by_itself))
    return torch.cat(given).numpy(), torch.cat(uniform).numpy()

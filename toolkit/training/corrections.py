"""Corrections of the teacher's answers are fitted to unlabelled images, and laid side by side before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.recipe import Recipe
from prgkit.config.sections import TargetsConfig
from prgkit.data.ticks import Tick
from prgkit.device import best_device
from prgkit.errors import some
from prgkit.progress import Progress
from prgkit.teacher.zero_shot import ZeroShotClassifier, fit_corrections
from prgkit.training.dataset import DistillationDataset
from prgkit.training.statistics import NONE, effective_classes, percent
from prgkit.training.statistics_schema import CorrectionRow

PART = 256  # images whose answers are computed at once
MOST_FITTED = 50_000  # images: their features are held in memory
MOST_COMPARED = 5_000  # images: every correction is fitted to them, before each training


def fit_classifier(dataset: DistillationDataset, recipe: Recipe, progress: Progress) -> ZeroShotClassifier:
    """Fit the corrections that the recipe asks for to at most MOST_FITTED images that are learned from."""
    sample = dataset.train_indices[spread(len(dataset.train_indices), MOST_FITTED)]
    if recipe.targets.refine is not None:
        progress.note(f"fitting {recipe.targets.refine} to the teacher's answers to {len(sample):,} images")
    device = best_device()
    features, logits = on(device, features_and_logits(dataset, sample))
    fitted = fit_corrections(dataset.classifier.to(device), features, logits, recipe.targets, recipe.classes)
    if emptied := classes_left(logits, fitted.correct(features, logits), recipe.classes):
        progress.note(
            f"the correction leaves no image to {some(emptied)}, to which the teacher by itself gives some: compare "
            "the corrections below, and your class names"
        )
    return fitted.to(torch.device("cpu"))


def classes_left(before: Tensor, after: Tensor, classes: Sequence[str]) -> list[str]:
    """Return the classes that some images [n, C] have before a correction, and none after it."""
    counts = [torch.bincount(logits.argmax(dim=1), minlength=len(classes)) for logits in (before, after)]
    return [name for name, old, new in zip(classes, *counts, strict=True) if old > 0 and new == 0]


def compare_corrections(dataset: DistillationDataset, recipe: Recipe, ticks: Sequence[Tick]) -> list[CorrectionRow]:
    """Fit every correction to some of the images that are learned from, and return what each does to the answers.

    ``ticks`` are those of an audit; those of a known truth say how right each correction is.
    """
    positions = dataset.train_indices[spread(len(dataset.train_indices), MOST_COMPARED)]
    device = best_device()
    teacher = dataset.classifier.to(device).uncorrected
    plain = replace(dataset, classifier=teacher)
    views = [on(device, features_and_logits(plain, positions, view)) for view in (0, 1)]
    configs, truth = candidates(recipe), known_truth(dataset, ticks, recipe.classes)
    fitted = {name: fit_corrections(teacher, *views[0], config, recipe.classes) for name, config in configs.items()}
    rows = describe_effects(fitted, *views)
    return [
        row.model_copy(
            update={
                "used": configs[row.name] == recipe.targets,
                "ticked": right_of(plain, fitted[row.name], truth) if truth else None,
            }
        )
        for row in rows
    ]


def describe_effects(
    fitted: Mapping[str, ZeroShotClassifier], first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> list[CorrectionRow]:
    """Return what each fitted correction does to the answers, NONE among them, without a label.

    ``first`` and ``second`` are features [n, D] and the teacher's own logits [n, C] of two views of the same images.
    """
    answers = {name: classifier.correct(*first) for name, classifier in fitted.items()}
    labels = {name: logits.argmax(dim=1).cpu().numpy() for name, logits in answers.items()}
    return [
        CorrectionRow(
            name=name,
            images=len(labels[name]),
            changed=percent(labels[name] != labels[NONE]),
            mass=[round(float(share), 6) for share in answers[name].softmax(dim=1).mean(dim=0)],
            effective_classes=effective_classes(np.bincount(labels[name], minlength=answers[name].shape[1])),
            two_views=percent(labels[name] == classifier.correct(*second).argmax(dim=1).cpu().numpy()),
            agreement={other: percent(labels[name] == labels[other]) for other in fitted if other != name},
        )
        for name, classifier in fitted.items()
    ]


def candidates(recipe: Recipe) -> dict[str, TargetsConfig]:
    """Return what is compared, by name: no correction, each alone, and the recipe's own where it is another."""
    prior = recipe.targets.prior
    alone = {
        NONE: TargetsConfig(),
        "debias": TargetsConfig(debias=1.0, prior=prior),
        "inmap": TargetsConfig(refine="inmap", prior=prior),
        "stata": TargetsConfig(refine="stata"),
    }
    return alone if recipe.targets in alone.values() else {**alone, "this recipe": recipe.targets}


def known_truth(dataset: DistillationDataset, ticks: Sequence[Tick], classes: Sequence[str]) -> dict[int, int]:
    """Return the class of each ticked image that is known to be of one, by the image's position."""
    places = {key: position for position, key in enumerate(dataset.image_index.keys)}
    known = ((places.get(tick.key), tick.truth) for tick in ticks)
    return {place: classes.index(name) for place, name in known if place is not None and name is not None}


def right_of(dataset: DistillationDataset, classifier: ZeroShotClassifier, truth: Mapping[int, int]) -> tuple[int, int]:
    """Return on how many of the ticked images a classifier is right, and how many those are."""
    answers = on(classifier.prompts.device, features_and_logits(dataset, np.array(list(truth))))
    labels = classifier.correct(*answers).argmax(dim=1).cpu()
    return int((labels == torch.tensor(list(truth.values()))).sum()), len(truth)


def features_and_logits(
    dataset: DistillationDataset, positions: NDArray[np.int64], view: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a view's features I [positions, D] and the teacher's own logits of them W [positions, C], on the CPU."""
    device = best_device()
    classifier = dataset.classifier.to(device)
    parts = np.array_split(dataset.rows[positions], max(1, len(positions) // PART))
    features = [dataset.store.features(part, np.full(len(part), view)) for part in parts]
    return torch.cat(features), torch.cat([classifier.raw_logits(part.to(device)).cpu() for part in features])


def on(device: torch.device, answers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return features and logits on another device."""
    return answers[0].to(device), answers[1].to(device)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` evenly spaced places of ``count``: an index is ordered by content, so by chance."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))

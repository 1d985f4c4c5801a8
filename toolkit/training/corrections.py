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
from prgkit.data.ticks import Tick, ticked
from prgkit.device import best_device
from prgkit.errors import some
from prgkit.progress import Progress
from prgkit.storage.quality import CorrectionRow
from prgkit.teacher.zero_shot import ZeroShotClassifier, fit_corrections
from prgkit.training.dataset import DistillationDataset, in_parts
from prgkit.training.statistics import NONE, effective_classes, percent

MOST_FITTED = 50_000  # images: their features are held in memory
MOST_COMPARED = 5_000  # images: every correction is fitted to them, before each training


def fit_classifier(dataset: DistillationDataset, recipe: Recipe, progress: Progress) -> ZeroShotClassifier:
    """Fit the corrections that the recipe asks for to at most MOST_FITTED images that are learned from."""
    sample = dataset.train_indices[spread(len(dataset.train_indices), MOST_FITTED)]
    if len(sample) < len(recipe.classes):
        progress.note(
            f"{len(sample)} images are too few to correct the answers to {len(recipe.classes)} classes by: they are "
            "taken as the teacher gives them"
        )
        return dataset.classifier
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
    """Fit every correction to some of the images that are not held out, and return what each does to the answers.

    The recipe's own is the one that the answers are corrected by. ``ticks`` are those of an audit. Fewer images than
    classes are too few to fit anything to.
    """
    learned = np.setdiff1d(np.arange(len(dataset.image_index)), dataset.val_indices)
    if len(learned) < len(recipe.classes):
        return []
    positions = learned[spread(len(learned), MOST_COMPARED)]
    device = best_device()
    teacher = dataset.classifier.to(device).uncorrected
    plain = replace(dataset, classifier=teacher)
    views = [on(device, features_and_logits(plain, positions, view)) for view in (0, 1)]
    configs, seen = candidates(recipe), ticked_places(dataset, ticks)
    fitted = {
        name: dataset.classifier.to(device)
        if config == recipe.targets
        else fit_corrections(teacher, *views[0], config, recipe.classes)
        for name, config in configs.items()
    }
    rows = describe_effects(fitted, *views)
    return [
        row.model_copy(
            update={
                "used": configs[row.name] == recipe.targets,
                "ticked": right_of(plain, fitted[row.name], seen, recipe.classes) if seen else None,
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


def ticked_places(dataset: DistillationDataset, ticks: Sequence[Tick]) -> dict[int, Tick]:
    """Return the ticks by the position of their images."""
    places = {key: position for position, key in enumerate(dataset.image_index.keys)}
    return {places[tick.key]: tick for tick in ticked(ticks) if tick.key in places}


def right_of(
    dataset: DistillationDataset, classifier: ZeroShotClassifier, seen: Mapping[int, Tick], classes: Sequence[str]
) -> tuple[int, int, int]:
    """Return on how many ticked images a classifier is right for certain, on how many perhaps, and how many there are.

    Where the answer on the sheet was wrong and nobody said what is right, another answer may be right or not.
    """
    answers = on(classifier.prompts.device, features_and_logits(dataset, np.array(list(seen))))
    names = [classes[label] for label in classifier.correct(*answers).argmax(dim=1).tolist()]
    judged = list(zip(names, seen.values(), strict=True))
    right = sum(name == tick.truth for name, tick in judged)
    unknown = sum(tick.truth is None and name != tick.teacher for name, tick in judged)
    return right, right + unknown, len(judged)


def features_and_logits(
    dataset: DistillationDataset, positions: NDArray[np.int64], view: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a view's features I [positions, D] and the teacher's own logits of them W [positions, C], on the CPU."""
    device = best_device()
    classifier = dataset.classifier.to(device)
    features = [dataset.store.features(part, np.full(len(part), view)) for part in in_parts(dataset.rows[positions])]
    return torch.cat(features), torch.cat([classifier.raw_logits(part.to(device)).cpu() for part in features])


def on(device: torch.device, answers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return features and logits on another device."""
    return answers[0].to(device), answers[1].to(device)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` evenly spaced places of ``count``: an index is ordered by content, so by chance."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))

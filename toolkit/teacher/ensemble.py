"""The stored features of a recipe's teacher, or of several whose logits are averaged as if they were one teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.recipe import Recipe
from prgkit.config.shard import WHOLE, Shard
from prgkit.device import best_device, teacher_precision
from prgkit.errors import TargetsError
from prgkit.progress import NULL_PROGRESS, Progress
from prgkit.storage.atomic import fingerprint
from prgkit.storage.run import Run
from prgkit.storage.run_card import TeacherFacts
from prgkit.teacher.clip import BATCH_SIZES
from prgkit.teacher.feature_store import FeatureStore, Load, existing_store, open_store
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.weights import as_stored, settled, teacher_identity, weights_identity
from prgkit.teacher.zero_shot import ZeroShotClassifier


class TeacherEnsemble:
    """The stores of K teachers, read as the store of one; each is its own teacher's, and other runs share it.

    With w_k = sqrt(s_k / sum_j s_j), I = [w_1 I_1, ..., w_K I_K] and T alike are unit vectors of sum_k D_k numbers,
    and with s = sum_j s_j / K the logits s * I * T^T are the mean of the teachers' s_k * I_k * T_k^T. So a student
    learns from several teachers as from one, by any objective.

    Raises:
        TargetsError: two of the teachers are the same.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        if len({fingerprint(weights_identity(store.card.teacher)) for store in stores}) < len(stores):
            names = ", ".join(store.config.model for store in stores)
            raise TargetsError(
                f"two of the recipe's teachers are the same: {names}", where="teacher", fix="name each teacher once"
            )
        scales = [store.logit_scale for store in stores]
        self.stores = tuple(stores)
        self.width = sum(store.width for store in stores)
        self.logit_scale = sum(scales) / len(scales)
        self._weights = [math.sqrt(scale / sum(scales)) for scale in scales]

    def __contains__(self, key: object) -> bool:
        return all(key in store for store in self.stores)

    @property
    def name(self) -> str:
        """What decides the features, in a word."""
        return "+".join(store.name for store in self.stores)

    def rows(self, keys: Sequence[str], *, views: int) -> NDArray[np.int64]:
        """Return each image's row in each store [n, K], -1 where fewer than ``views`` of its views are stored."""
        return np.stack([store.rows(keys, views=views) for store in self.stores], axis=1)

    def features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Return the unit features I [n, D] float32 of ``rows`` [n, K] under ``views`` [n]."""
        return self._joined([store.features(own, views) for store, own in zip(self.stores, rows.T, strict=True)])

    def prompts(
        self, classes: Sequence[str], templates: Sequence[str], teacher: Load, progress: Progress = NULL_PROGRESS
    ) -> Tensor:
        """Return T [M, C, D] float32; each teacher embeds a set of classes and templates once."""
        return self._joined([store.prompts(classes, templates, teacher, progress) for store in self.stores])

    def facts(self) -> TeacherFacts:
        """Return what a run's card says of its teachers."""
        each = [store.facts() for store in self.stores]
        return TeacherFacts(
            model=" + ".join(store.config.name for store in self.stores),
            weights=None,
            fingerprint=fingerprint([facts.fingerprint for facts in each]),
            targets=tuple(str(store.folder) for store in self.stores),
            width=self.width,
            logit_scale=self.logit_scale,
        )

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([weight * part for weight, part in zip(self._weights, parts, strict=True)], dim=-1)


def averaged(classifier: ZeroShotClassifier, targets: TeacherFeatures, recipe: Recipe) -> ZeroShotClassifier:
    """Return the classifier with the average of several teachers that the recipe asks for."""
    widths = tuple(store.width for store in targets.stores)
    return replace(classifier, average=recipe.targets.average, widths=widths)


def as_learned(recipe: Recipe, run: Run, root: Path) -> Recipe:
    """Return a run's recipe with what its teachers leave open, precision and batch size, as when it learned from them.

    That is as in its own stores, or where they are gone, as the fingerprint in its card was made. Another run may have
    made other stores since, and another device would choose otherwise.
    """
    stores = [store.name for store in run.target_stores]
    teachers = [as_stored(config, recipe.views, root, stores) for config in recipe.teacher]
    known = tuple(stored or config for stored, config in zip(teachers, recipe.teacher, strict=True))
    learned = recipe.model_copy(update={"teacher": known})
    if run.card.teacher is None or all(teachers):
        return learned
    return computed_as(learned, root, run.card.teacher.fingerprint)


def computed_as(recipe: Recipe, root: Path, wanted: str) -> Recipe:
    """Return the recipe with such a precision and batch size, where its teachers leave them open, as ``wanted`` tells.

    That is a `teacher_fingerprint`; the recipe stays as it is where none has it.
    """
    for precision, batch_size in product(("fp32", "bf16"), BATCH_SIZES):
        chosen = tuple(
            settled(config, config.precision.replace("auto", precision), config.batch_size or batch_size)
            for config in recipe.teacher
        )
        guess = recipe.model_copy(update={"teacher": chosen})
        if teacher_fingerprint(guess, root) == wanted:
            return guess
    return recipe


def teacher_fingerprint(recipe: Recipe, root: Path) -> str:
    """Return what ``facts`` say of the recipe's teachers as their files are now, by the stores under ``root``.

    Raises:
        TeacherError: one of them is gone.
    """
    each = []
    for config in recipe.teacher:
        left_open = settled(config, teacher_precision(best_device()), config.batch_size or BATCH_SIZES[-1])
        stored = as_stored(config, recipe.views, root) or left_open
        identity, context = teacher_identity(stored), load_context(config)
        each.append(fingerprint([identity, context.digest] if context else identity))
    return each[0] if len(each) == 1 else fingerprint(each)


TeacherFeatures: TypeAlias = FeatureStore | TeacherEnsemble


def open_targets(recipe: Recipe, root: Path, teacher: Load, shard: Shard = WHOLE) -> TeacherFeatures:
    """Open the stores of the recipe's teachers and views, creating those that are new; appending to the ``shard``.

    Raises:
        TargetsError: a store was made by something else, or two teachers are the same.
    """
    return _as_one([open_store(config, recipe.views, root, teacher, shard) for config in recipe.teacher])


def existing_targets(recipe: Recipe, root: Path) -> TeacherFeatures | None:
    """Open the stores of the recipe's teachers and views where all of them are there.

    Raises:
        TargetsError: a store was made by something else, or two teachers are the same.
    """
    opened = [existing_store(config, recipe.views, root) for config in recipe.teacher]
    stores = [store for store in opened if store is not None]
    return _as_one(stores) if len(stores) == len(opened) else None


def _as_one(stores: Sequence[FeatureStore]) -> TeacherFeatures:
    return stores[0] if len(stores) == 1 else TeacherEnsemble(stores)

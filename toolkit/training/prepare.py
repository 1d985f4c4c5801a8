"""What comes before the training loop: images are read and split, and the teacher embeds the new ones."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.prompts import phrases
from prgkit.config.recipe import Recipe
from prgkit.config.sections import Keep
from prgkit.data.augment import mix
from prgkit.data.cache import PICTURES, DecodedImageCache
from prgkit.data.decode import GreyRange
from prgkit.data.index import (
    NEARLY_BLACK,
    ImageIndex,
    Measured,
    held_out_places,
    nearly_black,
    of_one_colour,
    read_image_index,
    select_labelled,
)
from prgkit.data.snapshot import restrict_to_snapshot, save_snapshot
from prgkit.errors import ImagesError
from prgkit.progress import Progress
from prgkit.storage.run import Run
from prgkit.storage.run_card import ImageFacts
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import TeacherFeatures, as_learned, averaged, existing_targets, open_targets
from prgkit.teacher.feature_store import Load, embed
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.weights import check_teacher
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment
from prgkit.training.dataset import DistillationDataset, LabelledDataset
from prgkit.training.few_shot import VALIDATION_SHARE
from prgkit.training.pseudo_labels import (
    class_weights,
    correct_and_filter,
    report_answers,
    report_selection,
    report_statistics,
)

FEWEST_IMAGES = 4  # that can be learned from


def prepare(
    recipe: Recipe, targets_root: Path, progress: Progress, run: Run | None = None, *, like: Run | None = None
) -> DistillationDataset:
    """Read the images, split off the held-out ones, and have the teacher embed what it has not embedded yet.

    What is found is written into ``run``. Where that has begun to train, these are the images that it was made from, or
    it is refused; where ``like`` has, they are those of its images that are still there.
    """
    load = teacher_loader(progress)
    begun = next((one for one in (run, like) if one is not None and one.begun), None)
    images, store = read_images(recipe, targets_root, load, progress, begun, all_needed=begun is run)
    evaluation = read_evaluation(recipe, images, store, progress) if recipe.data.evaluation else None
    few = read_few_labelled(recipe, images, evaluation, store, progress) if recipe.learns_labels else None
    if few is not None and begun is not None:
        kept = restrict_to_snapshot(few.images, begun, progress, all_needed=begun is run, labelled=True)
        few = FewLabelled(kept, few.labels[np.isin(few.images.keys, kept.keys)])
    if run is not None:
        if begun is None:
            save_snapshot(run, images, few.images if few else None, recipe.classes)
        judged = image_facts(evaluation) if evaluation else None
        run.update_card(images=image_facts(images), evaluation=judged, teacher=store.facts())
    held_out = hold_out(images.keys, recipe.data.held_out)
    dataset = embed_images(images, store, held_out, views_of(images, held_out, recipe), recipe, load, progress)
    if evaluation is not None:
        views = np.ones(len(evaluation), int)
        embed(store.stores, evaluation, views=views, recipe=recipe, teacher=load, progress=progress)
    if recipe.targets.corrects or recipe.data.keep.asks:
        dataset = correct_and_filter(dataset, recipe, progress, run)
    if recipe.training.class_weights is not None:
        weights = class_weights(
            recipe.training.class_weights, dataset.pseudo_classes(), dataset.sample_weights, classes=len(recipe.classes)
        )
        dataset = replace(dataset, class_weights=weights)
    if run is None or not run.quality_file.exists():
        report_statistics(dataset, recipe, progress, run, like=like)
    unsure = len(images) - len(held_out) - len(dataset.train_indices)
    if few is not None:
        dataset = with_labelled(dataset, few, recipe, load, progress)
    report_selection(dataset, recipe.data.keep, unsure, progress, run)
    return dataset if recipe.views.mixed is None else with_mixtures(dataset, recipe, load, progress)


def prepare_answers(recipe: Recipe, targets_root: Path, progress: Progress) -> DistillationDataset:
    """Read the images and have the teacher embed the evaluation view of each; its answers are corrected as for a run.

    Nothing is left out by the teacher's confidence, and one image is enough.
    """
    load = teacher_loader(progress)
    images, store = read_images(recipe, targets_root, load, progress)
    few = len(images) < FEWEST_IMAGES
    held_out = np.empty(0, np.int64) if few else hold_out(images.keys, recipe.data.held_out)
    dataset = embed_images(images, store, held_out, np.ones(len(images), int), recipe, load, progress)
    all_kept = recipe.model_copy(update={"data": recipe.data.model_copy(update={"keep": Keep()})})
    if recipe.targets.corrects:
        dataset = correct_and_filter(dataset, all_kept, progress, None)
    report_answers(dataset, recipe, progress)
    return dataset


def read_images(
    recipe: Recipe,
    targets_root: Path,
    load: Load,
    progress: Progress,
    begun: Run | None = None,
    *,
    all_needed: bool = False,
) -> tuple[ImageIndex, TeacherFeatures]:
    """Read the images to learn from, and open the teacher's features of them; where a run has ``begun``, its images."""
    for config in recipe.teacher:
        check_teacher(config, note=progress.note)
        load_context(config)
    if begun is not None:
        recipe = as_learned(recipe, begun, targets_root)
    stored, cache = existing_targets(recipe, targets_root), DecodedImageCache(targets_root / PICTURES)
    known = begun is not None and begun.card.images is not None  # not where a damaged card was deleted
    grey: GreyRange | Measured | None = grey_of(begun) if begun is not None and known else "measured"
    images = read_image_index(recipe.data.image_spec, progress, known=stored or (), cache=cache, grey=grey)
    report_reading(images, progress)
    if begun is not None:
        images = restrict_to_snapshot(images, begun, progress, all_needed=all_needed)
    store = stored or open_targets(recipe, targets_root, load)
    report_damage(store, cache, progress)
    return images, store


def embed_images(
    images: ImageIndex,
    store: TeacherFeatures,
    held_out: NDArray[np.int64],
    views: NDArray[np.int64],
    recipe: Recipe,
    load: Load,
    progress: Progress,
) -> DistillationDataset:
    """Have the teacher embed the first ``views`` [images] views of the images, and return them with its answers."""
    prompts = store.prompts(recipe.classes, recipe.templates, load, progress)  # names are refused before the hours
    embed(store.stores, images, views=views, recipe=recipe, teacher=load, progress=progress)
    return DistillationDataset(
        image_index=images,
        store=store,
        rows=store.rows(images.keys, views=1),
        val_indices=held_out,
        train_indices=np.setdiff1d(np.arange(len(images)), held_out),
        sample_weights=None,
        classifier=averaged(
            ZeroShotClassifier(prompts, store.logit_scale, recipe.prompt_weighting, no_adjustment(len(recipe.classes))),
            store,
            recipe,
        ),
        words=read_words(recipe, store, load, progress) if recipe.reads_words else (),
    )


def read_words(recipe: Recipe, store: TeacherFeatures, load: Load, progress: Progress) -> tuple[Tensor, ...]:
    """Return each of data.words as the teacher reads it in all templates, [1, D], or [2, D] of a contrast pair."""
    words = [phrases(word) for word in recipe.words]
    told = dict.fromkeys(phrase for pair in words for phrase in pair)
    read = store.prompts(tuple(told), recipe.templates, load, progress).mean(dim=0)  # [phrases, D]
    vectors = dict(zip(told, torch.nn.functional.normalize(read, dim=1), strict=True))
    return tuple(torch.stack([vectors[phrase] for phrase in pair]) for pair in words)


class FewLabelled(NamedTuple):
    """The images of data.labelled, and their labels [images]."""

    images: ImageIndex
    labels: NDArray[np.int64]


def grey_of(run: Run) -> GreyRange | None:
    """Return which values of a deep grey were black and white in the images that a run learned from."""
    images = run.card.images
    return images.grey_range if images is not None else None


def report_reading(images: ImageIndex, progress: Progress) -> None:
    """Say what was passed over, how deep greys are read, and whether all that is seen is black."""
    if images.source.left_out:
        progress.note(f"{images.source.spec}: {images.source.left_out}")
    if images.deep_greys:
        progress.note(str(images.deep_greys))
    if nearly_black(images):
        progress.note(
            f"{images.source.spec} is nearly black: 999 of 1,000 values are at most {NEARLY_BLACK} of 255. So is half "
            "of what was looked at or more. 12 bits in a file of 16 look like this in colour, or where single values "
            "are white: scale the images to 8 bits"
        )
    elif of_one_colour(images):
        progress.note(
            f"{images.source.spec}: half of the images looked at or more are of one colour throughout: view them"
        )


def read_evaluation(recipe: Recipe, learned: ImageIndex, store: TeacherFeatures, progress: Progress) -> ImageIndex:
    """Read the labelled images, and say now rather than after training if their labels fit no class.

    The labels go no further: the teacher embeds these images, and the student sees them only when it is measured.
    """
    assert recipe.data.evaluation_spec is not None
    read = read_image_index(recipe.data.evaluation_spec, progress, known=store, grey=learned.source.grey)
    report_reading(read, progress)
    evaluation, _ = select_labelled(read, recipe.classes, note=progress.note)
    if shared := len(set(evaluation.keys) & set(learned.keys)):
        progress.note(f"{shared} evaluation images are also among those to learn from: accuracy on them flatters")
    return evaluation


def read_few_labelled(
    recipe: Recipe, learned: ImageIndex, evaluation: ImageIndex | None, store: TeacherFeatures, progress: Progress
) -> FewLabelled:
    """Read the few images whose labels are learned from, and say now rather than after the teacher what is wrong."""
    assert recipe.data.labelled_spec is not None
    read = read_image_index(recipe.data.labelled_spec, progress, known=store, grey=learned.source.grey)
    report_reading(read, progress)
    images, labels = select_labelled(read, recipe.classes, note=progress.note)
    if len(images) < FEWEST_IMAGES:
        raise ImagesError(
            f"{len(images)} labelled images are too few to learn from",
            where=images.source.spec,
            fix="label at least four, better some of each class, or drop data.labelled",
        )
    if evaluation is not None and (shared := len(set(evaluation.keys) & set(images.keys))):
        progress.note(f"{shared} evaluation images are also among the labelled ones: accuracy on them flatters")
    return FewLabelled(images, labels)


def report_damage(store: TeacherFeatures, cache: DecodedImageCache, progress: Progress) -> None:
    """Say what is damaged in the stores, and made anew."""
    for one in store.stores:
        for place in one.damaged:
            progress.note(f"damaged in {one.folder}: {place}; what was in it is embedded again")
    for place in cache.damaged:
        progress.note(f"damaged in {cache.folder}: {place}; what was in it is decoded again")


def views_of(images: ImageIndex, held_out: NDArray[np.int64], recipe: Recipe) -> NDArray[np.int64]:
    """Return how many views of each image [images] the teacher embeds: one of a held-out image, the evaluation view."""
    views = np.full(len(images), 1 + recipe.views.count)
    views[held_out] = 1
    return views


def with_labelled(
    dataset: DistillationDataset, few: FewLabelled, recipe: Recipe, load: Load, progress: Progress
) -> DistillationDataset:
    """Return the data set with a few labelled images, which the teacher embeds like the others.

    A share of them is a validation split, which chooses how the two heads are mixed: nothing is learned from these
    images, labelled or not. And no image whose label is learned from is among those that select the checkpoint.
    """
    images, store = few.images, dataset.store
    validation = hold_out(images.keys, VALIDATION_SHARE)
    embed(
        store.stores, images, views=views_of(images, validation, recipe), recipe=recipe, teacher=load, progress=progress
    )
    labelled = replace(
        dataset,
        image_index=images,
        rows=store.rows(images.keys, views=1),
        val_indices=validation,
        train_indices=np.setdiff1d(np.arange(len(images)), validation),
        sample_weights=None,
    )
    kept = without(dataset.image_index, dataset.train_indices, {images.keys[position] for position in validation})
    return replace(
        dataset,
        train_indices=dataset.train_indices[kept],
        sample_weights=None if dataset.sample_weights is None else dataset.sample_weights[kept],
        val_indices=dataset.val_indices[without(dataset.image_index, dataset.val_indices, set(images.keys))],
        labelled=LabelledDataset(labelled, few.labels, first=len(dataset.image_index)),
    )


def with_mixtures(dataset: DistillationDataset, recipe: Recipe, load: Load, progress: Progress) -> DistillationDataset:
    """Return the data set with mixtures of the images that are learned from, about which the teacher is asked once."""
    images, store = dataset.image_index, dataset.store
    mixed = mix(images, dataset.train_indices, recipe.views.mixed or 0, recipe.views.seed)
    views = np.repeat([0, 1], [len(images), len(mixed.pairs)])
    embed(store.stores, mixed, views=views, recipe=recipe, teacher=load, progress=progress)
    rows = store.rows(mixed.keys[len(images) :], views=1)
    return replace(dataset, mixed=mixed, rows=np.concatenate([dataset.rows, rows]))


def without(image_index: ImageIndex, positions: NDArray[np.int64], barred: Container[str]) -> NDArray[np.bool_]:
    """Tell of each position whether its image is none of the ``barred``; all stay where none would."""
    kept = np.array([image_index.keys[position] not in barred for position in positions], dtype=bool)
    return kept if kept.any() else ~kept


def image_facts(images: ImageIndex) -> ImageFacts:
    """Return what a run's card says of its images: how many, and each unreadable one with its reason."""
    return ImageFacts(
        source=images.source.spec,
        used=len(images),
        duplicates=images.duplicates,
        unreadable=tuple(images.unreadable),
        left_out=images.source.left_out,
        grey_range=images.source.grey,
    )


def hold_out(keys: Sequence[str], share: float) -> NDArray[np.int64]:
    """Return the positions of the images that select the checkpoint, chosen by their content alone."""
    places = held_out_places(keys)
    chosen = np.flatnonzero(places < share)
    if len(keys) < FEWEST_IMAGES:
        raise ImagesError(
            f"{len(keys)} images are too few to learn from", fix="give at least four, better some hundreds"
        )
    return chosen if 0 < len(chosen) < len(keys) - 1 else np.argsort(places)[:1]

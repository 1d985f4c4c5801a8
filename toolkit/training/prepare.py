"""What comes before the loop: images are read and split, the teacher sees what it has not seen yet."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.config.recipe import Recipe
from prgkit.config.sections import TeacherConfig
from prgkit.data.cache import PICTURES, DecodedImageCache
from prgkit.data.decode import GreyRange
from prgkit.data.index import NEARLY_BLACK, ImageIndex, nearly_black, of_one_colour, read_image_index, select_labelled
from prgkit.data.snapshot import restrict_to_snapshot, save_snapshot
from prgkit.device import best_device
from prgkit.errors import ImagesError
from prgkit.progress import Progress
from prgkit.storage.run import Run
from prgkit.teacher.clip import Teacher, check_teacher, load_teacher
from prgkit.teacher.ensemble import TeacherFeatures, existing_targets, open_targets
from prgkit.teacher.feature_store import embed
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment
from prgkit.training.dataset import DistillationDataset, LabelledDataset
from prgkit.training.few_shot import VALIDATION
from prgkit.training.pseudo_labels import adjust_and_filter, report_selection, report_statistics


def prepare(
    recipe: Recipe, targets_root: Path, progress: Progress, run: Run | None = None, *, like: Run | None = None
) -> DistillationDataset:
    """Read the images, split off the held-out ones, and have the teacher see what it has not seen yet.

    What is found is written into ``run``. Where that has begun to learn, these are the images that it was made from, or
    it is refused; where ``like`` has, they are those of its images that are still there.
    """

    @cache
    def teacher(config: TeacherConfig) -> Teacher:  # loaded once, and only if something is missing
        progress.note(f"loading the teacher {config.model}")
        return load_teacher(config, best_device())

    for config in recipe.teacher:
        check_teacher(config, note=progress.note)
        load_context(config)
    stored, pictures = existing_targets(recipe, targets_root), DecodedImageCache(targets_root / PICTURES)
    same = next((one for one in (run, like) if one is not None and one.begun), None)
    grey = grey_of(same) if same is not None else None
    images = read_image_index(recipe.data.image_spec, progress, known=stored or (), cache=pictures, grey=grey)
    tell_reading(images, progress)
    if same is not None:
        images = restrict_to_snapshot(images, same, progress, all_needed=same is run)
    targets = stored or open_targets(recipe, targets_root, teacher)
    for store in targets.stores:
        for place in store.damaged:
            progress.note(f"damaged in {store.folder}: {place}; what was in it is embedded again")
    for place in pictures.damaged:
        progress.note(f"damaged in {pictures.folder}: {place}; what was in it is decoded again")
    evaluation = read_evaluation(recipe, images, targets, progress) if recipe.data.evaluation else None
    few = read_labelled(recipe, images, evaluation, targets, progress) if recipe.learns_labels else None
    if few is not None and same is not None:
        kept = restrict_to_snapshot(few[0], same, progress, all_needed=same is run, labelled=True)
        few = kept, few[1][np.isin(few[0].keys, kept.keys)]
    if run is not None:
        if same is None:
            save_snapshot(run, images, few[0] if few else None)
        judged = facts_of(evaluation) if evaluation else None
        run.update_card(images=facts_of(images), evaluation=judged, teacher=targets.facts())
    prompts = targets.prompts(recipe.classes, recipe.templates, teacher, progress)  # names are refused before the hours
    held_out = hold_out(images.keys, recipe.data.held_out)
    views = np.full(len(images), 1 + recipe.views.count)
    views[held_out] = 1  # the evaluation view alone
    for store in targets.stores:
        embed(store, images, views=views, recipe=recipe, teacher=teacher, progress=progress)
        if evaluation is not None:
            embed(
                store,
                evaluation,
                views=np.ones(len(evaluation), int),
                recipe=recipe,
                teacher=teacher,
                progress=progress,
            )
    dataset = DistillationDataset(
        image_index=images,
        store=targets,
        rows=targets.rows(images.keys, views=1),
        val_indices=held_out,
        train_indices=np.setdiff1d(np.arange(len(images)), held_out),
        sample_weights=None,
        classifier=ZeroShotClassifier(
            prompts, targets.logit_scale, recipe.prompt_weighting, no_adjustment(len(recipe.classes))
        ),
    )
    if recipe.targets.corrects or recipe.data.keep.asks:
        dataset = adjust_and_filter(dataset, recipe, progress, run)
    if run is None or not run.quality_file.exists():
        report_statistics(dataset, recipe, progress, run)
    report_selection(dataset, recipe.data.keep, progress, run)
    if few is not None:
        dataset = with_labelled(dataset, *few, recipe, teacher, progress)
    return dataset


def grey_of(run: Run) -> GreyRange | None:
    """Return which values of a deep grey were black and white in the images that a run learned from."""
    images = run.card.images
    return images.grey_range if images is not None else None


def tell_reading(images: ImageIndex, progress: Progress) -> None:
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


def read_evaluation(recipe: Recipe, learned: ImageIndex, targets: TeacherFeatures, progress: Progress) -> ImageIndex:
    """Read the labelled images, and say now rather than after training if their labels fit no class.

    Nothing of a label goes any further: the teacher will see these images, and the student only when it is measured.
    """
    assert recipe.data.evaluation_spec is not None
    found = read_image_index(recipe.data.evaluation_spec, progress, known=targets, grey=learned.source.grey)
    tell_reading(found, progress)
    evaluation, _ = select_labelled(found, recipe.classes, note=progress.note)
    if shared := len(set(evaluation.keys) & set(learned.keys)):
        progress.note(f"{shared} evaluation images are also among those to learn from: accuracy on them flatters")
    return evaluation


def read_labelled(
    recipe: Recipe, learned: ImageIndex, evaluation: ImageIndex | None, targets: TeacherFeatures, progress: Progress
) -> tuple[ImageIndex, NDArray[np.int64]]:
    """Read the few images whose labels are learned from, and say now rather than after the teacher what is wrong."""
    assert recipe.data.labelled_spec is not None
    found = read_image_index(recipe.data.labelled_spec, progress, known=targets, grey=learned.source.grey)
    tell_reading(found, progress)
    few, labels = select_labelled(found, recipe.classes, note=progress.note)
    if evaluation is not None and (shared := len(set(evaluation.keys) & set(few.keys))):
        progress.note(f"{shared} evaluation images are also among the labelled ones: accuracy on them flatters")
    return few, labels


def with_labelled(
    dataset: DistillationDataset,
    few: ImageIndex,
    labels: NDArray[np.int64],
    recipe: Recipe,
    teacher: Callable[[TeacherConfig], Teacher],
    progress: Progress,
) -> DistillationDataset:
    """Return the lesson with a few labelled images, which the teacher sees like the others.

    Those that choose the vote are learned from nowhere, and none that teaches selects the checkpoint.
    """
    validation = hold_out(few.keys, VALIDATION)
    views = np.full(len(few), 1 + recipe.views.count)
    views[validation] = 1
    for store in dataset.store.stores:
        embed(store, few, views=views, recipe=recipe, teacher=teacher, progress=progress)
    teaching = np.setdiff1d(np.arange(len(few)), validation)
    own = replace(
        dataset,
        image_index=few,
        rows=dataset.store.rows(few.keys, views=1),
        val_indices=validation,
        train_indices=teaching,
        sample_weights=None,
    )
    kept = without(dataset.image_index, dataset.train_indices, {few.keys[position] for position in validation})
    return replace(
        dataset,
        train_indices=dataset.train_indices[kept],
        sample_weights=None if dataset.sample_weights is None else dataset.sample_weights[kept],
        val_indices=dataset.val_indices[without(dataset.image_index, dataset.val_indices, set(few.keys))],
        labelled=LabelledDataset(own, labels, first=len(dataset.image_index)),
    )


def without(image_index: ImageIndex, positions: NDArray[np.int64], barred: Container[str]) -> NDArray[np.bool_]:
    """Tell of each position whether its image is none of the ``barred``; all stay where none would."""
    kept = np.array([image_index.keys[position] not in barred for position in positions], dtype=bool)
    return kept if kept.any() else ~kept


def facts_of(images: ImageIndex) -> dict[str, Any]:
    """Return what a run's card says of its images: how many, and each unreadable one with its reason."""
    unreadable = [{"name": file.name, "reason": file.reason} for file in images.unreadable]
    return {
        "source": images.source.spec,
        "used": len(images),
        "duplicates": images.duplicates,
        "unreadable": unreadable,
        "left_out": images.source.left_out,
        "grey_range": images.source.grey,
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

"""Pseudo-labels: the teacher's answers are adjusted, described, and used to choose images before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from prgkit.config.recipe import Recipe
from prgkit.config.sections import Keep
from prgkit.data.ticks import read_ticks
from prgkit.device import best_device
from prgkit.errors import RecipeError, TargetsError
from prgkit.progress import Progress
from prgkit.storage.atomic import read_sealed, sha256, write_sealed
from prgkit.storage.quality import Statistics
from prgkit.storage.reproducible import write_array
from prgkit.storage.run import Run
from prgkit.storage.run_card import LearnedFacts
from prgkit.teacher.ensemble import TeacherEnsemble, averaged
from prgkit.teacher.refine import save_refinement
from prgkit.teacher.zero_shot import SavedAdjustment, ZeroShotClassifier, classifier_of, log_shares
from prgkit.training import statistics
from prgkit.training.corrections import compare_corrections, fit_classifier, spread
from prgkit.training.dataset import DistillationDataset, images_an_epoch, in_parts
from prgkit.training.statistics import Floats

VIEWED_TWICE = 1024  # images whose answers in two views are compared
BETA = 0.999  # of balanced class weights: from some thousand images on, more of them hardly lower a class's


def correct_and_filter(
    dataset: DistillationDataset, recipe: Recipe, progress: Progress, run: Run | None
) -> DistillationDataset:
    """Correct the teacher's answers and choose the images by its confidence, as the recipe asks; from stored features.

    What was found is in the run before it is used, and is read again when the run goes on. ``dataset`` still learns
    from every image that is not held out.

    Raises:
        TargetsError: no temperature fits, or no image is left.
    """
    config, made_from = recipe.data.keep, dataset.fingerprint()
    confidence = None
    saved = read_findings(run) if run is not None else None
    if run is not None and saved is not None and saved.made_from == made_from and is_intact(run, saved):
        known = classifier_of(run, recipe, dataset.classifier.prompts, dataset.store.logit_scale)
        dataset = replace(dataset, classifier=averaged(known, dataset.store, recipe))
        confidence = np.load(run.confidence_file) if config.asks else None
    else:
        if recipe.targets.corrects:
            dataset = replace(dataset, classifier=fit_classifier(dataset, recipe, progress))
        if config.asks:
            confidence = teacher_confidence(dataset, progress, by_class=bool(config.by_class))
        if run is not None:
            save_findings(run, made_from, dataset.classifier, recipe.classes, confidence)
    if confidence is None:
        return dataset
    chosen = sure_enough(confidence, config)
    weights = confidence[chosen] if config.weighted else None
    return replace(dataset, train_indices=dataset.train_indices[chosen], sample_weights=weights)


def save_findings(
    run: Run, made_from: str, classifier: ZeroShotClassifier, classes: Sequence[str], confidence: Floats | None
) -> None:
    """Write into the run what was found; the JSON comes last and vouches for the other files."""
    confidence_sha256 = refinement_sha256 = None
    if confidence is not None:
        write_array(run.confidence_file, confidence)
        confidence_sha256 = sha256(run.confidence_file)
    if classifier.refinement is not None:
        save_refinement(run.refinement_file, classifier.refinement)
        refinement_sha256 = sha256(run.refinement_file)
    saved = SavedAdjustment(
        made_from=made_from,
        refinement_sha256=refinement_sha256,
        confidence_sha256=confidence_sha256,
        temperature=classifier.adjustment.temperature,
        log_prior=classifier.adjustment.named(classes),
    )
    write_sealed(run.answers_file, saved.model_dump(mode="json"))


def confidence_of(run: Run, *, images: int) -> Floats:
    """Return how sure the teacher is of each of the ``images`` [images] that a run may learn from.

    Raises:
        TargetsError: the run's file is missing or damaged, or of other images.
    """
    path, fix = run.confidence_file, "distil again into a new run; what needs no --int8 can be exported as it is"
    saved = read_findings(run)
    if saved is None or saved.confidence_sha256 is None or not is_intact(run, saved):
        raise TargetsError(f"{path.name} is missing, or is not what the run wrote", where=path, fix=fix)
    confidence: Floats = np.load(path)
    if len(confidence) != images:
        raise TargetsError(f"{path.name} is of {len(confidence):,} images, not of {images:,}", where=path, fix=fix)
    return confidence


def read_findings(run: Run) -> SavedAdjustment | None:
    """Return what was found of a run's images before, where anything was."""
    return SavedAdjustment.model_validate(read_sealed(run.answers_file)) if run.answers_file.exists() else None


def is_intact(run: Run, saved: SavedAdjustment) -> bool:
    """Tell whether the run's other files of its answers, if it has any, are what was written."""
    written = ((run.confidence_file, saved.confidence_sha256), (run.refinement_file, saved.refinement_sha256))
    return all(digest is None or (file.exists() and sha256(file) == digest) for file, digest in written)


def teacher_confidence(dataset: DistillationDataset, progress: Progress, *, by_class: bool = False) -> Floats:
    """Return how sure the teacher is of each learned image [learned]: the largest probability in its answer."""
    progress.start("confidence", len(dataset.train_indices), "img")
    parts, labels = [], []
    for output in replace(dataset, classifier=dataset.classifier.to(best_device())).evaluation_outputs():
        parts.append(output.logits.softmax(dim=1).amax(dim=1).cpu())
        labels.append(output.labels.cpu())
        progress.advance(len(labels[-1]))
    confidence: Floats = torch.cat(parts).numpy()
    return within_class(confidence, torch.cat(labels).numpy()) if by_class else confidence


def within_class(confidence: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return confidences [n] divided by b / (2 - b), to at most 1: b is the class's images over the largest class's.

    So a floor tau becomes one of tau * b / (2 - b) for each class, as in KD3 (Tang et al., ICCV 2023, after FlexMatch):
    rare classes stay in, which one floor for all would empty.
    """
    counts = np.bincount(labels)
    share = (counts / counts.max())[labels]
    relative: Floats = np.minimum(1, confidence / (share / (2 - share))).astype(np.float32)
    return relative


def class_weights(
    asked: str | Mapping[str, float], labels: NDArray[np.int64], shares: Floats | None, *, classes: int
) -> Floats:
    """Return what an image of each class counts [C], such that the images learned from count 1 on average.

    Balanced is 1 / E, E = (1 - beta^n) / (1 - beta) the effective number of a class's n images (Cui et al., CVPR 2019,
    arXiv 1901.05555): nearly n of a rare class, at most 1 / (1 - beta). Of a class that has none it is 1.

    Args:
        asked: "balanced", or a weight of each class in label order.
        labels: the pseudo-class of each image that is learned from [n].
        shares: of the epochs that each image is in [n]; None: all are in each.
        classes: C.

    Raises:
        RecipeError: no class of a weight above 0 has an image.
    """
    counts = np.bincount(labels, weights=shares, minlength=classes).astype(float)
    if isinstance(asked, str):
        effective = (1 - BETA**counts) / (1 - BETA)
        weights = np.divide(1, effective, out=np.zeros(classes), where=counts > 0)
    else:
        weights = np.array([*asked.values()], dtype=float)
    total = weights @ counts
    if total == 0:
        raise RecipeError(
            "no image is learned from: the teacher names none of the classes that have a weight above 0",
            where="training.class_weights",
            fix="give the classes that it names a weight",
        )
    weights *= counts.sum() / total
    if isinstance(asked, str):
        weights[counts == 0] = 1
    return weights.astype(np.float32)


def report_selection(
    dataset: DistillationDataset, keep: Keep, unsure: int, progress: Progress, run: Run | None
) -> None:
    """Say how many images are learned from, and write it into the run's card; ``unsure`` ones were dropped."""
    labelled = len(dataset.image_index) - len(dataset.val_indices) - len(dataset.train_indices) - unsure
    below = f"{unsure:,} below a confidence of {keep.min_confidence}" if keep.min_confidence else "none dropped"
    if labelled:
        below += f", {labelled:,} left to the labelled ones"
    weighted = f"; weighted by confidence, {dataset.images_an_epoch:,} an epoch" if keep.weighted else ""
    progress.note(
        f"learning from {len(dataset.train_indices):,} of {len(dataset.image_index):,} images: "
        f"{len(dataset.val_indices):,} held out, {below}{weighted}"
    )
    if run is not None:
        run.update_card(
            learned=LearnedFacts(
                images=len(dataset.train_indices),
                held_out=len(dataset.val_indices),
                dropped=unsure,
                an_epoch=dataset.images_an_epoch,
            )
        )


def report_statistics(
    dataset: DistillationDataset, recipe: Recipe, progress: Progress, run: Run | None, *, like: Run | None
) -> None:
    """Say how far the pseudo-labels can be trusted, and write it into the run; ticks are read from ``like``, too."""
    source = run or like
    ticks = read_ticks(source.ticks_file, recipe.classes) if source is not None and source.ticks_file.exists() else []
    progress.note("fitting every correction of the teacher's answers, to compare them")
    corrections = compare_corrections(dataset, recipe, ticks)
    result = report_answers(dataset, recipe, progress).model_copy(update={"corrections": corrections})
    if corrections:
        progress.note("corrections of these answers (targets in the recipe), none of which needs a label:")
    for line in statistics.corrections_table(corrections) if corrections else []:
        progress.note(f"  {line}".rstrip())
    if run is not None:
        write_sealed(run.quality_file, result.model_dump(mode="json", by_alias=True, exclude_unset=True))


def report_answers(dataset: DistillationDataset, recipe: Recipe, progress: Progress) -> Statistics:
    """Say how far the pseudo-labels can be trusted as they are, and return it; the evaluation views are enough."""
    result = pseudo_label_statistics(dataset, recipe)
    for doubt in result.doubts:
        progress.note(
            f"the teacher's answers look like chance: {doubt}; a student of them learns nothing, so look at the "
            "teacher, its weights and the class names first"
        )
    progress.note("the teacher's answers:")
    for name, line in statistics.summarise(result):
        progress.note(f"  {name:<12}{line}")
    return result


def pseudo_label_statistics(dataset: DistillationDataset, recipe: Recipe) -> Statistics:
    """Return what there is to know of the pseudo-labels, from a sample of at most MOST_IMAGES evaluation views."""
    positions = spread(len(dataset.image_index), statistics.MOST_IMAGES)
    classifier = dataset.classifier
    feature_parts, logit_parts, cosine_parts, template_labels = [], [], [], []
    for rows in in_parts(dataset.rows[positions]):
        feature_parts.append(dataset.store.features(rows, np.zeros(len(rows), dtype=int)))
        per_prompt = classifier.per_prompt(feature_parts[-1])  # [part, M, C]
        combined, averages = classifier.combine(per_prompt), classifier.average is not None
        logit_parts.append(classifier.raw_logits(feature_parts[-1]) if averages else combined)
        cosine_parts.append(combined.amax(dim=1) / classifier.logit_scale)
        template_labels.append(per_prompt.argmax(dim=2).T)  # [M, part]
    joined, raw_logits = torch.cat(feature_parts), torch.cat(logit_parts)
    features, vectors = joined.numpy(), classifier.class_vectors().numpy()
    logits = classifier.correct(joined, raw_logits).numpy()
    result = statistics.compute_statistics(
        features,
        logits,
        cosines=torch.cat(cosine_parts).numpy(),
        classes=recipe.classes,
        templates=statistics.template_agreement(
            torch.cat(template_labels, dim=1).numpy(), raw_logits.argmax(dim=1).numpy(), recipe.templates
        ),
        names=[dataset.image_index.source.name(int(index)) for index in dataset.image_index.indices[positions]],
    )
    images = len(dataset.image_index)
    update: dict[str, object] = {"sampled_from": images} if len(positions) < images else {}
    update |= {
        "doubts": statistics.find_doubts(features, raw_logits.numpy(), vectors, two_views(dataset)),
        "read_as_one": statistics.find_read_as_one(vectors, recipe.classes),
    }
    if dataset.class_weights is not None:
        weights = zip(recipe.classes, dataset.class_weights, strict=True)
        update["class_weights"] = {name: round(float(weight), 4) for name, weight in weights}
    if recipe.targets.corrects:
        update["correction"] = statistics.adjustment_effect(
            raw_logits.numpy(), logits, recipe.targets, temperature=classifier.adjustment.temperature
        )
    if isinstance(dataset.store, TeacherEnsemble):
        update["teachers"] = statistics.measure_disagreement(
            torch.cat([classifier.each_teacher(part).argmax(dim=2) for part in feature_parts], dim=1).numpy(),
            raw_logits.argmax(dim=1).numpy(),
            teachers=[store.config.name for store in dataset.store.stores],
            classes=recipe.classes,
        )
    if classifier.average is not None:
        shares = log_shares(classifier.each_teacher(joined), classifier.average).exp().mean(dim=1)
        names = [store.config.name for store in dataset.store.stores]
        update["teacher_shares"] = {name: round(float(share), 4) for name, share in zip(names, shares, strict=True)}
    return result.model_copy(update=update)


def two_views(dataset: DistillationDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the classes that the teacher names of some learned images in their evaluation view, and in a crop.

    Images of which it has seen no crop are passed over.
    """
    keys = [dataset.image_index.keys[position] for position in dataset.train_indices]
    cropped = dataset.train_indices[(dataset.store.rows(keys, views=2).reshape(len(keys), -1) >= 0).all(axis=1)]
    positions = cropped[spread(len(cropped), VIEWED_TWICE)]
    first, second = (
        dataset.classifier.raw_logits(dataset.store.features(dataset.rows[positions], np.full(len(positions), view)))
        for view in (0, 1)
    )
    return first.argmax(dim=1).numpy(), second.argmax(dim=1).numpy()


def sure_enough(confidence: NDArray[np.float32], config: Keep) -> NDArray[np.bool_]:
    """Return which images [n] are learned from.

    Raises:
        TargetsError: fewer than two images an epoch are left.
    """
    chosen: NDArray[np.bool_] = confidence >= config.min_confidence
    left = images_an_epoch(confidence[chosen]) if config.weighted else int(chosen.sum())
    if left < 2:
        raise TargetsError(
            f"{('no image is', 'only one image is')[left]} left to learn from: the teacher's confidence is at most "
            f"{float(confidence.max()):.2f}",
            where=f"data.keep.min_confidence: {config.min_confidence}",
            fix="lower it, or give class names and prompts that fit the images better",
        )
    return chosen

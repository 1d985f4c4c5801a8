"""How far the teacher's answers are trusted: corrected, told of and chosen by before anyone learns from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.recipe import Keep, Recipe
from prgkit.device import best_device
from prgkit.errors import TargetsError
from prgkit.progress import Watch
from prgkit.storage.atomic import read_sealed, sha256, write_bytes, write_sealed
from prgkit.storage.run import Run
from prgkit.teacher.ensemble import JointTargets
from prgkit.teacher.zero_shot import Answers, answers_of, fit_correction
from prgkit.training import statistics
from prgkit.training.selection import sure_enough

if TYPE_CHECKING:
    from prgkit.training.dataset import Lesson

PART = 256  # images whose answers are computed at once
VIEWED_TWICE = 1024  # images whose answers in two views are compared


def put_right(lesson: Lesson, recipe: Recipe, watch: Watch, run: Run | None) -> Lesson:
    """Correct the answers and choose the images by them, as the recipe asks; all from features that are stored.

    What was found is in the run before it is used, and is read again when the run goes on. ``lesson`` still learns
    from every image that is not held out.

    Raises:
        TargetsError: no temperature fits, or no image is left.
    """
    page, made_from = recipe.data.keep, lesson.fingerprint()
    confidence = None
    if run is not None and found_before(run, made_from):
        known = answers_of(run, recipe, lesson.answers.prompts, lesson.targets.logit_scale)
        lesson = replace(lesson, answers=known)
        confidence = np.load(run.confidence_file) if page.asks else None
    else:
        if recipe.targets.corrects:
            sample = lesson.learned[spread(len(lesson.learned), max(statistics.MOST_IMAGES, 20 * len(recipe.classes)))]
            correction = fit_correction(uncorrected_logits(lesson, sample), recipe.targets)
            lesson = replace(lesson, answers=replace(lesson.answers, correction=correction))
        if page.asks:
            confidence = ask_confidence(lesson, watch)
        if run is not None:
            keep_found(run, made_from, lesson.answers.correction.to_dict(recipe.classes), confidence)
    if confidence is None:
        return lesson
    chosen = sure_enough(confidence, page)
    return replace(lesson, learned=lesson.learned[chosen], shares=confidence[chosen] if page.weighted else None)


def keep_found(run: Run, made_from: str, correction: dict[str, Any], confidence: NDArray[np.float32] | None) -> None:
    """Write into the run what was found; the JSON comes last and vouches for the array."""
    digest = None
    if confidence is not None:
        buffer = io.BytesIO()
        np.save(buffer, confidence, allow_pickle=False)
        write_bytes(run.confidence_file, buffer.getvalue())
        digest = sha256(run.confidence_file)
    write_sealed(run.answers_file, {"made_from": made_from, "confidence_sha256": digest, **correction})


def confidence_of(run: Run, *, images: int) -> NDArray[np.float32]:
    """Return how sure the teacher is of each of the ``images`` [images] that a run may learn from.

    Raises:
        TargetsError: the run's file is missing or damaged, or of other images.
    """
    path, fix = run.confidence_file, "distil again into a new run; what needs no --int8 can be exported as it is"
    digest = read_sealed(run.answers_file)["confidence_sha256"] if run.answers_file.exists() else None
    if digest is None or not path.exists() or sha256(path) != digest:
        raise TargetsError(f"{path.name} is missing, or is not what the run wrote", where=path, fix=fix)
    confidence: NDArray[np.float32] = np.load(path)
    if len(confidence) != images:
        raise TargetsError(f"{path.name} is of {len(confidence):,} images, not of {images:,}", where=path, fix=fix)
    return confidence


def found_before(run: Run, made_from: str) -> bool:
    """Tell whether the run holds, undamaged, what was found of these very images."""
    if not run.answers_file.exists():
        return False
    known = read_sealed(run.answers_file)
    digest = known["confidence_sha256"]
    intact = digest is None or (run.confidence_file.exists() and sha256(run.confidence_file) == digest)
    return bool(known["made_from"] == made_from and intact)


def uncorrected_logits(lesson: Lesson, positions: NDArray[np.int64]) -> Tensor:
    """Return what the teacher says by itself of the evaluation views: W [positions, C], on the CPU."""
    device = best_device()
    answers = lesson.answers.to(device)
    parts = np.array_split(lesson.rows[positions], max(1, len(positions) // PART))
    features = (lesson.targets.features(part, np.zeros(len(part), dtype=int)) for part in parts)
    return torch.cat([answers.uncorrected(part.to(device)).cpu() for part in features])


def ask_confidence(lesson: Lesson, watch: Watch) -> NDArray[np.float32]:
    """Return how sure the teacher is of each learned image [learned]: the largest probability in its answer."""
    watch.start("confidence", len(lesson.learned), "img")
    found = []
    for start in range(0, len(lesson.learned), 16 * PART):
        logits = uncorrected_logits(lesson, lesson.learned[start : start + 16 * PART])
        found.append(lesson.answers.correction.apply(logits).softmax(dim=1).amax(dim=1))
        watch.advance(len(logits))
    confidence: NDArray[np.float32] = torch.cat(found).numpy()
    return confidence


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most ``most`` evenly spaced places of ``count``: a catalogue is ordered by content, so by chance."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def tell_learned(lesson: Lesson, keep: Keep, watch: Watch, run: Run | None) -> None:
    """Say how many images are learned from, and write it into the run's card."""
    dropped = len(lesson.catalogue) - len(lesson.held_out) - len(lesson.learned)
    facts = {
        "images": len(lesson.learned),
        "held_out": len(lesson.held_out),
        "dropped": dropped,
        "an_epoch": lesson.images_an_epoch,
    }
    below = f"{dropped:,} below a confidence of {keep.min_confidence}" if keep.min_confidence else "none dropped"
    weighted = f"; weighted by confidence, {lesson.images_an_epoch:,} an epoch" if keep.weighted else ""
    watch.note(
        f"learning from {len(lesson.learned):,} of {len(lesson.catalogue):,} images: "
        f"{len(lesson.held_out):,} held out, {below}{weighted}"
    )
    if run is not None:
        run.update_card(learned=facts)


def tell_quality(lesson: Lesson, recipe: Recipe, watch: Watch, run: Run | None) -> None:
    """Say how far the pseudo-labels can be trusted, and keep it in the run."""
    positions = spread(len(lesson.catalogue), statistics.MOST_IMAGES)
    correction, scale = lesson.answers.correction, lesson.targets.logit_scale
    features, logits, template_labels = [], [], []
    for part in np.array_split(lesson.rows[positions], max(1, len(positions) // PART)):
        features.append(lesson.targets.features(part, np.zeros(len(part), dtype=int)))
        per_prompt = lesson.answers.per_prompt(features[-1])  # [part, M, C]
        logits.append(lesson.answers.combine(per_prompt))
        template_labels.append(correction.apply(per_prompt).argmax(dim=2).T)  # [M, part]
    by_itself = torch.cat(logits)
    corrected = correction.apply(by_itself).numpy()
    found = statistics.assess(
        torch.cat(features).numpy(),
        corrected,
        torch.cat(template_labels, dim=1).numpy(),
        cosines=(by_itself.amax(dim=1) / scale).numpy(),
        classes=recipe.classes,
        templates=recipe.templates,
        names=[lesson.catalogue.images.name(int(index)) for index in lesson.catalogue.indices[positions]],
    )
    vectors = lesson.answers.class_vectors().numpy()
    found["doubts"] = statistics.doubts(torch.cat(features).numpy(), by_itself.numpy(), vectors, two_views(lesson))
    found["read_as_one"] = statistics.read_as_one(vectors, recipe.classes)
    if recipe.targets.corrects:
        found["correction"] = {
            "debias": recipe.targets.debias,
            "entropy": recipe.targets.entropy,
            "temperature": correction.temperature,
            **statistics.changes(by_itself.numpy(), corrected),
        }
    if isinstance(lesson.targets, JointTargets):
        found["teachers"] = statistics.disagreement(
            labels_alone(lesson.targets, lesson.answers, features),
            by_itself.argmax(dim=1).numpy(),
            teachers=[store.page.name for store in lesson.targets.stores],
            classes=recipe.classes,
        )
    for doubt in found["doubts"]:
        watch.note(
            f"the teacher's answers look like chance: {doubt}; a student of them learns nothing, so look at the "
            "teacher, its weights and the class names first"
        )
    watch.note("the teacher's answers:")
    for name, line in statistics.summary(found):
        watch.note(f"  {name:<12}{line}")
    if run is not None:
        write_sealed(run.quality_file, found)


def two_views(lesson: Lesson) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the classes that the teacher names of some learned images in their evaluation view, and in a crop."""
    positions = lesson.learned[spread(len(lesson.learned), VIEWED_TWICE)]
    first, second = (
        lesson.answers.uncorrected(lesson.targets.features(lesson.rows[positions], np.full(len(positions), view)))
        for view in (0, 1)
    )
    return first.argmax(dim=1).numpy(), second.argmax(dim=1).numpy()


def labels_alone(targets: JointTargets, answers: Answers, features: Sequence[Tensor]) -> NDArray[np.int64]:
    """Return the class that each of K teachers names by itself, uncorrected: [K, n], for joint features in parts."""
    each, parts = targets.alone(answers), [targets.split(part) for part in features]
    said = [torch.cat([one.uncorrected(part[place]).argmax(dim=1) for part in parts]) for place, one in enumerate(each)]
    labels: NDArray[np.int64] = torch.stack(said).numpy()
    return labels

"""What an export takes from a run: its best student, images it never learned from, the teacher's answers."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import Recipe, TeacherConfig
from prgkit.data.index import ImageIndex, Preprocessing, labelled, read_image_index, trimmed
from prgkit.data.snapshot import only_members
from prgkit.data.ticks import audited_keys, bring_ticks
from prgkit.device import best_device
from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import alone_in
from prgkit.export.bundle.manifest import Manifest, RunFacts, StudentFacts, TeacherFacts
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.student_export import CalibrationSet
from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student
from prgkit.progress import Progress
from prgkit.storage.atomic import sha256
from prgkit.storage.locks import locked
from prgkit.storage.run import TICKS, Run
from prgkit.student.model import Student, load_student, student_facts
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.ensemble import existing_targets, open_targets
from prgkit.teacher.feature_store import embed
from prgkit.teacher.zero_shot import ZeroShotClassifier, answers_of, no_adjustment
from prgkit.training.prepare import grey_of, hold_out
from prgkit.training.pseudo_labels import confidence_of
from prgkit.training.selection import sure_enough

PARITY_IMAGES = 256
GOLDEN_IMAGES = 16
GOLDEN_CANDIDATES = 64
GOLDEN_SIDE = 1024  # of the shorter side: sixteen photographs of 24 megapixels would be most of a bundle


def export_run(run: Run, options: ExportOptions, *, progress: Progress) -> Manifest:
    """Export a run's best student into ``<run>/bundle`` and return the manifest.

    What the recipe says of exports takes the place of the options' ``opset`` and ``fidelity``, and of those that are
    None; ``evaluation_images`` takes the place of the recipe's, also in the recipe that the manifest holds.

    Raises:
        PrgkitError: the run has no student or is being worked on, an artifact disagrees with PyTorch, or a backend is
            missing.
    """
    with locked(run.folder, "run"), alone_in(run.bundle):
        recipe, asked = run.recipe, options.evaluation_images
        if asked is not None:
            export = recipe.export.model_copy(update={"evaluation_images": asked})
            recipe = recipe.model_copy(update={"export": export})
        export = recipe.export
        options = replace(options, opset=export.opset, fidelity=export.fidelity, batch=options.batch or export.batch)
        check_vocabulary(recipe, options)
        manifest = export_best(run, recipe, options, progress)
    if asked is not None and (images := manifest.evaluation.images) < asked:
        progress.note(f"there are {images} images to evaluate on; {asked} were asked for")
    return manifest


def export_best(run: Run, recipe: Recipe, options: ExportOptions, progress: Progress) -> Manifest:
    """Gather what the bundle is made from, and make it."""
    student = load_student(run)
    if not run.finished:
        epoch = student_facts(run.weights)["epoch"]
        progress.note(f"the run is not finished: this is its best student so far, of epoch {epoch}")
    seen = existing_targets(recipe, run.target_stores[0].parent) or ()
    grey, classes = grey_of(run), None
    if recipe.data.evaluation:
        labelled_images = read_image_index(recipe.data.evaluation, recipe, progress, known=seen, grey=grey)
        images, classes = labelled(labelled_images, recipe.classes, note=progress.note)
    else:
        images = images_of(run, recipe, seen, progress)
    positions = evaluation_positions(images, recipe, first=audited_keys(run))
    teacher = ask_teacher(run, recipe, images, positions, progress)
    if options.class_vectors and student.scorer is None:
        student.score_by(teacher.classifier.class_vectors(), teacher.classifier.logit_scale)
    preprocessing = replace(student.preprocessing, grey_range=grey)
    prepare = preprocessing.prepare
    checked = [prepare(picture) for picture in parity_pictures(run, images, positions, recipe, seen, progress)]
    if len(checked) < PARITY_IMAGES:
        progress.note(f"there are {len(checked)} images to compare the exports on; {PARITY_IMAGES} would be better")
    evaluation = EvaluationSet(
        prepared=(prepare(images.read(int(position))) for position in positions),
        teacher_logits=teacher.weighted,
        teacher_uniform_logits=teacher.uniform,
        labels=None if classes is None else classes[positions],
        source=images.images.spec,
        keys=tuple(images.keys[position] for position in positions),
        teacher_features=teacher.features if student.scorer else None,
    )
    manifest = export_student(
        TrainedStudent(student.deployed(), recipe.classes, preprocessing, origin_of_student(run, recipe, student)),
        ExportImages(
            np.stack(checked),
            golden_pictures(images, positions),
            evaluation,
            cache(lambda: calibration_set(run, images, positions, preprocessing, recipe, seen, progress)),
        ),
        run.bundle,
        options,
        note=progress.note,
    )
    bring_ticks(run.ticks_file, run.bundle / TICKS, recipe.classes)
    return manifest


def origin_of_student(run: Run, recipe: Recipe, student: Student) -> StudentOrigin:
    """Return what the manifest says of the run, the recipe, the teacher and the student."""
    card = run.card
    facts = card["student"] if student.scorer is None else student.facts(recipe.student)
    return StudentOrigin(
        run=RunFacts(
            name=run.name,
            fingerprint=card["fingerprint"],
            student_sha256=sha256(run.weights),
            objective=recipe.objective_name,
            learned_labels=recipe.learns_labels or any(config.context for config in recipe.teacher),
            epochs=recipe.training.epochs,
            best_epoch=student_facts(run.weights)["epoch"],
            images=card["images"]["used"],
            training=tuple(run.metrics()),
            quality=run.quality(),
        ),
        recipe=recipe.model_dump(mode="json"),
        teacher=TeacherFacts(**{key: card["teacher"][key] for key in ("model", "weights", "fingerprint")}),
        student=StudentFacts(
            **{key: facts[key] for key in ("model", "initial", "parameters")}, image_size=recipe.student.image_size
        ),
        templates=tuple(recipe.templates),
    )


def evaluation_positions(images: ImageIndex, recipe: Recipe, *, first: Container[str] = ()) -> NDArray[np.int64]:
    """Return which images travel: labelled ones where the recipe names them, else those held out from training.

    Where there are more than travel, those with the keys in ``first`` go before the others. The catalogue is ordered by
    content key, so the first ones are a random sample.
    """
    chosen = np.arange(len(images)) if recipe.data.evaluation else hold_out(images.keys, recipe.data.held_out)
    before = np.array([images.keys[position] in first for position in chosen], dtype=bool)
    return np.sort(np.concatenate([chosen[before], chosen[~before]])[: recipe.export.evaluation_images])


def images_of(run: Run, recipe: Recipe, seen: Container[str], progress: Progress) -> ImageIndex:
    """Read the images that a run was made from, as far as they are still there."""
    return only_members(
        read_image_index(recipe.data.images, recipe, progress, known=seen, grey=grey_of(run)), run, progress
    )


def parity_pictures(
    run: Run, images: ImageIndex, positions: NDArray[np.int64], recipe: Recipe, seen: Container[str], progress: Progress
) -> Iterator[Image.Image]:
    """Yield up to `PARITY_IMAGES` distinct pictures: the ones that travel, then others, then ones learned from.

    Two runtimes are compared on them, not a student and a truth, so having learned from them does no harm.
    """
    order = [*positions.tolist(), *np.setdiff1d(np.arange(len(images)), positions).tolist()][:PARITY_IMAGES]
    for position in order:
        yield images.read(position)
    if len(order) < PARITY_IMAGES and recipe.data.evaluation:
        taken = set(images.keys)
        learned = images_of(run, recipe, seen, progress)
        others = (position for position, key in enumerate(learned.keys) if key not in taken)
        for position in islice(others, PARITY_IMAGES - len(order)):
            yield learned.read(position)


def calibration_set(
    run: Run,
    images: ImageIndex,
    positions: NDArray[np.int64],
    preprocessing: Preprocessing,
    recipe: Recipe,
    seen: Container[str],
    progress: Progress,
) -> CalibrationSet:
    """Return the images that the student learned from, for INT8's ranges.

    None of them travels, and none selected the student: INT8 is judged on images that it was not fitted to.
    """
    image_index, apart = images, {images.keys[position] for position in positions.tolist()}
    if recipe.data.evaluation:
        image_index = images_of(run, recipe, seen, progress)
    places = np.setdiff1d(np.arange(len(image_index)), hold_out(image_index.keys, recipe.data.held_out))
    if recipe.data.keep.asks:
        places = places[sure_enough(confidence_of(run, images=len(places)), recipe.data.keep)]
    chosen = [place for place in places.tolist() if image_index.keys[place] not in apart]
    return CalibrationSet(
        images=len(chosen),
        read=lambda places: np.stack([preprocessing.prepare(image_index.read(chosen[place])) for place in places]),
    )


def golden_pictures(images: ImageIndex, positions: NDArray[np.int64]) -> list[Image.Image]:
    """Return `GOLDEN_IMAGES` pictures of moderate size; where there are too few of those, large ones are shrunk."""
    moderate: list[Image.Image] = []
    shrunk: list[Image.Image] = []
    for position in positions[:GOLDEN_CANDIDATES].tolist():
        picture = trimmed(images.read(position))
        factor = GOLDEN_SIDE / min(picture.size)
        if factor >= 1:
            moderate.append(picture)
        elif len(shrunk) < GOLDEN_IMAGES:
            width, height = (max(1, round(factor * side)) for side in picture.size)
            shrunk.append(picture.resize((width, height), Image.Resampling.LANCZOS))
        if len(moderate) == GOLDEN_IMAGES:
            break
    return [*moderate, *shrunk][:GOLDEN_IMAGES]


def teacher_logits(
    run: Run, recipe: Recipe, images: ImageIndex, positions: NDArray[np.int64], progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return W [n, C] of the evaluation view twice: as the student learned it, and as the teacher says it by itself."""
    answers = ask_teacher(run, recipe, images, positions, progress)
    return answers.weighted, answers.uniform


class TeacherAnswers(NamedTuple):
    """What the teacher says of n images, and what it says it with."""

    weighted: NDArray[np.float32]  # W [n, C] as the student learned it, corrected where the run corrects
    uniform: NDArray[np.float32]  # W [n, C] as the teacher says it by itself, its prompts weighted equally
    features: NDArray[np.float32]  # I [n, D]
    classifier: ZeroShotClassifier


def ask_teacher(
    run: Run, recipe: Recipe, images: ImageIndex, positions: NDArray[np.int64], progress: Progress
) -> TeacherAnswers:
    """Return what the teacher says of the evaluation view of some images."""

    @cache
    def teacher(config: TeacherConfig) -> Teacher:  # asked only where the run's targets are gone
        progress.note(f"loading the teacher {config.model}")
        return load_teacher(config, best_device())

    targets = open_targets(recipe, run.target_stores[0].parent, teacher)
    if targets.facts()["fingerprint"] != run.card["teacher"]["fingerprint"]:
        raise ExportError(
            f"the teacher, or its learned context, is not the one that the student learned from: {recipe.teacher_name}",
            where=run.folder,
            fix="put the old one back, or distil again into a new run",
        )
    for store in targets.stores:
        embed(store, images, views=np.ones(len(images), dtype=int), recipe=recipe, teacher=teacher, progress=progress)
    prompts = targets.prompts(recipe.classes, recipe.templates, teacher)
    answers = answers_of(run, recipe, prompts, targets.logit_scale)
    rows = targets.rows([images.keys[position] for position in positions], views=1)
    features = targets.features(rows, np.zeros(len(rows), dtype=int))
    return TeacherAnswers(*weighted_and_uniform(answers, features), features.numpy(), answers)


def weighted_and_uniform(
    answers: ZeroShotClassifier, features: torch.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the teacher's answer W [n, C] to features I [n, D] twice: as it is given, and as said by itself."""
    classes = answers.prompts.shape[1]
    by_itself = replace(answers, prompt_weighting="mean", correction=no_adjustment(classes))
    parts = torch.split(features, 256)
    weighted, uniform = ([classifier.logits(part) for part in parts] for classifier in (answers, by_itself))
    return torch.cat(weighted).numpy(), torch.cat(uniform).numpy()


def check_vocabulary(recipe: Recipe, options: ExportOptions) -> None:
    """Refuse class vectors where the student's features are not the teacher's, or as an input of engines.

    A projector that was trained is not enough: rkd and crd hold relations between images, in any space.

    Raises:
        ExportError: says what to do instead.
    """
    if options.class_vectors and not any(config.aligns_features for config in recipe.objective):
        able = [name for name, config in OBJECTIVES.items() if config(name=name).aligns_features]  # type: ignore[call-arg]
        raise ExportError(
            f"{recipe.objective_name} does not draw the student's features to the teacher's, so class vectors cannot "
            "score them",
            fix=f"distil with one of {', '.join(able)}, or export without --open-vocabulary",
        )
    if options.class_vectors == "input" and options.trt:
        raise ExportError(
            "engines hold their class vectors; they cannot take them as an input",
            fix="export --open-vocabulary --trt; after prgkit relabel, export --trt in the bundle builds them again",
        )

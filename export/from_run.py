"""What an export takes from a run: its best student, images it never learned from, the teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import Recipe
from prgkit.data.index import ImageIndex, read_image_index, select_labelled
from prgkit.data.preprocessing import Preprocessing, trimmed
from prgkit.data.snapshot import load_snapshot, restrict_to_snapshot
from prgkit.data.ticks import audited_keys, bring_ticks, ticks_in
from prgkit.errors import ExportError, ImagesError
from prgkit.export.bundle.artifact_cache import alone_in, manifest_of
from prgkit.export.bundle.manifest import Manifest, RunFacts, StudentFacts, TeacherFacts
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.student_export import CalibrationSet
from prgkit.export.formats.tensorrt import refuse_input
from prgkit.export.pipeline import (
    EvaluationSet,
    ExportImages,
    HeldOutSet,
    StudentOrigin,
    TrainedStudent,
    export_student,
)
from prgkit.progress import Progress
from prgkit.storage.atomic import sha256
from prgkit.storage.locks import locked
from prgkit.storage.run import TICKS, Run
from prgkit.student.model import Student, load_student, student_facts
from prgkit.teacher.answers import teacher_answers
from prgkit.teacher.ensemble import as_learned, existing_targets
from prgkit.training.prepare import grey_of, hold_out, without
from prgkit.training.pseudo_labels import confidence_of, sure_enough

PARITY_IMAGES = 256
GOLDEN_IMAGES = 16
GOLDEN_CANDIDATES = 64
GOLDEN_SIDE = 1024  # of the shorter side: sixteen photographs of 24 megapixels would be most of a bundle


def export_run(run: Run, options: ExportOptions, *, progress: Progress) -> Manifest:
    """Export a run's best student into ``<run>/bundle`` and return the manifest.

    What the recipe says of exports takes the place of the options' ``opset`` and ``margin``, and of those that are
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
        options = settle_options(recipe, options)
        tell_other_classes(run, recipe, options, progress)
        manifest = export_best(run, recipe, options, progress)
    if asked is not None and (images := manifest.evaluation.images) < asked:
        progress.note(f"there are {images} images to evaluate on; {asked} were asked for")
    return manifest


def settle_options(recipe: Recipe, options: ExportOptions) -> ExportOptions:
    """Return the options with what the recipe says of exports.

    Raises:
        ExportError: the student that the recipe describes cannot be exported so.
    """
    export = recipe.export
    options = replace(options, opset=export.opset, margin=export.margin, batch=options.batch or export.batch)
    if options.embedding and options.class_vectors is None:
        options = replace(options, class_vectors="initializer")
    check_vocabulary(recipe, options)
    return options


def tell_other_classes(run: Run, recipe: Recipe, options: ExportOptions, progress: Progress) -> None:
    """Say of a bundle that was given other classes that it is about to lose them."""
    before = manifest_of(run.bundle)
    if before is None or before.relabelled is None or before.classes == tuple(recipe.classes):
        return
    again = "relabel" if options.class_vectors else "export --open-vocabulary relabel"
    progress.note(
        f"the bundle has had other classes since {before.relabelled[:10]}; this export gives it the run's again: "
        f"prgkit {again} --classes FILE gives the others back"
    )


def export_best(run: Run, recipe: Recipe, options: ExportOptions, progress: Progress) -> Manifest:
    """Gather what the bundle is made from, and make it."""
    student = load_student(run)
    if not run.finished:
        progress.note(
            f"the run is not finished: this is its best student so far, of epoch {student_facts(run.weights).epoch}"
        )
    root = run.target_stores[0].parent
    seen = existing_targets(as_learned(recipe, run, root), root) or ()
    grey, classes = grey_of(run), None
    learned = cache(lambda: images_of(run, recipe, seen, progress))
    if spec := recipe.data.evaluation_spec:
        labelled_images = read_image_index(spec, progress, known=seen, grey=grey)
        images, classes = select_labelled(labelled_images, recipe.classes, note=progress.note)
    else:
        images = learned()
    positions = evaluation_positions(
        images, recipe, labelled=classes is not None, first=audited_keys(run), learned=labelled_keys(run)
    )
    teacher = teacher_answers(run, recipe, images, positions, progress)
    if options.class_vectors and student.scorer is None:
        student.use_class_vectors(*teacher.classifier.scoring())
    preprocessing = replace(student.preprocessing, grey_range=grey)
    prepare = preprocessing.prepare
    checked = [prepare(picture) for picture in parity_pictures(images, positions, recipe, learned)]
    if len(checked) < PARITY_IMAGES:
        progress.note(f"there are {len(checked)} images to compare the exports on; {PARITY_IMAGES} would be better")
    evaluation = EvaluationSet(
        prepared=(prepare(images.read(int(position))) for position in positions),
        teacher_logits=teacher.logits,
        teacher_uniform_logits=teacher.uniform_logits,
        labels=None if classes is None else classes[positions],
        source=images.source.spec,
        keys=tuple(images.keys[position] for position in positions),
        teacher_features=teacher.features if student.scorer else None,
    )
    manifest = export_student(
        TrainedStudent(
            student.inference_model(), recipe.classes, preprocessing, origin_of_student(run, recipe, student)
        ),
        ExportImages(
            np.stack(checked),
            golden_pictures(images, positions),
            evaluation,
            cache(lambda: calibration_set(run, images, positions, preprocessing, recipe, learned)),
            held_out_set(run, recipe, evaluation, learned, preprocessing, progress),
        ),
        run.bundle,
        options,
        note=progress.note,
    )
    bring_ticks(run.ticks_file, run.bundle / TICKS, recipe.classes)
    return manifest


def origin_of_student(run: Run, recipe: Recipe, student: Student) -> StudentOrigin:
    """Return what the manifest says of the run, the recipe, the teacher and the student."""
    facts = run.student_facts
    before = facts.initial_run is not None and facts.initial_run.learned_labels
    return StudentOrigin(
        run=RunFacts(
            name=run.name,
            fingerprint=run.card.fingerprint,
            student_sha256=sha256(run.weights),
            objective=recipe.objective_name,
            learned_labels=recipe.uses_labels or before,
            epochs=recipe.training.epochs,
            best_epoch=student_facts(run.weights).epoch,
            images=run.image_facts.used,
            training=tuple(run.metrics()),
            quality=run.quality(),
        ),
        recipe=recipe.model_dump(mode="json"),
        teacher=TeacherFacts(**run.teacher_facts.model_dump(include={"model", "weights", "fingerprint"})),
        student=StudentFacts(
            model=facts.model,
            initial=facts.initial,
            origin=facts.origin,
            parameters=facts.parameters if student.scorer is None else student.deployed_parameters(),
            image_size=recipe.student.image_size,
        ),
        templates=tuple(recipe.templates),
    )


def evaluation_positions(
    images: ImageIndex,
    recipe: Recipe,
    *,
    labelled: bool = False,
    first: Container[str] = (),
    learned: Container[str] = (),
) -> NDArray[np.int64]:
    """Return which images travel: all that are ``labelled``, else those held out from training.

    Held out are none whose labels were ``learned``, known by their keys. Where there are more than travel, those with
    the keys in ``first`` go before the others. The catalogue is ordered by content key, so the first ones are a random
    sample.
    """
    chosen = np.arange(len(images)) if labelled else hold_out(images.keys, recipe.data.held_out)
    if not labelled:
        chosen = chosen[without(images, chosen, learned)]
    before = np.array([images.keys[position] in first for position in chosen], dtype=bool)
    return np.sort(np.concatenate([chosen[before], chosen[~before]])[: recipe.export.evaluation_images])


def labelled_keys(run: Run) -> frozenset[str]:
    """Return the keys of the few images whose labels a run learned from."""
    snapshot = load_snapshot(run)
    return snapshot.labelled_keys if snapshot else frozenset()


def images_of(run: Run, recipe: Recipe, seen: Container[str], progress: Progress) -> ImageIndex:
    """Read the images that a run was made from, as far as they are still there."""
    return restrict_to_snapshot(
        read_image_index(recipe.data.image_spec, progress, known=seen, grey=grey_of(run)), run, progress
    )


def parity_pictures(
    images: ImageIndex, positions: NDArray[np.int64], recipe: Recipe, learned: Callable[[], ImageIndex]
) -> Iterator[Image.Image]:
    """Yield up to `PARITY_IMAGES` distinct pictures: the ones that travel, then others, then ones learned from.

    Two runtimes are compared on them, not a student and a truth, so having learned from them does no harm.
    """
    order = [*positions.tolist(), *np.setdiff1d(np.arange(len(images)), positions).tolist()][:PARITY_IMAGES]
    for position in order:
        yield images.read(position)
    if len(order) < PARITY_IMAGES and recipe.data.evaluation:
        try:
            more = learned()
        except ImagesError:  # they are gone
            return
        taken = set(images.keys)
        others = (position for position, key in enumerate(more.keys) if key not in taken)
        for position in islice(others, PARITY_IMAGES - len(order)):
            yield more.read(position)


def held_out_set(
    run: Run,
    recipe: Recipe,
    evaluation: EvaluationSet,
    learned: Callable[[], ImageIndex],
    preprocessing: Preprocessing,
    progress: Progress,
) -> HeldOutSet | None:
    """Return the images that selected the student, for its confidences: no label is read, and no student learned these.

    They are as many as the recipe says, also where fewer were asked to travel. None, which is said, where the images
    that the run was made from are gone.
    """
    ticks = ticks_in(run.ticks_file, recipe.classes) or ()  # bench says what is wrong with them
    try:
        index = learned()
    except ImagesError as error:
        progress.note(f"confidences are not calibrated: {error.what}")
        return None
    held_out = evaluation_positions(index, run.recipe, first=audited_keys(run), learned=labelled_keys(run))
    if evaluation.labels is None and len(held_out) <= len(evaluation.keys):
        return HeldOutSet(None, evaluation.teacher_logits, evaluation.keys, ticks)
    index = index.subset(held_out)
    everything = np.arange(len(index))
    return HeldOutSet(
        prepared=(preprocessing.prepare(index.read(position)) for position in range(len(index))),
        teacher_logits=teacher_answers(run, recipe, index, everything, progress).logits,
        keys=index.keys,
        ticks=ticks,
    )


def calibration_set(
    run: Run,
    images: ImageIndex,
    positions: NDArray[np.int64],
    preprocessing: Preprocessing,
    recipe: Recipe,
    learned: Callable[[], ImageIndex],
) -> CalibrationSet:
    """Return the images that the student learned from, for INT8's ranges.

    None of them travels, and none selected the student: INT8 is judged on images that it was not fitted to.
    """
    image_index, apart = images, {images.keys[position] for position in positions.tolist()}
    if recipe.data.evaluation:
        image_index = learned()
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


def check_vocabulary(recipe: Recipe, options: ExportOptions) -> None:
    """Refuse class vectors where the student's features are not the teacher's, or as an input of engines.

    A projector that was trained is not enough: rkd and crd hold relations between images, in any space.

    Raises:
        ExportError: says what to do instead.
    """
    if options.class_vectors and not any(config.aligns_features for config in recipe.objective):
        option = "--embedding" if options.embedding else "--open-vocabulary"
        able = [name for name, config in OBJECTIVES.items() if config(name=name).aligns_features]  # type: ignore[call-arg]
        raise ExportError(
            f"{recipe.objective_name} does not draw the student's features to the teacher's, so class vectors cannot "
            "score them",
            fix=f"distil with one of {', '.join(able)}, or export without {option}",
        )
    refuse_input(options)

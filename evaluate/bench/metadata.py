"""The report's metadata: the run, its evaluation images, teacher and student, and how it was trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from prgkit import metrics
from prgkit.config.sections import Export
from prgkit.data.preprocessing import load_image
from prgkit.errors import PrgkitError
from prgkit.evaluate.bench.latency import EncodedImages
from prgkit.evaluate.report.schema import (
    Epoch,
    EvaluationImages,
    Row,
    RunFacts,
    StageImages,
    StudentScores,
    TeacherScores,
)
from prgkit.export.bundle.bundle import Bundle, Evaluation
from prgkit.export.bundle.confidence import describe_confidence
from prgkit.export.bundle.engine_metadata import builds_of
from prgkit.export.bundle.manifest import exports_of
from prgkit.storage.atomic import fingerprint
from prgkit.storage.quality import Statistics
from prgkit.storage.run import Run

NOT_TRAINING = {"learning_rate", "seconds", "images_per_s", "step"}


def run_facts(bundle: Bundle) -> RunFacts:
    """Return what is known of the run that a bundle was exported from."""
    run, teacher = bundle.manifest.run, bundle.manifest.teacher
    name = " ".join(str(part) for part in (teacher.model, teacher.weights) if part)
    if name.startswith("local-dir:"):
        name = PurePath(name).name  # where it lay is nobody's business
    return RunFacts(
        name=run.name,
        student=bundle.manifest.student.model,
        teacher=name,
        objective=run.objective,
        uses_labels=run.learned_labels,
        origin=bundle.manifest.student.origin,
        classes=len(bundle.classes),
        epochs=run.epochs,
    )


def teacher_scores(evaluation: Evaluation) -> TeacherScores:
    """Return how right the teacher is on the evaluation images."""
    scores = metrics.scores(evaluation.teacher_logits, labels=evaluation.labels)
    uniform = metrics.scores(evaluation.teacher_uniform_logits, labels=evaluation.labels)
    return TeacherScores(top1=scores.top1, top5=scores.top5, top1_uniform_prompts=uniform.top1)


def student_scores(evaluation: Evaluation, rows: Sequence[Row]) -> StudentScores:
    """Return how right the student is: its FP32 file as measured here; where that could not run, as exported."""
    for row in rows:
        if row.artifact == "onnx-fp32" and row.status == "measured":
            return StudentScores(top1=row.top1, top5=row.top5, agreement=row.agreement_teacher)
    scores = metrics.scores(evaluation.logits, teacher=evaluation.teacher_logits, labels=evaluation.labels)
    return StudentScores(top1=scores.top1, top5=scores.top5, agreement=scores.agreement_teacher)


def evaluation_images(evaluation: Evaluation, bundle: Bundle) -> EvaluationImages:
    """Return which images the quality is measured on; the digest is the same where pictures, labels and classes are."""
    labels = None if evaluation.labels is None else evaluation.labels.tolist()
    relabelled = [bundle.classes] if bundle.manifest.relabelled else []
    return EvaluationImages(
        images=len(evaluation.pixels),
        labelled=labels is not None,
        source=bundle.manifest.evaluation.source,
        digest=fingerprint([evaluation.keys, labels, *relabelled]),
    )


def golden_images(bundle: Bundle) -> EncodedImages | None:
    """Return the bundle's golden images as the PNG files that they are; None where there are none to read."""
    paths = sorted(path for path in (bundle.folder / "golden").glob("[0-9]*.png") if path.suffixes == [".png"])
    try:
        files = [path.read_bytes() for path in paths]
        for file in files:
            load_image(file)
    except (OSError, PrgkitError):  # golden images that are damaged have a note already
        return None
    return EncodedImages(files, bundle.preprocessing) if files else None


def stage_images(images: EncodedImages | None) -> StageImages | None:
    """Return how many images the stages ran on, and of what sizes in pixels."""
    if images is None:
        return None
    sizes = sorted({load_image(file).size for file in images.files})
    return StageImages(images=len(images.files), smallest=sizes[0], largest=sizes[-1])


def made_by(bundle: Bundle, typed: str) -> list[str]:
    """Return the commands that make the bundle again from the run's recipe, as far as what was typed does not."""
    run = shlex.quote(f"runs/{bundle.manifest.run.name}")
    exports, further = exports_of(bundle.artifacts), list[str]()
    builds, again = builds_of(bundle.folder, bundle.artifacts), list[list[str]]()
    if bundle.manifest.relabelled and builds:  # which removed those of the old classes
        kinds = [option for option in ("--fp16", "--int8") if option in exports[0]]
        again = [["--trt", *kinds, *built] for built in builds]
        exports = [[option for option in given if option != "--trt"] for given in exports]
    elif builds:  # an export builds by one backend, and keeps what another built before
        exports = [[*given, *builds[0]] for given in exports] + [[*exports[0], *built] for built in builds[1:]]
    if scoring := bundle.manifest.open_vocabulary:
        further += ["--open-vocabulary", scoring.class_vectors]
    usual = Export().evaluation_images
    travelling = bundle.manifest.export.evaluation_images
    if travelling != usual:
        further += ["--evaluation-images", str(travelling)]
    steps = [("distill", f"prgkit distill {run}/recipe.yaml --run {run}")]
    steps += [("export", " ".join(["prgkit export", *given, *further, "--run", run])) for given in exports]
    if scoring and scoring.relabelled:
        steps.append(("relabel", f"prgkit relabel --classes FILE --run {run}"))
        steps += [("engines", " ".join(["prgkit export", *given, "--run", f"{run}/bundle"])) for given in again]
    return [step for command, step in steps if command not in typed.split()]


def vocabulary_notes(bundle: Bundle) -> list[str]:
    """Say that the classes are not the network's, and what is left of a report that was about other ones."""
    scoring = bundle.manifest.open_vocabulary
    if scoring is None:
        return []
    notes = ["Open vocabulary: images are scored by the teacher's class vectors; prgkit relabel changes the classes."]
    if scoring.relabelled:
        notes.append(
            f"The classes were changed at {scoring.relabelled}: what is said of the training and its targets is of "
            "those that the student learned with, and ticks of those are left out."
        )
    return notes


def confidence_notes(bundle: Bundle, evaluation: Evaluation) -> list[str]:
    """Say how confidences were calibrated, and how far they are from any labels; nothing where they were not."""
    facts = bundle.manifest.confidence
    if facts is None:
        return []
    said = describe_confidence(facts)
    if evaluation.labels is not None:
        after, before = (
            metrics.calibration_error(evaluation.logits / temperature, evaluation.labels)
            for temperature in (facts.temperature, 1)
        )
        said += f"; by the labels of the evaluation images {after:.1f} points, {before:.1f} without"
    return [f"{said[0].upper()}{said[1:]}."]


def training_records(bundle: Bundle, run_folder: Path | None) -> list[Epoch]:
    """Return each epoch's loss, its terms and the agreement: the run's, or on a device what the bundle took along."""
    records = Run(run_folder).metrics() if run_folder is not None else bundle.manifest.run.training
    return [
        {key: value for key, value in record.items() if key not in NOT_TRAINING and isinstance(value, (int, float))}
        for record in records
    ]


def pseudo_labels(bundle: Bundle, run_folder: Path | None) -> Statistics | None:
    """Return what was known of the pseudo-labels before training: the run's, or what the bundle took along."""
    statistics = Run(run_folder).quality() if run_folder is not None else None
    return statistics or bundle.manifest.run.quality

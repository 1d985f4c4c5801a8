"""From a trained student to a bundle: what `prgkit export` does, top to bottom."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue
from torch import nn

import prgkit
from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.data.ticks import Tick
from prgkit.errors import DiskFullError
from prgkit.export.bundle.artifact_cache import ArtifactCache, building
from prgkit.export.bundle.bundle import (
    STUDENT_BATCH,
    batches,
    input_spec,
    output_spec,
    write_evaluation,
    write_golden,
)
from prgkit.export.bundle.checksums import checksums
from prgkit.export.bundle.confidence import describe_confidence, measure_confidence
from prgkit.export.bundle.manifest import (
    MATRIX,
    VECTORS,
    Artifact,
    ClassScoring,
    Confidence,
    EvaluationFacts,
    Facts,
    Manifest,
    NotKept,
    RunFacts,
    StudentFacts,
    TeacherFacts,
    TensorSpec,
)
from prgkit.export.formats import wanted_formats
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.open_vocabulary import FeatureRunner, agreement_sentence, keep_features
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.student_export import CalibrationSet, StudentExport, origin_of
from prgkit.export.readme import write_manifest
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.storage.atomic import readable_bytes, require_space
from prgkit.storage.reproducible import write_array
from prgkit.student.heads import ClassVectors, OpenVocabulary


class StudentOrigin(Facts):
    """What the student was made from, as the manifest says it."""

    run: RunFacts
    recipe: dict[str, JsonValue]
    teacher: TeacherFacts
    student: StudentFacts
    templates: tuple[str, ...] = ()  # of the class vectors, where the vocabulary is open


@dataclass(frozen=True)
class TrainedStudent:
    """The student that is exported, and what it was made from."""

    network: nn.Module  # uint8 pixels [batch, S, S, 3] to logits, unfused
    classes: Sequence[str]
    preprocessing: Preprocessing
    origin: StudentOrigin

    @property
    def scorer(self) -> ClassVectors | None:
        """The class vectors in the place of a class head, where the vocabulary is open."""
        return self.network.model.scorer if isinstance(self.network.model, OpenVocabulary) else None


@dataclass(frozen=True)
class EvaluationSet:
    """The images that the bundle is evaluated on, prepared for the student, and what the teacher says of them."""

    prepared: Iterable[NDArray[np.uint8]]  # n times [S, S, 3]
    teacher_logits: NDArray[np.float32]  # [n, classes]
    teacher_uniform_logits: NDArray[np.float32]  # [n, classes]
    labels: NDArray[np.int64] | None  # [n]
    source: str
    keys: tuple[str, ...]  # n content keys
    teacher_features: NDArray[np.float32] | None = None  # [n, D], where the vocabulary is open


@dataclass(frozen=True)
class HeldOutSet:
    """The images that selected the student, with what the teacher and a person said of them."""

    prepared: Iterable[NDArray[np.uint8]] | None  # n times [S, S, 3]; None: they are the evaluation images
    teacher_logits: NDArray[np.float32]  # [n, classes]
    keys: Sequence[str]  # n content keys
    ticks: Collection[Tick] = ()


@dataclass(frozen=True)
class ExportImages:
    """The images of an export."""

    parity: NDArray[np.uint8]  # [256 or more, S, S, 3], real ones, on which every artifact must agree with PyTorch
    golden: Sequence[Image.Image]
    evaluation: EvaluationSet
    calibration: Callable[[], CalibrationSet] | None = None  # that INT8 is fitted to
    held_out: HeldOutSet | None = None  # that confidences are calibrated on


def export_student(
    student: TrainedStudent,
    images: ExportImages,
    folder: Path,
    options: ExportOptions,
    *,
    note: Callable[[str], None],
) -> Manifest:
    """Write the bundle of a student and return its manifest.

    A bundle that exists is replaced by a whole one; what is the same in it, or was finished by an export that was
    killed, is not made again.

    Raises:
        ExportError: the student cannot be exported as asked.
        BackendError: an engine was asked for and no TensorRT is usable; said before any work is done.
        ParityError: an artifact disagrees with PyTorch; no manifest is written.
    """
    formats = wanted_formats(options)
    needed_bytes = expected_bytes(student, len(images.evaluation.teacher_logits), options)
    with room_for(folder, needed_bytes), building(folder, note=note) as new, tempfile.TemporaryDirectory() as work:
        export = StudentExport(
            student.network,
            student.classes,
            student.preprocessing,
            options,
            images.parity,
            images.calibration,
            folder=new,
            work=Path(work),
            cache=ArtifactCache(new, bundle=folder, note=note),
            origin=origin_of(student.network, images.parity, student.classes, student.preprocessing, options),
            note=note,
            ticks=images.held_out.ticks if images.held_out else (),
        )
        made = [make(formats[0], export)]  # FP32, by whose logits the files after it are judged
        logits, held_out_logits = write_images(student, images, new)
        if student.scorer is not None:
            note(agreement_sentence(logits, images.evaluation.teacher_logits))
        confidence = calibrate(student, images.held_out, held_out_logits, note=note)
        made += [make(known, export) for known in formats[1:]]
        if options.class_vectors == "input":
            export.artifacts[:] = [export.take_class_vectors(artifact) for artifact in export.artifacts]
        # With class vectors as an input, an older bundle's files that hold them inside cannot stay.
        origin = export.origin if options.class_vectors != "input" else None
        settled_names = frozenset().union(*(result.decided for result in made))  # older artifacts of these do not stay
        stay, refused = export.cache.carry_over(
            export.artifacts, origin, decided=settled_names.__contains__, margin=options.margin
        )
        artifacts = (*export.artifacts, *stay)
        export.cache.leave_only(artifacts)
        not_kept = [facts for result in made for facts in result.not_kept]
        manifest = manifest_of(student, images, options, artifacts, (*not_kept, *refused), checksums(new), confidence)
        write_manifest(new, manifest)
    return manifest


def make(known: Format, export: StudentExport) -> Made:
    """Make the files of a format, from which others may be made."""
    made = known.make(export)
    export.artifacts.extend(made.artifacts)
    return made


def calibrate(
    student: TrainedStudent, held_out: HeldOutSet | None, logits: NDArray[np.float32], *, note: Callable[[str], None]
) -> Confidence | None:
    """Return how sure the student may be, by its ``logits`` [m, classes] of held-out images; None without such."""
    if held_out is None:
        return None
    confidence = measure_confidence(
        logits, held_out.teacher_logits, keys=held_out.keys, ticks=held_out.ticks, classes=student.classes
    )
    note(describe_confidence(confidence))
    return confidence


def manifest_of(
    student: TrainedStudent,
    images: ExportImages,
    options: ExportOptions,
    artifacts: tuple[Artifact, ...],
    not_kept: tuple[NotKept, ...],
    checksums: dict[str, str],
    confidence: Confidence | None,
) -> Manifest:
    """Return all that is known of a bundle."""
    evaluation = images.evaluation
    return Manifest(
        prgkit=prgkit.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        run=student.origin.run,
        recipe=student.origin.recipe,
        teacher=student.origin.teacher,
        student=student.origin.student,
        open_vocabulary=class_scoring(student, options),
        classes=tuple(student.classes),
        preprocessing=student.preprocessing,
        input=input_spec(student.preprocessing),
        output=output_spec(student.classes),
        artifacts=artifacts,
        not_kept=not_kept,
        evaluation=EvaluationFacts(
            images=len(evaluation.teacher_logits), labelled=evaluation.labels is not None, source=evaluation.source
        ),
        confidence=confidence,
        checksums=checksums,
    )


def write_images(
    student: TrainedStudent, images: ExportImages, folder: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Write the golden and the evaluation images with the FP32 file's logits.

    Returned are those of the evaluation images [n, classes], and of the held-out ones [m, classes], which stay here.
    Where the vocabulary is open, features and class vectors lie beside them.
    """
    runner: OnnxRunner | FeatureRunner
    if student.scorer is None:
        runner = OnnxRunner(folder / "model.onnx", spin=False)
    else:
        vectors = student.scorer.vectors.cpu().numpy()  # [C, D]
        write_array(folder / VECTORS, vectors)
        runner = FeatureRunner(folder / "model.onnx", vectors, float(student.scorer.scale))
    inputs = np.stack([student.preprocessing.prepare(picture) for picture in images.golden])  # [16, S, S, 3]
    write_golden(folder, images.golden, inputs, runner.run(inputs))
    keep_features(folder / "golden", runner)
    evaluation = images.evaluation
    logits = write_evaluation(
        folder,
        evaluation.prepared,
        teacher_logits=evaluation.teacher_logits,
        teacher_uniform_logits=evaluation.teacher_uniform_logits,
        labels=evaluation.labels,
        student=runner.run,
        keys=evaluation.keys,
    )
    keep_features(folder / "evaluation", runner, evaluation.teacher_features)
    held_out = logits
    if images.held_out is not None and images.held_out.prepared is not None:
        held_out = np.concatenate([runner.run(batch) for batch in batches(images.held_out.prepared, STUDENT_BATCH)])
    runner.close()
    return logits, held_out


def class_scoring(student: TrainedStudent, options: ExportOptions) -> ClassScoring | None:
    """Return what the manifest says of class vectors in the place of a class head; None where there is a head."""
    if student.scorer is None:
        return None
    place, width = options.class_vectors or "initializer", student.scorer.vectors.shape[1]
    spec = TensorSpec(name=MATRIX, dtype="float32", shape=("classes", width))
    return ClassScoring(
        teacher=student.origin.teacher.fingerprint,
        templates=student.origin.templates,
        class_vectors=place,
        width=width,
        logit_scale=float(student.scorer.scale),
        relabelled=None,
        input=spec if place == "input" else None,
    )


@contextmanager
def room_for(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Refuse where the bundle does not fit; where the disk fills up all the same, say how much was needed."""
    fix = "free some space and export again: finished artifacts are kept"
    require_space(folder, needed_bytes, "the bundle", fix=fix)
    try:
        yield
    except DiskFullError as error:
        need = f"the bundle needs {readable_bytes(needed_bytes)}"
        elsewhere = error.where and not Path(str(error.where)).resolve().is_relative_to(folder.resolve().parent)
        where = error.where if elsewhere else folder  # INT8's trials are in the system's temporary folder
        raise DiskFullError(f"{error.what}; {need}", where=where, fix=fix) from error


def expected_bytes(student: TrainedStudent, evaluation_images: int, options: ExportOptions) -> int:
    """Estimate the bundle's size from above."""
    weights = 4 * sum(parameter.numel() for parameter in student.network.parameters())
    copies = (1.0 + 0.5 * options.fp16 + 2.0 * options.int8) * (1.0 + 1.4 * options.trt)
    copies += 1.0 * (options.float_input + options.explain) + 2.0 * options.embedding
    copies += len(options.formats) * (1.0 + 0.5 * options.fp16 + 0.25 * options.int8)
    pictures = evaluation_images * math.prod(sides(student.preprocessing.image_size)) * 3
    return int(weights * copies) + pictures + (16 << 20)

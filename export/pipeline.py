"""From a trained student to a bundle: what `prgkit export` does, top to bottom."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue
from torch import nn

import prgkit
from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import DiskFullError, ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache, Origin, building
from prgkit.export.bundle.bundle import (
    describe_artifact,
    input_spec,
    output_spec,
    read_evaluation,
    write_evaluation,
    write_golden,
    write_manifest,
)
from prgkit.export.bundle.checksums import checksums
from prgkit.export.bundle.manifest import (
    MATRIX,
    VECTORS,
    Artifact,
    ClassScoring,
    EvaluationFacts,
    Facts,
    Manifest,
    NotBuilt,
    NotKept,
    RunFacts,
    StudentFacts,
    TeacherFacts,
    TensorSpec,
)
from prgkit.export.formats.engines import make_engines
from prgkit.export.formats.onnx import OnnxExportModule, export_onnx, onnx_export_module, rehearse_fp16, write_fp16
from prgkit.export.formats.onnx_nchw import NAME as NCHW_NAME
from prgkit.export.formats.onnx_nchw import nchw_artifact
from prgkit.export.formats.open_vocabulary import FeatureRunner, agreement_sentence, keep_features, taking_class_vectors
from prgkit.export.formats.tensorrt import check_batch
from prgkit.export.int8.pipeline import Learned, Network, Quantiser, calibration_of, quantise
from prgkit.export.runtimes.base import OnnxRunner, TorchRunner
from prgkit.export.runtimes.gpu import choose_backend
from prgkit.export.runtimes.parity import require_agreement, run_batches
from prgkit.storage.atomic import readable_bytes, require_space
from prgkit.storage.reproducible import write_array
from prgkit.student.heads import ClassVectors, OpenVocabulary

WRITERS = ("timm", "onnx", "onnxscript", "onnxruntime")  # besides torch: what writes ONNX files, and compares them
FP16_SCALES_OPSET = 19
CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"


@dataclass(frozen=True)
class ExportOptions:
    """What to export besides FP32 ONNX."""

    opset: int = 20
    fp16: bool = False
    int8: bool = False
    fidelity: float = 98.0  # percent of held-out images on which INT8 must surely give FP32's answer
    float_input: bool = False  # also a file that takes normalised floats, NCHW
    trt: bool = False
    batch: tuple[int, int, int] = (1, 1, 32)  # of the engines: min, opt, max
    backend: str | None = None  # None: tensorrt where a GPU is, else tensorrt_rtx
    sm: tuple[str, ...] | None = None  # GPU generations, as "SM86"; None: all that tensorrt_rtx builds for
    class_vectors: Literal["initializer", "input"] | None = (
        None  # of an open vocabulary: an "initializer" of its ONNX files (None), or an "input"
    )


class StudentOrigin(Facts):
    """What the student was made from, as the manifest says it."""

    run: RunFacts
    recipe: dict[str, JsonValue]
    teacher: TeacherFacts
    student: StudentFacts
    templates: tuple[str, ...] = ()  # of the class vectors, where the vocabulary is open


@dataclass(frozen=True)
class HeldOut:
    """The images that the bundle is evaluated on, prepared for the student, and what the teacher says of them."""

    prepared: Iterable[NDArray[np.uint8]]  # n times [S, S, 3]
    teacher_logits: NDArray[np.float32]  # [n, classes]
    teacher_uniform_logits: NDArray[np.float32]  # [n, classes]
    labels: NDArray[np.int64] | None  # [n]
    source: str
    keys: tuple[str, ...] | None = None  # n content keys
    teacher_features: NDArray[np.float32] | None = None  # [n, D], where the vocabulary is open


def export_student(
    student: nn.Module,
    folder: Path,
    *,
    pixels: NDArray[np.uint8],
    golden: Sequence[Image.Image],
    held_out: HeldOut,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    facts: StudentOrigin,
    options: ExportOptions,
    learned: Callable[[], Learned] | None = None,
    note: Callable[[str], None],
) -> Manifest:
    """Write the bundle of ``student`` (uint8 NHWC pixels to logits, unfused) and return its manifest.

    ``pixels`` [256 or more, S, S, 3] are real images on which every artifact must agree with PyTorch; ``facts`` are the
    manifest's ``run``, ``recipe``, ``teacher`` and ``student``; ``learned`` gives the images that INT8 is fitted
    to, none of which is held out. A bundle that exists is replaced by a whole one; what
    is the same in it, or was finished by an export that was killed, is not made again.

    Raises:
        ExportError: the student cannot be exported as asked.
        BackendError: an engine was asked for and no TensorRT is usable; said before any work is done.
        ParityError: an artifact disagrees with PyTorch; no manifest is written.
    """
    check_batch(options.batch)
    check_opset(options)
    backend = choose_backend(options.backend) if options.trt else None
    images = torch.from_numpy(pixels)

    @cache
    def module() -> OnnxExportModule:  # asked only where something is not finished yet
        return onnx_export_module(student, images)

    @cache
    def reference_logits() -> NDArray[np.float32]:
        return run_batches(TorchRunner(student), pixels)

    def fp32() -> Artifact:
        export_onnx(
            module(),
            new / "model.onnx",
            image_size=preprocessing.image_size,
            classes=classes,
            preprocessing=preprocessing.to_dict(),
            opset=options.opset,
        )
        return onnx_artifact(new, "model.onnx", "fp32", pixels, reference_logits(), note)

    def write_half(path: Path) -> None:
        rehearsed = rehearse_fp16(module(), images).numpy()
        names = ("torch", "FP16 arithmetic, rehearsed")
        require_agreement(reference_logits(), rehearsed, precision="fp16", names=names)
        write_fp16(new / "model.onnx", path)

    def fp16() -> Artifact:
        write_half(new / "model.fp16.onnx")
        return onnx_artifact(new, "model.fp16.onnx", "fp16", pixels, reference_logits(), note)

    @cache
    def half(work: Path) -> Path:  # the bundle's own, or one that does not stay
        if options.fp16:
            return new / "model.fp16.onnx"
        write_half(path := work / "model.fp16.onnx")
        return path

    def nchw() -> Artifact:
        return nchw_artifact(
            new, pixels=pixels, reference_logits=reference_logits(), preprocessing=preprocessing, note=note
        )

    def engines(sources: list[Artifact]) -> tuple[list[Artifact], list[NotBuilt]]:
        assert backend is not None
        return make_engines(
            new,
            sources,
            backend=backend,
            batch=options.batch,
            pixels=pixels,
            sm=options.sm,
            reference="torch",
            reference_logits=reference_logits,
            finished=finished.get,
            note=note,
        )

    def decided(name: str) -> bool:  # what INT8 this export keeps or refuses; all else of a bundle stays in it
        if not (options.int8 and "int8" in name):
            return False
        if name.startswith("onnx-") and not name.endswith("-tensorrt"):
            return True
        return backend is not None and (name.startswith("onnx-") or name.startswith(f"{backend.name}-int8"))

    with room_for(folder, expected_bytes(student, preprocessing, held_out, options)), building(folder) as new:
        finished = ArtifactCache(
            new, bundle=folder, note=note
        )  # by an export that was killed, or in the bundle there is
        made_from = origin_of(student, pixels, classes, preprocessing, options)
        artifacts = [finished.get("onnx-fp32", made_from, fp32)]
        if options.fp16:
            artifacts.append(finished.get("onnx-fp16", made_from, fp16))
        if backend:
            artifacts += engines(artifacts)[0]

        if options.float_input:
            artifacts.append(finished.get(NCHW_NAME, made_from, nchw))

        scorer = student.model.scorer if isinstance(student.model, OpenVocabulary) else None
        runner: OnnxRunner | FeatureRunner
        if scorer is None:
            runner = OnnxRunner(new / "model.onnx", spin=False)
        else:
            write_array(new / VECTORS, scorer.vectors.cpu().numpy())
            runner = FeatureRunner(new / "model.onnx", scorer.vectors.cpu().numpy(), float(scorer.scale))
        inputs = np.stack([preprocessing.prepare(picture) for picture in golden])  # [16, S, S, 3]
        write_golden(new, golden, inputs, runner.run(inputs))
        keep_features(new / "golden", runner)
        fp32_logits = write_evaluation(
            new,
            held_out.prepared,
            teacher_logits=held_out.teacher_logits,
            teacher_uniform_logits=held_out.teacher_uniform_logits,
            labels=held_out.labels,
            student=runner.run,
            keys=held_out.keys,
        )
        keep_features(new / "evaluation", runner, held_out.teacher_features)
        runner.close()
        not_kept: list[NotKept] = []
        if options.int8 and learned:
            with tempfile.TemporaryDirectory() as work:
                quantiser = Quantiser(
                    network=Network(new / "model.onnx", calibration_of(learned()), note),
                    pixels=read_evaluation(new).pixels,
                    logits=fp32_logits,
                    floor=options.fidelity,
                    compared=(pixels, reference_logits),
                    note=note,
                )
                made, not_kept = quantise(
                    quantiser,
                    new,
                    half=partial(half, Path(work)),
                    made_from=made_from,
                    finished=finished,
                    engines=engines if backend else None,
                )
            artifacts += made
        scoring = None
        if scorer is not None:
            if options.class_vectors == "input":
                artifacts = [taking_class_vectors(new, artifact, pixels, preprocessing) for artifact in artifacts]
            note(agreement_sentence(fp32_logits, held_out.teacher_logits))
            scoring = class_scoring(scorer, facts, options)
        fixed = made_from if options.class_vectors != "input" else None  # else what has them inside is of no use
        kept, before = finished.carry_over(artifacts, fixed, decided=decided)
        artifacts, not_kept = artifacts + kept, not_kept + before
        finished.leave_only(artifacts)
        manifest = Manifest(
            prgkit=prgkit.__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            run=facts.run,
            recipe=facts.recipe,
            teacher=facts.teacher,
            student=facts.student,
            open_vocabulary=scoring,
            classes=tuple(classes),
            preprocessing=preprocessing,
            input=input_spec(preprocessing),
            output=output_spec(classes),
            artifacts=tuple(artifacts),
            not_kept=tuple(not_kept),
            evaluation=EvaluationFacts(
                images=len(held_out.teacher_logits), labelled=held_out.labels is not None, source=held_out.source
            ),
            checksums=checksums(new),
        )
        write_manifest(new, manifest)
    return manifest


def class_scoring(scorer: ClassVectors, facts: StudentOrigin, options: ExportOptions) -> ClassScoring:
    """Return what the manifest says of class vectors in the place of a class head."""
    place, width = options.class_vectors or "initializer", scorer.vectors.shape[1]
    spec = TensorSpec(name=MATRIX, dtype="float32", shape=("classes", width))
    return ClassScoring(
        teacher=facts.teacher.fingerprint,
        templates=facts.templates,
        class_vectors=place,
        width=width,
        logit_scale=float(scorer.scale),
        relabelled=None,
        input=spec if place == "input" else None,
    )


def check_opset(options: ExportOptions) -> None:
    """Refuse INT8 engines of an opset that has no FP16 scales, before any work is done."""
    if options.int8 and options.trt and options.opset < FP16_SCALES_OPSET:
        raise ExportError(
            f"INT8 for TensorRT cannot be written in opset {options.opset}: its scales are FP16, which came with opset "
            f"{FP16_SCALES_OPSET}",
            fix=f"set export.opset to {FP16_SCALES_OPSET} or more, or export without --int8 or without --trt",
        )


def onnx_artifact(
    folder: Path,
    file: str,
    precision: str,
    pixels: NDArray[np.uint8],
    reference_logits: NDArray[np.float32],
    note: Callable[[str], None],
) -> Artifact:
    """Assert that an ONNX file agrees with PyTorch and return its manifest entry."""
    name = f"onnx-{precision}"
    runner = OnnxRunner(folder / file, name=name, spin=False)
    parity = require_agreement(
        reference_logits, run_batches(runner, pixels), precision=precision, names=("torch", name)
    )
    runner.close()
    note(
        f"{file}: {precision}, max abs difference {parity.max_abs_difference:.2g}, "
        f"top-1 agreement {parity.top1_agreement:.2f} % on {parity.images} images"
    )
    return describe_artifact(
        folder,
        file,
        name=name,
        format="onnx",
        precision=precision,
        backend="onnxruntime",
        executed=True,
        note=CPU_FP16 if precision == "fp16" else None,
        parity=parity,
    )


def origin_of(
    student: nn.Module,
    pixels: NDArray[np.uint8],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    options: ExportOptions,
) -> Origin:
    """Return all that decides an ONNX file and its parity: an artifact of the same origin need not be made again."""
    weights = hashlib.sha256(repr(student).encode())
    for name, tensor in student.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "student": weights.hexdigest(),
        "images": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict(),
        "opset": options.opset,
        "versions": [prgkit.__version__, torch.__version__, *(metadata.version(name) for name in WRITERS)],
    }


@contextmanager
def room_for(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Refuse where the bundle does not fit; where the disk fills up all the same, say how much was needed."""
    fix = "free some space and export again: finished artifacts are kept"
    require_space(folder, needed_bytes, "the bundle", fix=fix)
    try:
        yield
    except DiskFullError as error:
        need = f"the bundle needs {readable_bytes(needed_bytes)}"
        elsewhere = error.where and not Path(str(error.where)).resolve().is_relative_to(folder.parent.resolve())
        where = error.where if elsewhere else folder  # INT8's trials are in the system's temporary folder
        raise DiskFullError(f"{error.what}; {need}", where=where, fix=fix) from error


def expected_bytes(student: nn.Module, preprocessing: Preprocessing, held_out: HeldOut, options: ExportOptions) -> int:
    """Estimate the bundle's size from above."""
    weights = 4 * sum(parameter.numel() for parameter in student.parameters())
    copies = (1.0 + 0.5 * options.fp16 + 2.0 * options.int8) * (1.0 + 1.4 * options.trt) + 1.0 * options.float_input
    pictures = len(held_out.teacher_logits) * math.prod(sides(preprocessing.image_size)) * 3
    return int(weights * copies) + pictures + (16 << 20)

"""The INT8 files of an export: one for each runtime, calibrated once, and kept where it is as good as FP32."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import Origin
from prgkit.export.bundle.bundle import Evaluation, describe_artifact, read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32, int8_sentence, known_classes, too_few
from prgkit.export.bundle.manifest import ONNX, OPENVINO_QDQ, QDQ, Artifact, Layout, Quantization, TooFewImages
from prgkit.export.formats.student_export import CalibrationSet, StudentExport
from prgkit.export.int8 import nncf
from prgkit.export.int8.calibration import CLIP_QUANTILES, Spread, measure_spreads
from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of
from prgkit.export.runtimes.base import Runner
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.openvino import OpenVinoRunner
from prgkit.export.runtimes.parity import compare, run_and_close
from prgkit.metrics import divergences
from prgkit.storage.atomic import fingerprint

CALIBRATION_IMAGES = 256
FOR_TENSORRT = "TensorRT's layout; it was judged in ONNX Runtime"

Pixels = NDArray[np.uint8]  # [images, S, S, 3]
Logits = NDArray[np.float32]  # [images, classes]
Result = Artifact | Quantization | TooFewImages  # a file that is kept, or what became of one that is not


@dataclass(frozen=True)
class Int8File:
    """One INT8 file of a bundle."""

    name: str
    file: str
    layout: Layout
    format: str
    options: tuple[str, ...] = ("--int8",)
    note: str | None = None

    def logits(self, path: Path, pixels: Pixels) -> Logits:
        """Return what the file says of images, in the runtime that it is judged in."""
        runner: Runner = OpenVinoRunner(path) if self.layout == "openvino" else OnnxRunner(path, spin=False)
        return run_and_close(runner, pixels)


FOR_ONNXRUNTIME = Int8File("onnx-int8", "model.int8.onnx", "onnxruntime", ONNX)
FOR_OPENVINO = Int8File("onnx-int8-openvino", "model.int8.openvino.onnx", "openvino", OPENVINO_QDQ)
FOR_TENSORRT_ENGINES = Int8File(
    "onnx-int8-tensorrt", "model.int8.tensorrt.onnx", "tensorrt", QDQ, ("--int8", "--trt"), FOR_TENSORRT
)


def quantise(export: StudentExport, calibration: CalibrationSet) -> tuple[list[Result], frozenset[str]]:
    """Make the INT8 file of each runtime, TensorRT's where engines are wanted; return what came, and the files' names.

    OpenVINO's is NNCF's work, where that is installed. TensorRT's layout is made over the FP16 file: over FP32 its
    engine could be larger than one without INT8.
    """
    evaluation = read_evaluation(export.folder)
    labels = known_classes(evaluation, export.ticks, export.classes)
    network = Network(export.folder / "model.onnx", calibration_pixels(calibration), export.note)
    quantiser = Quantiser(export, network, evaluation, labels)
    files = [FOR_ONNXRUNTIME]
    if nncf.installed():
        files.append(FOR_OPENVINO)
    else:
        export.note(f"INT8: no file for OpenVINO is made, which takes NNCF: {nncf.INSTALL}")
    if export.options.trt:
        files.append(FOR_TENSORRT_ENGINES)
    return [quantiser.make(file) for file in files], frozenset(file.name for file in files)


@dataclass(frozen=True)
class Network:
    """An FP32 file and what must be known to quantise it, found when first needed."""

    fp32: Path
    calibration: Pixels  # [n, S, S, 3]
    note: Callable[[str], None]

    @cached_property
    def convolutions(self) -> list[str]:
        """What is quantised."""
        return find_convolutions(self.fp32)

    @cached_property
    def spreads(self) -> dict[str, Spread]:
        """How the values of every tensor spread on the calibration images."""
        self.note(f"INT8: calibrating on {len(self.calibration)} images")
        return measure_spreads(self.fp32, tensors_of(self.fp32, self.convolutions), self.calibration)

    @cached_property
    def clip_quantile(self) -> float:
        """On which share of the images each tensor is clipped."""
        return choose_clip_quantile(self.fp32, self.convolutions, self.spreads, self.calibration)

    def write(self, source: Path, path: Path, layout: Literal["onnxruntime", "tensorrt"]) -> None:
        """Write ``source`` with its convolutions in INT8."""
        Quantizable(source, self.spreads, self.clip_quantile, layout).write(path, self.convolutions)


def choose_clip_quantile(
    fp32: Path, convolutions: Sequence[str], spreads: Mapping[str, Spread], pixels: Pixels
) -> float:
    """Return which of `CLIP_QUANTILES` clips best: with ``convolutions`` quantised, the root KL is the least."""
    logits = run_and_close(OnnxRunner(fp32, spin=False), pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clipped.onnx"

        def cost(clip_quantile: float) -> float:
            Quantizable(fp32, spreads, clip_quantile, "onnxruntime").write(path, convolutions)
            return root_kl(logits, run_and_close(OnnxRunner(path, spin=False), pixels))

        return min(CLIP_QUANTILES, key=cost)


def root_kl(fp32: Logits, quantised: Logits) -> float:
    """Return the mean over images of the square root of KL(FP32 || quantised), for logits [n, classes]; unit root nats.

    An answer changes as often as the error is large beside the margin, and KL grows with the error's square. Its own
    mean can be that of the few images on which a network's activations explode.
    """
    return float(np.sqrt(divergences(fp32, quantised)).mean())


@dataclass(frozen=True)
class Quantiser:
    """What INT8 files are made from and judged on."""

    export: StudentExport
    network: Network  # calibrated on images none of which are among those that it is judged on
    evaluation: Evaluation
    labels: NDArray[np.int64]  # [n], -1 where none is known

    def make(self, file: Int8File) -> Result:
        """Return a file's artifact, or what became of it where it is not kept."""
        cache, note, margin = self.export.cache, self.export.note, self.export.options.margin
        judged_on = (self.evaluation.pixels, self.evaluation.teacher_logits, self.labels)
        images = [digest(values) for values in (self.network.calibration, *judged_on)]
        made_from: Origin = {**self.export.origin, "int8": [file.name, margin, *images]}
        if artifact := cache.take(file.name, made_from):
            note(f"{artifact.file}: finished before, and made from the same; it is kept")
            return artifact
        if before := cache.not_kept(file.name, made_from):
            note(f"{file.file}: {int8_sentence(before)} (found before, from the same)")
            return before
        known = {"name": file.name, "layout": file.layout, "calibration_images": len(self.network.calibration)}
        if few := too_few(len(self.evaluation.pixels), margin):  # to find that out again costs nothing: no made_from
            note(f"{file.file}: {int8_sentence(few)}")
            return few.model_copy(update=known)
        made = self.judge(file).model_copy(update=known)
        note(f"{file.file}: {int8_sentence(made)}")
        if not made.kept:
            (self.export.folder / file.file).unlink()
            return made.model_copy(update={"made_from": fingerprint(made_from)})
        return cache.add(self.describe(file, made), made_from)

    def judge(self, file: Int8File) -> Quantization:
        """Write a file, and return how it stands to FP32."""
        path, margin, clip_quantile = self.export.folder / file.file, self.export.options.margin, None
        if file.layout == "openvino":
            nncf.write_for_openvino(self.network.fp32, path, self.network.calibration)
        else:
            source = self.network.fp32 if file.layout == "onnxruntime" else self.export.fp16_file
            self.network.write(source, path, file.layout)
            clip_quantile = self.network.clip_quantile
        logits = file.logits(path, self.evaluation.pixels)
        found = compare_with_fp32(self.evaluation.logits, logits, self.evaluation.teacher_logits, self.labels)
        return Quantization(kept=found.holds(margin), margin=margin, comparison=found, clip_quantile=clip_quantile)

    def describe(self, file: Int8File, made: Quantization) -> Artifact:
        """Return the artifact of a file that is kept, with its parity with PyTorch."""
        logits = file.logits(self.export.folder / file.file, self.export.pixels)
        return describe_artifact(
            self.export.folder,
            file.file,
            name=file.name,
            format=file.format,
            precision="int8",
            backend=file.layout,
            executed=True,
            note=file.note,
            parity=compare(self.export.reference_logits, logits, precision="int8"),
            quantization=made,
            export_options=file.options,
        )


def calibration_pixels(calibration: CalibrationSet) -> Pixels:
    """Return up to `CALIBRATION_IMAGES` images [n, S, S, 3] for the ranges of activations.

    Raises:
        ExportError: there is none.
    """
    if not calibration.images:
        raise ExportError("there is no image to calibrate INT8 on that is not held out", fix="export without --int8")
    return calibration.read(np.arange(min(CALIBRATION_IMAGES, calibration.images)))


def digest(values: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()

"""The INT8 files of an export: calibrate and analyse once, then a file for each runtime that holds the fidelity floor.

There are two for each layout: one with as many blocks in INT8 as hold the floor, and one in which those with little
arithmetic for each value stay in float. Which is faster is for the device to say; `prgkit bench` asks it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import Origin
from prgkit.export.bundle.bundle import describe_artifact, read_evaluation
from prgkit.export.bundle.fidelity import int8_sentence, too_few
from prgkit.export.bundle.manifest import ONNX, QDQ, Artifact, BlockSensitivity, Quantization, TooFewImages
from prgkit.export.formats.student_export import CalibrationSet, StudentExport
from prgkit.export.int8.accuracy_control import (
    AccuracyTarget,
    Pixels,
    analyse_sensitivity,
    choose_clip_quantile,
    control_accuracy,
    logits_of,
)
from prgkit.export.int8.calibration import Spread, measure_spreads
from prgkit.export.int8.qdq import COMPUTE_BOUND_WORK, Block, Layout, Quantizable, find_blocks, tensors_of
from prgkit.export.runtimes.parity import compare
from prgkit.storage.atomic import fingerprint

CALIBRATION_IMAGES = 256
LEAST_SENSITIVE = 0.8  # of the blocks: these decide how much of each tensor's spread is clipped
ANALYSIS_CLIP_QUANTILE = 0.02  # the share of the images that is clipped while blocks are compared
FOR_TENSORRT = "TensorRT's layout; its fidelity is that of this file in ONNX Runtime"
Result = Artifact | Quantization | TooFewImages  # a file that is kept, or what became of one that is not


@dataclass(frozen=True)
class Int8File:
    """One INT8 file of a bundle."""

    name: str
    file: str
    layout: Layout
    compute_bound: bool = False  # blocks below `COMPUTE_BOUND_WORK` stay in float

    def left_in_float(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return which of a network's blocks stay in float in any case."""
        return tuple(block.name for block in blocks if self.compute_bound and block.work < COMPUTE_BOUND_WORK)


FOR_ONNXRUNTIME_FILES = (
    Int8File("onnx-int8", "model.int8.onnx", "onnxruntime"),
    Int8File("onnx-int8-heavy", "model.int8-heavy.onnx", "onnxruntime", compute_bound=True),
)
FOR_TENSORRT_FILES = (
    Int8File("onnx-int8-tensorrt", "model.int8.tensorrt.onnx", "tensorrt"),
    Int8File("onnx-int8-heavy-tensorrt", "model.int8-heavy.tensorrt.onnx", "tensorrt", compute_bound=True),
)


def quantise(export: StudentExport, calibration: CalibrationSet) -> tuple[list[Result], frozenset[str]]:
    """Make the INT8 files of ONNX Runtime and, where engines are wanted, TensorRT's; return what came, and their names.

    TensorRT's layout is made over the FP16 file: over FP32 its engine could be larger than one without INT8.
    """
    evaluation = read_evaluation(export.folder)
    network = Network(export.folder / "model.onnx", calibration_pixels(calibration), export.note)
    quantiser = Quantiser(
        export, network, AccuracyTarget(evaluation.pixels, evaluation.logits, export.options.fidelity)
    )
    results = quantiser.make_all(FOR_ONNXRUNTIME_FILES, lambda: network.fp32)
    names = [file.name for file in FOR_ONNXRUNTIME_FILES]
    if export.options.trt:
        results += quantiser.make_all(FOR_TENSORRT_FILES, lambda: export.fp16_file)
        names += [file.name for file in FOR_TENSORRT_FILES]
    return results, frozenset(names)


@dataclass(frozen=True)
class Network:
    """An FP32 file and what must be known to quantise it, found when first needed."""

    fp32: Path
    calibration: Pixels  # [n, S, S, 3]
    note: Callable[[str], None]

    @cached_property
    def blocks(self) -> list[Block]:
        """What can be quantised."""
        return find_blocks(self.fp32)

    @cached_property
    def spreads(self) -> dict[str, Spread]:
        """How the values of every tensor spread on the calibration images."""
        self.note(f"INT8: calibrating on {len(self.calibration)} images")
        return measure_spreads(self.fp32, tensors_of(self.fp32, self.blocks), self.calibration)

    @cached_property
    def clip_quantile(self) -> float:
        """On which share of the images each tensor is clipped: what suits the blocks that may be in INT8 best.

        The most sensitive ones would decide it, and most likely they are the ones that will be in float.
        """
        count = len(self.sensitivity) - math.ceil(LEAST_SENSITIVE * len(self.sensitivity))
        floating = {row.block for row in self.sensitivity[:count]}
        blocks = [block for block in self.blocks if block.name not in floating]
        return choose_clip_quantile(self.fp32, blocks, self.spreads, self.calibration)

    @cached_property
    def sensitivity(self) -> list[BlockSensitivity]:
        """What each block costs, the most sensitive first."""
        self.note(f"INT8: scanning {len(self.blocks)} blocks")
        return analyse_sensitivity(self.fp32, self.blocks, self.spreads, ANALYSIS_CLIP_QUANTILE, self.calibration)


@dataclass(frozen=True)
class Quantiser:
    """What INT8 files are made from and judged on."""

    export: StudentExport
    network: Network  # calibrated on images none of which are among those that it is judged on
    target: AccuracyTarget

    def make_all(self, files: tuple[Int8File, Int8File], source: Callable[[], Path]) -> list[Result]:
        """Return what came of a layout's files; the compute-bound one only where the other has other blocks in INT8."""
        full, compute_bound = files
        results = [self.make(full, source)]
        if isinstance(results[0], Artifact) and (made := results[0].quantization):
            left = set(compute_bound.left_in_float(self.network.blocks))
            if len(left) < len(self.network.blocks) and not left <= set(made.float_blocks):
                results.append(self.make(compute_bound, source))
        return results

    def make(self, file: Int8File, source: Callable[[], Path]) -> Result:
        """Return a file's artifact, or what became of it where it is not kept."""
        cache, note, floor = self.export.cache, self.export.note, self.target.floor
        images = [digest(self.network.calibration), digest(self.target.pixels)]
        made_from: Origin = {**self.export.origin, "int8": [file.name, floor, *images]}
        if artifact := cache.take(file.name, made_from):
            note(f"{artifact.file}: finished before, and made from the same; it is kept")
            return artifact
        if before := cache.not_kept(file.name, made_from):
            note(f"{file.file}: {int8_sentence(before)} (found before, from the same)")
            return before
        known = {"name": file.name, "calibration_images": len(self.network.calibration)}
        if few := too_few(len(self.target.pixels), floor):  # to find that out again costs nothing: no made_from
            note(f"{file.file}: {int8_sentence(few)}")
            return few.model_copy(update={**known, "layout": file.layout})
        made = self.hold_floor(file, source()).model_copy(update=known)
        note(f"{file.file}: {int8_sentence(made)}")
        if not made.kept:
            return made.model_copy(update={"made_from": fingerprint(made_from)})
        return cache.add(self.describe(file, made), made_from)

    def hold_floor(self, file: Int8File, source: Path) -> Quantization:
        """Write a file with as many of the network's blocks in INT8 as hold the floor; see `control_accuracy`."""
        left = file.left_in_float(self.network.blocks)
        return control_accuracy(
            Quantizable(source, self.network.spreads, self.network.clip_quantile, file.layout),
            self.export.folder / file.file,
            blocks=[block for block in self.network.blocks if block.name not in left],
            sensitivity=[row for row in self.network.sensitivity if row.block not in left],
            left_in_float=left,
            target=self.target,
            note=self.export.note,
        )

    def describe(self, file: Int8File, made: Quantization) -> Artifact:
        """Return the artifact of a file that is kept, with its parity with PyTorch."""
        path, for_tensorrt = self.export.folder / file.file, file.layout == "tensorrt"
        logits = logits_of(path, self.export.pixels)
        return describe_artifact(
            self.export.folder,
            file.file,
            name=file.name,
            format=QDQ if for_tensorrt else ONNX,
            precision="int8",
            backend=file.layout,
            executed=True,
            note=FOR_TENSORRT if for_tensorrt else None,
            parity=compare(self.export.reference_logits, logits, precision="int8"),
            quantization=made,
            export_options=("--int8", "--trt") if for_tensorrt else ("--int8",),
        )


def calibration_pixels(calibration: CalibrationSet) -> Pixels:
    """Return up to `CALIBRATION_IMAGES` images [n, S, S, 3] for the ranges of activations.

    Raises:
        ExportError: there is none.
    """
    if not calibration.images:
        raise ExportError("there is no image to calibrate INT8 on that is not held out", fix="export without --int8")
    return calibration.read(np.arange(min(CALIBRATION_IMAGES, calibration.images)))


def digest(pixels: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of images."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()

"""The INT8 part of an export: calibrate and scan once, then the files for each runtime that hold the fidelity floor.

There are two for each: one with as many blocks in INT8 as hold the floor, and one in which those with little arithmetic
for each value stay in float. Which is faster is for the device to say; `prgkit bench` asks it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache, Origin
from prgkit.export.bundle.bundle import QDQ, describe_artifact
from prgkit.export.bundle.fidelity import int8_sentence, too_few
from prgkit.export.bundle.manifest import Artifact, BlockSensitivity, NotBuilt, NotKept, Quantization, TooFewImages
from prgkit.export.int8.accuracy_control import (
    Logits,
    Pixels,
    analyse_sensitivity,
    choose_clip_quantile,
    control_accuracy,
    logits_of,
)
from prgkit.export.int8.calibration import Spread, measure_spreads
from prgkit.export.int8.qdq import COMPUTE_BOUND_WORK, Block, Layout, find_blocks, tensors_of
from prgkit.export.runtimes.parity import compare
from prgkit.storage.atomic import fingerprint

CALIBRATION_IMAGES = 256
ENOUGH = 0.8  # of the blocks, the least sensitive ones, decide how much of each tensor's spread is clipped
SCAN_TAIL = 0.02  # the share of the images that is clipped while blocks are scanned
Result = Artifact | Quantization | TooFewImages  # a file that is kept, or what became of one that is not
FOR_TENSORRT = "TensorRT's layout; its fidelity is that of this file in ONNX Runtime"


@dataclass(frozen=True)
class Learned:
    """Images that the student learned from, none of them held out."""

    images: int
    read: Callable[[NDArray[np.int64]], Pixels]  # places [n], each below `images`, to pixels [n, S, S, 3]


@dataclass(frozen=True)
class Variant:
    """One INT8 file of a bundle."""

    name: str
    file: str
    layout: Layout
    heavy: bool  # blocks below `HEAVY_WORK` stay in float

    def left(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return which of a network's blocks stay in float in any case."""
        return tuple(block.name for block in blocks if self.heavy and block.work < COMPUTE_BOUND_WORK)


VARIANTS: Mapping[Layout, tuple[Variant, Variant]] = {
    "onnxruntime": (
        Variant("onnx-int8", "model.int8.onnx", "onnxruntime", heavy=False),
        Variant("onnx-int8-heavy", "model.int8-heavy.onnx", "onnxruntime", heavy=True),
    ),
    "tensorrt": (
        Variant("onnx-int8-tensorrt", "model.int8.tensorrt.onnx", "tensorrt", heavy=False),
        Variant("onnx-int8-heavy-tensorrt", "model.int8-heavy.tensorrt.onnx", "tensorrt", heavy=True),
    ),
}


def quantise(
    quantiser: Quantiser,
    folder: Path,
    *,
    half: Callable[[], Path],
    made_from: Origin,
    finished: ArtifactCache,
    engines: Callable[[list[Artifact]], tuple[list[Artifact], list[NotBuilt]]] | None,
) -> tuple[list[Artifact], list[NotKept]]:
    """Make the INT8 files of ONNX Runtime in ``folder`` and, where ``engines`` builds from them, TensorRT's.

    Returns the entries of what is kept, and what was found of those that are not. ``half`` gives the FP16 file, over
    which TensorRT's layout is made: over FP32 its engine could be larger than one without INT8.
    """
    results = quantiser.make_all("onnxruntime", lambda: quantiser.network.fp32, folder, made_from, finished)
    if engines is not None:
        results += quantiser.make_all("tensorrt", half, folder, made_from, finished)
    kept = [result for result in results if isinstance(result, Artifact)]
    not_kept: list[NotKept] = [result for result in results if not isinstance(result, Artifact)]
    if engines is not None:
        built, not_built = engines([artifact for artifact in kept if artifact.format == QDQ])
        kept, not_kept = kept + built, [*not_kept, *not_built]
    return kept, not_kept


@dataclass(frozen=True)
class Network:
    """An FP32 file and all that must be known to quantise it; calibration and scan happen once, when first needed."""

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
    def tail(self) -> float:
        """On which share of the images each tensor is clipped: what suits the blocks that may be in INT8 best.

        The most sensitive ones would decide it, and most likely they are the ones that will be in float.
        """
        floating = {row.block for row in self.scan[: len(self.scan) - math.ceil(ENOUGH * len(self.scan))]}
        blocks = [block for block in self.blocks if block.name not in floating]
        return choose_clip_quantile(self.fp32, blocks, self.spreads, self.calibration)

    @cached_property
    def scan(self) -> list[BlockSensitivity]:
        """What each block costs, the most sensitive first."""
        self.note(f"INT8: scanning {len(self.blocks)} blocks")
        return analyse_sensitivity(self.fp32, self.blocks, self.spreads, SCAN_TAIL, self.calibration)


@dataclass(frozen=True)
class Quantiser:
    """What INT8 files are made from and judged on."""

    network: Network  # calibrated on images none of which are among those that it is judged on
    pixels: Pixels  # [n, S, S, 3], held out
    logits: Logits  # [n, classes], of the FP32 file
    floor: float  # percent
    compared: tuple[Pixels, Callable[[], Logits]]  # images and PyTorch's logits, for the parity of the manifest
    note: Callable[[str], None]

    def make_all(
        self,
        layout: Layout,
        source: Callable[[], Path],
        folder: Path,
        made_from: Origin,
        finished: ArtifactCache,
    ) -> list[Result]:
        """Return what `make` returns of a layout's files; of the heavy one only where the other has light blocks."""
        full, heavy = VARIANTS[layout]
        results = [self.make(full, source, folder, made_from, finished)]
        if isinstance(results[0], Artifact) and (made := results[0].quantization):
            left = set(heavy.left(self.network.blocks))
            if len(left) < len(self.network.blocks) and not left <= set(made.float_blocks):
                results.append(self.make(heavy, source, folder, made_from, finished))
        return results

    def make(
        self,
        variant: Variant,
        source: Callable[[], Path],
        folder: Path,
        made_from: Origin,
        finished: ArtifactCache,
    ) -> Result:
        """Return a file's artifact, or what became of it where it is not kept."""
        name, path, layout = variant.name, folder / variant.file, variant.layout
        seen = [digest(self.network.calibration), digest(self.pixels)]
        made_from = {**made_from, "int8": [name, self.floor, *seen]}
        if artifact := finished.take(name, made_from):
            self.note(f"{artifact.file}: finished before, and made from the same; it is kept")
            return artifact
        if before := finished.not_kept(name, made_from):
            self.note(f"{path.name}: {int8_sentence(before)} (found before, from the same)")
            return before
        known = {"name": name, "calibration_images": len(self.network.calibration)}
        if few := too_few(len(self.pixels), self.floor):  # to find that out again costs nothing: no made_from
            self.note(f"{path.name}: {int8_sentence(few)}")
            return few.model_copy(update={**known, "layout": layout})
        made = self.hold(source(), path, layout, variant.left(self.network.blocks))
        made = made.model_copy(update=known)
        self.note(f"{path.name}: {int8_sentence(made)}")
        if not made.kept:
            return made.model_copy(update={"made_from": fingerprint(made_from)})
        compared, reference = self.compared
        artifact = describe_artifact(
            folder,
            path.name,
            name=name,
            format=QDQ if layout == "tensorrt" else "onnx",
            precision="int8",
            backend=layout,
            executed=True,
            note=FOR_TENSORRT if layout == "tensorrt" else None,
            parity=compare(reference(), logits_of(path, compared), precision="int8"),
            quantization=made,
        )
        return finished.add(artifact, made_from)

    def hold(self, source: Path, path: Path, layout: Layout, left: tuple[str, ...]) -> Quantization:
        """Write ``path`` with as many of the network's blocks in INT8 as hold the floor; see `control_accuracy`."""
        network = self.network
        return control_accuracy(
            source,
            path,
            blocks=[block for block in network.blocks if block.name not in left],
            scan=[row for row in network.scan if row.block not in left],
            spreads=network.spreads,
            tail=network.tail,
            layout=layout,
            pixels=self.pixels,
            logits=self.logits,
            floor=self.floor,
            left=left,
            note=self.note,
        )


def calibration_of(learned: Learned) -> Pixels:
    """Return up to `CALIBRATION_IMAGES` images [n, S, S, 3] for the ranges of activations.

    Raises:
        ExportError: there is none.
    """
    if not learned.images:
        raise ExportError("there is no image to calibrate INT8 on that is not held out", fix="export without --int8")
    return learned.read(np.arange(min(CALIBRATION_IMAGES, learned.images)))


def digest(pixels: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of images."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()

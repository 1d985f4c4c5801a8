"""The INT8 part of an export: calibrate and scan once, then the files for each runtime that hold the fidelity floor.

There are two for each: one with as many blocks in INT8 as hold the floor, and one in which those with little arithmetic
for each value stay in float. Which is faster is for the device to say; `prgkit bench` asks it.

Where fewer than four blocks in five can be in INT8 so, the network is recovered by a fine-tune (see recover.py) with as
many blocks in INT8 as are within its reach, calibrated and scanned again, and the better of the two files is kept.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError, PrgkitError
from prgkit.export.bundle import QDQ, describe_artifact
from prgkit.export.fidelity import Logits, Pixels, choose_tail, hold_floor, logits_of, scan_blocks
from prgkit.export.finished import Artifact, Finished
from prgkit.export.floor import ENOUGH, Facts, blocks_in_int8, outcome, told, too_few, within_reach
from prgkit.export.onnx import write_fp16
from prgkit.export.parity import compare
from prgkit.export.quantize import HEAVY_WORK, Block, Layout, find_blocks, tensors_of
from prgkit.export.ranges import Spread, measure_spreads
from prgkit.export.recover import Learned
from prgkit.files import fingerprint, writing

CALIBRATION_IMAGES = 256
SCAN_TAIL = 0.02  # the share of the images that is clipped while blocks are scanned
Result = tuple[Artifact | None, Facts]  # a file's entry, None where it is not kept, and what was found of it
FOR_TENSORRT = "TensorRT's layout; its fidelity is that of this file in ONNX Runtime"


@dataclass(frozen=True)
class Variant:
    """One INT8 file of a bundle."""

    name: str
    file: str
    layout: Layout
    heavy: bool  # blocks below `HEAVY_WORK` stay in float

    def left(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Return which of a network's blocks stay in float in any case."""
        return tuple(block.name for block in blocks if self.heavy and block.work < HEAVY_WORK)


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
    made_from: dict[str, Any],
    finished: Finished,
    engines: Callable[[list[Artifact]], tuple[list[Artifact], list[Facts]]] | None,
) -> tuple[list[Artifact], list[Facts]]:
    """Make the INT8 files of ONNX Runtime in ``folder`` and, where ``engines`` builds from them, TensorRT's.

    Returns the entries of what is kept, and what was found of those that are not. ``half`` gives the FP16 file, over
    which TensorRT's layout is made: over FP32 its engine could be larger than one without INT8.
    """
    results = quantiser.make_all("onnxruntime", lambda: quantiser.network.fp32, folder, made_from, finished)
    if engines is not None:
        results += quantiser.make_all("tensorrt", half, folder, made_from, finished)
    kept = [entry for entry, _ in results if entry is not None]
    not_kept = [found for entry, found in results if entry is None]
    if engines is not None:
        built, not_built = engines([entry for entry in kept if entry["format"] == QDQ])
        kept, not_kept = kept + built, not_kept + not_built
    return kept, not_kept


@dataclass(frozen=True)
class Network:
    """An FP32 file and all that must be known to quantise it; calibration and scan happen once, when first needed."""

    fp32: Path
    student: Path  # the FP32 file whose answers are to be given
    calibration: Pixels  # [n, S, S, 3]
    note: Callable[[str], None]
    left: tuple[str, ...] = ()  # blocks that no file of it has in INT8

    @cached_property
    def blocks(self) -> list[Block]:
        """What can be quantised."""
        return [block for block in find_blocks(self.fp32) if block.name not in self.left]

    @property
    def nodes(self) -> set[str]:
        """The convolutions of all blocks."""
        return {node for block in self.blocks for node in block.nodes}

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
        floating = {row["block"] for row in self.scan[: len(self.scan) - math.ceil(ENOUGH * len(self.scan))]}
        blocks = [block for block in self.blocks if block.name not in floating]
        return choose_tail(self.fp32, blocks, self.spreads, self.calibration, student=self.student)

    @cached_property
    def scan(self) -> list[Facts]:
        """What each block costs, the most sensitive first."""
        self.note(f"INT8: scanning {len(self.blocks)} blocks")
        return scan_blocks(self.fp32, self.blocks, self.spreads, SCAN_TAIL, self.calibration, student=self.student)


@dataclass(frozen=True)
class Quantiser:
    """What INT8 files are made from and judged on."""

    network: Network  # calibrated on images none of which are among those that it is judged on
    pixels: Pixels  # [n, S, S, 3], held out
    logits: Logits  # [n, classes], of the FP32 file
    floor: float  # percent
    compared: tuple[Pixels, Callable[[], Logits]]  # images and PyTorch's logits, for the parity of the manifest
    # Writes the FP32 file of a network that bears INT8 better, but for some blocks that are left in float.
    recover: Callable[[Network, tuple[str, ...], Path], Facts]
    learned_from: str  # the fingerprint of the images for that
    work: Path  # a folder for files that do not stay
    note: Callable[[str], None]

    def make_all(
        self, layout: Layout, source: Callable[[], Path], folder: Path, made_from: dict[str, Any], finished: Finished
    ) -> list[Result]:
        """Return what `make` returns of a layout's files; of the heavy one only where the other has light blocks."""
        full, heavy = VARIANTS[layout]
        results = [self.make(full, source, folder, made_from, finished)]
        if (found := results[0][1])["kept"]:
            left = set(heavy.left(self.network.blocks))
            if len(left) < len(self.network.blocks) and not left <= set(found["float_blocks"]):
                results.append(self.make(heavy, source, folder, made_from, finished))
        return results

    def make(
        self, variant: Variant, source: Callable[[], Path], folder: Path, made_from: dict[str, Any], finished: Finished
    ) -> Result:
        """Return the entry of a file, or None where it is not kept; and what was found of it."""
        name, path, layout = variant.name, folder / variant.file, variant.layout
        seen = [digest(self.network.calibration), digest(self.pixels), self.learned_from]
        made_from = {**made_from, "int8": [name, self.floor, *seen]}
        if entry := finished.take(name, made_from):
            self.note(f"{entry['file']}: finished before, and made from the same; it is kept")
            return entry, entry["quantization"]
        if found := finished.not_kept(name, made_from):
            self.note(f"{path.name}: {told(found)} (found before, from the same)")
            return None, found
        found = too_few(len(self.pixels), self.floor)
        if found is None:
            found = self.hold(self.network, source(), path, layout, variant.left(self.network.blocks))
            found = found if variant.heavy else self.better(found, path, layout)
        calibrated = len(self.network.calibration)
        found = {"name": name, "layout": layout, "calibration_images": calibrated, **found}
        self.note(f"{path.name}: {told(found)}")
        if not found["kept"]:
            again = not variant.heavy and could_be_mended(found)
            return None, {**found, **({} if again else {"made_from": fingerprint(made_from)})}
        images, reference = self.compared
        entry = describe_artifact(
            folder,
            path.name,
            name=name,
            format_=QDQ if layout == "tensorrt" else "onnx",
            precision="int8",
            backend=layout,
            executed=True,
            note=FOR_TENSORRT if layout == "tensorrt" else None,
            parity=compare(reference(), logits_of(path, images), precision="int8").to_dict(),
        )
        return finished.add({**entry, "quantization": found}, made_from), found

    def hold(self, network: Network, source: Path, path: Path, layout: Layout, left: tuple[str, ...]) -> Facts:
        """Write ``path`` with as many of a network's blocks in INT8 as hold the floor; see `hold_floor`."""
        return hold_floor(
            source,
            path,
            blocks=[block for block in network.blocks if block.name not in left],
            scan=[row for row in network.scan if row["block"] not in left],
            spreads=network.spreads,
            tail=network.tail,
            layout=layout,
            pixels=self.pixels,
            logits=self.logits,
            floor=self.floor,
            left=left,
            note=self.note,
        )

    def better(self, before: Facts, path: Path, layout: Layout) -> Facts:
        """Hold the floor with the recovered network as well, and keep its file where more of it is in INT8."""
        if (count := within_reach(before)) is None:
            return before
        left = tuple(row["block"] for row in self.network.scan[:count])
        if (recovered := self.recovered(left)) is None:
            return before
        network, done = recovered
        source = network.fp32
        if layout == "tensorrt":
            write_fp16(network.fp32, source := self.work / "recovered.fp16.onnx")
        after = self.hold(network, source, again := self.work / path.name, layout, left)
        kept = blocks_in_int8(after) > blocks_in_int8(before)
        if kept:
            with writing(path) as temporary:
                shutil.copyfile(again, temporary)
        record = {"kept": kept, **done, "before": outcome(before, count), "after": outcome(after, count)}
        return {**(after if kept else before), "recovery": record}

    def recovered(self, left: tuple[str, ...]) -> tuple[Network, Facts] | None:
        """Return the network after its fine-tune, and what was done; None where that is not possible, and said."""
        path = self.work / "recovered.onnx"
        try:
            done = self.recover(self.network, left, path)
        except (PrgkitError, OSError) as error:
            self.note(f"INT8: no recovery: {error}")
            return None
        return Network(path, self.network.student, self.network.calibration, self.note, left), done


def could_be_mended(found: Facts) -> bool:
    """Tell whether the next export should try again: a recovery that might have helped did not come to its end."""
    return found["agreement"] is None or ("recovery" not in found and within_reach(found) is not None)


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

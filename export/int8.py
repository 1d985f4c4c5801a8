"""The INT8 part of an export: calibrate and scan once, then a file for each layout that holds the fidelity floor."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.export.bundle import QDQ, describe_artifact
from prgkit.export.fidelity import Logits, Pixels, choose_tail, hold_floor, logits_of, scan_blocks
from prgkit.export.finished import Artifact, Finished
from prgkit.export.floor import Facts, told, too_few
from prgkit.export.parity import compare
from prgkit.export.quantize import Block, Layout, find_blocks, tensors_of
from prgkit.export.ranges import Spread, measure_spreads

FILES: Mapping[Layout, str] = {"onnxruntime": "model.int8.onnx", "tensorrt": "model.int8.tensorrt.onnx"}
NAMES: Mapping[Layout, str] = {"onnxruntime": "onnx-int8", "tensorrt": "onnx-int8-tensorrt"}
FOR_TENSORRT = "TensorRT's layout; its fidelity is that of this file in ONNX Runtime"


def quantise(
    quantiser: Quantiser,
    folder: Path,
    *,
    half: Callable[[Path], None],
    made_from: dict[str, Any],
    finished: Finished,
    engine: Callable[[Artifact], Artifact] | None,
) -> tuple[list[Artifact], list[Facts]]:
    """Make ``model.int8.onnx`` in ``folder`` and, where ``engine`` builds one, TensorRT's layout and its engine.

    Returns the entries of what is kept, and what was found of those that are not. ``half`` writes the FP16 file, over
    which TensorRT's layout is made: over FP32 its engine could be larger than one without INT8.
    """
    entry, found = quantiser.make("onnxruntime", lambda: quantiser.fp32, folder, made_from, finished)
    results = [(entry, found)]
    if engine is not None:
        with tempfile.TemporaryDirectory() as work:

            def fp16() -> Path:
                if not (path := folder / "model.fp16.onnx").exists():
                    half(path := Path(work) / path.name)
                return path

            entry, found = quantiser.make("tensorrt", fp16, folder, made_from, finished)
        results.append((entry, found))
    kept = [entry for entry, _ in results if entry is not None]
    if engine is not None:
        kept += [engine(entry) for entry in list(kept) if entry["format"] == QDQ]
    return kept, [found for entry, found in results if entry is None]


@dataclass(frozen=True)
class Quantiser:
    """What INT8 files are made from and judged on; calibration and scan happen once, when first needed."""

    fp32: Path
    calibration: Pixels  # [n, S, S, 3], none of them among those that it is judged on
    pixels: Pixels  # [n, S, S, 3], held out
    logits: Logits  # [n, classes], of the FP32 file
    floor: float  # percent
    compared: tuple[Pixels, Callable[[], Logits]]  # images and PyTorch's logits, for the parity of the manifest
    note: Callable[[str], None]

    def make(
        self, layout: Layout, source: Callable[[], Path], folder: Path, made_from: dict[str, Any], finished: Finished
    ) -> tuple[Artifact | None, Facts]:
        """Return the entry of a layout's file, or None where it is not kept; and what was found of it."""
        name, path = NAMES[layout], folder / FILES[layout]
        made_from = {**made_from, "int8": [layout, self.floor, *map(digest, (self.calibration, self.pixels))]}
        if entry := finished.take(name, made_from):
            self.note(f"{entry['file']}: finished before, and made from the same; it is kept")
            return entry, entry["quantization"]
        found = too_few(len(self.pixels), self.floor) or hold_floor(
            source(),
            path,
            blocks=self.blocks,
            scan=self.scan,
            spreads=self.spreads,
            tail=self.tail,
            layout=layout,
            pixels=self.pixels,
            logits=self.logits,
            floor=self.floor,
            note=self.note,
        )
        found = {"name": name, "layout": layout, "calibration_images": len(self.calibration), **found}
        self.note(f"{path.name}: {told(found)}")
        if not found["kept"]:
            return None, found
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
        """How much of each tensor is clipped."""
        return choose_tail(self.fp32, self.blocks, self.spreads, self.calibration)

    @cached_property
    def scan(self) -> list[Facts]:
        """What each block costs, the most sensitive first."""
        self.note(f"INT8: scanning {len(self.blocks)} blocks")
        return scan_blocks(self.fp32, self.blocks, self.spreads, self.tail, self.calibration)


def digest(pixels: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of images."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()

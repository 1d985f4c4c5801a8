"""The INT8 files of ONNX, one for each runtime, calibrated once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prgkit.export.bundle.manifest import ONNX, OPENVINO_QDQ, QDQ
from prgkit.export.formats.base import Made
from prgkit.export.formats.onnx import quiet_runner
from prgkit.export.formats.student_export import StudentExport
from prgkit.export.int8 import nncf
from prgkit.export.int8.calibration import CLIP_QUANTILES, Spread, measure_spreads
from prgkit.export.int8.files import Int8File, Int8Judge, Pixels
from prgkit.export.int8.qdq import Quantizable, find_convolutions, tensors_of
from prgkit.export.runtimes.openvino import OpenVinoRunner
from prgkit.export.runtimes.parity import run_and_close
from prgkit.metrics import divergences

FOR_TENSORRT = "TensorRT's layout; it was judged in ONNX Runtime"

Logits = NDArray[np.float32]  # [images, classes]


def quantise(export: StudentExport, judge: Int8Judge) -> Made:
    """Make the INT8 file of each runtime, TensorRT's where engines are wanted.

    OpenVINO's is NNCF's work, where that is installed. TensorRT's layout is made over the FP16 file: over FP32 its
    engine could be larger than one without INT8.
    """
    network = Network(export.folder / "model.onnx", judge.calibration, export.note)
    write = partial(network.write, network.fp32, "onnxruntime")
    files = [Int8File("onnx-int8", "model.int8.onnx", "onnxruntime", ONNX, write, quiet_runner)]
    if nncf.installed():
        name, file = "onnx-int8-openvino", "model.int8.openvino.onnx"
        by_nncf = partial(nncf.write_for_openvino, network.fp32, pixels=judge.calibration)
        openvino = Int8File(name, file, "openvino", OPENVINO_QDQ, by_nncf, OpenVinoRunner, converters=nncf.PACKAGES)
        files.append(openvino)
    else:
        export.note(f"INT8: no file for OpenVINO is made, which takes NNCF: {nncf.INSTALL}")
    if export.options.trt:
        files.append(
            Int8File(
                "onnx-int8-tensorrt",
                "model.int8.tensorrt.onnx",
                "tensorrt",
                QDQ,
                write=lambda path: network.write(export.fp16_file, "tensorrt", path),
                runner=quiet_runner,
                options=("--int8", "--trt"),
                note=FOR_TENSORRT,
            )
        )
    return judge.make_all(files)


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

    def write(self, source: Path, layout: Literal["onnxruntime", "tensorrt"], path: Path) -> float:
        """Write ``source`` with its convolutions in INT8; return on which share of the images tensors are clipped."""
        Quantizable(source, self.spreads, self.clip_quantile, layout).write(path, self.convolutions)
        return self.clip_quantile


def choose_clip_quantile(
    fp32: Path, convolutions: Sequence[str], spreads: Mapping[str, Spread], pixels: Pixels
) -> float:
    """Return which of `CLIP_QUANTILES` clips best: with ``convolutions`` quantised, the root KL is the least."""
    logits = run_and_close(quiet_runner(fp32), pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clipped.onnx"

        def cost(clip_quantile: float) -> float:
            Quantizable(fp32, spreads, clip_quantile, "onnxruntime").write(path, convolutions)
            return root_kl(logits, run_and_close(quiet_runner(path), pixels))

        return min(CLIP_QUANTILES, key=cost)


def root_kl(fp32: Logits, quantised: Logits) -> float:
    """Return the mean over images of the square root of KL(FP32 || quantised), for logits [n, classes]; unit root nats.

    An answer changes as often as the error is large beside the margin, and KL grows with the error's square. Its own
    mean can be that of the few images on which a network's activations explode.
    """
    return float(np.sqrt(divergences(fp32, quantised)).mean())

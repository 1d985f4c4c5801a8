"""How far the values of each tensor of an ONNX file reach on each of some real images, and what 8 bits should cover.

A range is a percentile over images, not over values: on a few images activations can be hundreds of times as large as
on the others, each brings a whole feature map of them, and a share of all values that leaves them out clips every other
image as well (docs/results.md has both).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from prgkit.errors import ExportError

CALIBRATION_BATCH = 8
SAMPLED = 1 << 14  # values of a tensor that one image brings at the least, where it has as many
CLIPPED = 1e-4  # of them lie beyond the image's own range on either side
CLIP_QUANTILES = (0.0, 0.01, 0.02, 0.04, 0.08, 0.15)  # shares of the images that reach beyond a range on either side


class Spread:
    """How far one tensor's values reach on each image, but for the `CLIPPED` most extreme ones on either side."""

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []

    def add(self, values: NDArray[np.float32]) -> None:
        """Take the values [n, ...] of n images; those of an image that are not all finite would say nothing.

        Raises:
            ExportError: an image has such values, in the student's own FP32 file.
        """
        if not np.isfinite(values).all():
            raise ExportError(
                "on an image that the student learned from, its activations are infinite or no numbers",
                fix="export without --int8, and see whether the student is any good: prgkit bench",
            )
        flat = values.reshape(len(values), -1)
        ordered = np.sort(flat[:, :: max(1, flat.shape[1] // SAMPLED)], axis=1)
        beyond = int(CLIPPED * ordered.shape[1])
        self.lows += ordered[:, beyond].tolist()
        self.highs += ordered[:, -1 - beyond].tolist()

    def range(self, clip_quantile: float, *, symmetric: bool) -> tuple[float, float]:
        """Return the range beyond which a share of ``clip_quantile`` of the images reaches on either side.

        Zero is always in it: padding and ReLU make it exact.
        """
        low = min(0.0, float(np.quantile(self.lows, clip_quantile, method="higher")))
        high = max(0.0, float(np.quantile(self.highs, 1 - clip_quantile, method="lower")))
        return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def measure_spreads(path: Path, tensors: Sequence[str], pixels: NDArray[np.uint8]) -> dict[str, Spread]:
    """Run an FP32 file of ours on real images [n, S, S, 3] and return how the values of ``tensors`` spread."""
    import onnxruntime

    model = onnx.load(str(path))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    spreads = {name: Spread() for name in tensors}
    for start in range(0, len(pixels), CALIBRATION_BATCH):
        batch = pixels[start : start + CALIBRATION_BATCH]
        for name, values in zip(tensors, session.run(list(tensors), {"pixels": batch}), strict=True):
            spreads[name].add(values)
    return spreads

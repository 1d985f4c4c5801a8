"""How far the values of each tensor of an ONNX file spread on real images, and the range that 8 bits should cover."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

BINS = 4096
FIRST_LIMIT = 2.0**-6
SAMPLED = 1 << 16  # values of a tensor that one batch adds to its histogram; the extremes are of all values
CALIBRATION_BATCH = 8
# Shares of the values that may lie beyond a range, on either side: clipping rare ones makes the steps finer for all.
# RepViT is best served by the smaller ones, EfficientNet by the larger.
TAILS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


class Spread:
    """A histogram of one tensor's values, with limits that double when a value lies beyond them."""

    def __init__(self) -> None:
        self.limit = FIRST_LIMIT
        self.counts = np.zeros(BINS)  # [bins], from -limit to limit
        self.low, self.high = 0.0, 0.0  # zero is always in the range: padding and ReLU make it exact

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values of any shape."""
        flat = values.reshape(-1)
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        while max(-self.low, self.high) > self.limit:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(axis=1), BINS // 4)
            self.limit *= 2
        sampled = flat[:: max(1, flat.size // SAMPLED)]
        places = ((sampled + self.limit) * (BINS / (2 * self.limit))).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    def range(self, tail: float, *, symmetric: bool) -> tuple[float, float]:
        """Return the range that leaves a share of ``tail`` of the values out on either side; it holds zero."""
        centres = (np.arange(BINS) + 0.5) * (2 * self.limit / BINS) - self.limit  # [bins]
        below = np.cumsum(self.counts) / max(1.0, float(self.counts.sum()))  # [bins]
        low = min(0.0, max(self.low, float(centres[np.searchsorted(below, tail)])))
        high = max(0.0, min(self.high, float(centres[min(int(np.searchsorted(below, 1 - tail)), BINS - 1)])))
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

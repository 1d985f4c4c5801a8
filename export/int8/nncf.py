"""INT8 for OpenVINO by NNCF, its own quantiser: depthwise convolutions, sums and the head as well."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from prgkit.export.formats.onnx_graph import save
from prgkit.export.formats.open_vocabulary import scoring_nodes

PACKAGES = ("nncf", "openvino")  # by both of them its file is decided
INSTALL = "pip install 'prgkit[nncf]'"


def installed() -> bool:
    """Tell whether NNCF is here, and OpenVINO, in which its file is judged."""
    return all(importlib.util.find_spec(package) for package in PACKAGES)


def write_for_openvino(fp32: Path, path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an FP32 file of ours with Q/DQ nodes as NNCF places them, calibrated on ``pixels`` [n, S, S, 3].

    Activations are symmetric: with zero-points OpenVINO took twice the time (docs/results.md). Scoring by class vectors
    stays in float: vectors in INT8 could not be changed afterwards.
    """
    nncf: Any = importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    source = onnx.load(str(fp32))
    images = nncf.Dataset([{source.graph.input[0].name: image[None]} for image in pixels])
    how = {
        "preset": nncf.QuantizationPreset.PERFORMANCE,
        "fast_bias_correction": True,
        "ignored_scope": nncf.IgnoredScope(names=[node.name for node in scoring_nodes(source.graph)]),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars: stdout is for results
        model = nncf.quantize(source, images, subset_size=len(pixels), **how)
    del model.graph.value_info[:]  # inferred shapes, which other class vectors would contradict
    save(model, path)

"""The student for runtimes that bring their own preprocessing: an ONNX file that takes normalised floats, NCHW."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.export.bundle.bundle import NCHW, describe_artifact
from prgkit.export.bundle.manifest import Artifact, TensorSpec
from prgkit.export.formats.onnx_graph import normalised_input, rename, save
from prgkit.export.runtimes.base import OnnxRunner
from prgkit.export.runtimes.parity import require_agreement, run_batches

FILE = "model.nchw.onnx"
INPUT = "images"
NAME = "onnx-nchw"


def nchw_artifact(
    folder: Path,
    *,
    pixels: NDArray[np.uint8],
    reference_logits: NDArray[np.float32],
    preprocessing: Preprocessing,
    note: Callable[[str], None],
) -> Artifact:
    """Write ``model.nchw.onnx`` beside the FP32 file in ``folder`` and return its manifest entry.

    ``pixels`` [n, S, S, 3] are normalised here, outside of the file, and it must then give PyTorch's
    ``reference_logits`` [n, classes].

    Raises:
        ParityError: it does not.
    """
    write_nchw(folder / "model.onnx", folder / FILE, preprocessing)
    runner = NormalisingRunner(folder / FILE, preprocessing)
    parity = require_agreement(reference_logits, run_batches(runner, pixels), precision="fp32", names=("torch", NAME))
    runner.close()
    note(
        f"{FILE}: fp32 from normalised floats, max abs difference {parity.max_abs_difference:.2g}, "
        f"top-1 agreement {parity.top1_agreement:.2f} % on {parity.images} images"
    )
    return describe_artifact(
        folder,
        FILE,
        name=NAME,
        format=NCHW,
        precision="fp32",
        backend="onnxruntime",
        executed=True,
        note=None,
        parity=parity,
        input=float_input(preprocessing),
    )


def write_nchw(fp32_path: Path, path: Path, preprocessing: Preprocessing) -> None:
    """Write an FP32 file of ours without its cast, transpose and normalisation; all that follows them is the same."""
    model = onnx.load(str(fp32_path))
    graph = model.graph
    edge, before = normalised_input(graph)
    outside = {node.output[0] for node in before}
    inside = [node for node in graph.node if node.output[0] not in outside]
    for node in inside:
        rename(node.input, edge, INPUT)
        rename(node.input, "pixels", INPUT)  # of which only the batch is read; it comes first in both layouts
    used = {name for node in inside for name in node.input}
    weights = [initializer for initializer in graph.initializer if initializer.name in used]
    batch, height, width, _ = graph.input[0].type.tensor_type.shape.dim
    shape = [batch.dim_param, 3, height.dim_value, width.dim_value]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(inside)
    graph.initializer.extend(weights)
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    model.metadata_props.add(key="input", value=json.dumps(float_input(preprocessing).to_json()))
    save(model, path)


def float_input(preprocessing: Preprocessing) -> TensorSpec:
    """Return what the file takes, as the manifest and its own metadata say it."""
    return TensorSpec(
        name=INPUT,
        dtype="float32",
        layout="NCHW",
        shape=("batch", 3, *sides(preprocessing.image_size)),
        values="(RGB / 255 - mean) / std",
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


class NormalisingRunner:
    """Runs a file that takes normalised floats on the pixels that every other runner takes."""

    backend = "onnxruntime"
    max_batch: int | None = None

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        self._inner = OnnxRunner(path, name=NAME, spin=False)
        self._preprocessing = preprocessing
        self.name, self.device = NAME, self._inner.device

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        images: Any = normalised(pixels, self._preprocessing)  # an OnnxRunner hands on what its file takes
        return self._inner.run(images)

    def close(self) -> None:
        """Release the session."""
        self._inner.close()


def normalised(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return pixels [n, S, S, 3] as the file takes them: [n, 3, S, S], normalised channel by channel."""
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))  # [3]
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std  # [n, S, S, 3]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

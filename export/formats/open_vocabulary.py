"""What an open-vocabulary ONNX file of ours ends in: features scored by class vectors, a matrix that can be changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import MATRIX
from prgkit.export.formats.onnx_graph import rename, save, set_nodes
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.storage.reproducible import write_array

FEATURES = "features"  # [batch, D], what the network ends in
UNIT = "unit_features"  # [batch, D], the same of unit length
HALF = "_float16"
LEAST_LENGTH = 1e-12

Matrix = NDArray[np.float32]


def scored(features: Matrix, vectors: Matrix, logit_scale: float) -> Matrix:
    """Return logits [n, C] of unit features [n, D] by unit class vectors [C, D], as the file gives them."""
    logits: Matrix = np.float32(logit_scale) * (features @ vectors.T)
    return logits


def agreement_sentence(logits: Matrix, teacher_logits: Matrix) -> str:
    """Say how often a student that is scored by class vectors gives its teacher's answer, by logits [n, C] of both."""
    same = 100 * float((logits.argmax(axis=1) == teacher_logits.argmax(axis=1)).mean())
    return f"scored by class vectors, the student gives its teacher's answer on {same:.1f} % of {len(logits):,} images"


def append_scoring(model: onnx.ModelProto, vectors: Matrix, logit_scale: float) -> None:
    """Let a network that ends in ``features`` [batch, D] end in ``logits`` [batch, C]: s * l2norm(F) * V^T.

    The vectors V [C, D] are one initializer of a fixed name; the scale s is apart from them.
    """
    graph = model.graph
    constants = {
        MATRIX: vectors.astype(np.float32),
        "logit_scale": np.array(logit_scale, dtype=np.float32),
        "least_length": np.array(LEAST_LENGTH, dtype=np.float32),
        "feature_axis": np.array([1], dtype=np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())
    graph.node.extend(
        [
            helper.make_node("ReduceL2", [FEATURES, "feature_axis"], ["feature_length"], "feature_length", keepdims=1),
            helper.make_node("Max", ["feature_length", "least_length"], ["positive_length"], "positive_length"),
            helper.make_node("Div", [FEATURES, "positive_length"], [UNIT], UNIT),
            helper.make_node("Gemm", [UNIT, MATRIX], ["similarities"], "similarities", transB=1),
            helper.make_node("Mul", ["similarities", "logit_scale"], ["logits"], "logits"),
        ]
    )
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(vectors)]))


def scoring_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of `append_scoring` in an FP32 file, in order; none where the network has a class head."""
    start = next((place for place, node in enumerate(graph.node) if node.name == "feature_length"), None)
    return [] if start is None else list(graph.node[start:])


def half_scoring(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes of `append_scoring` for an FP16 file: their product alone is FP16.

    Nothing in it can leave float16: similarities lie within 1. The sum of D squares could, and the scale would widen
    what float16 rounds off, so the length is taken and the scale is applied in float32.
    """
    given: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type != "Gemm":
            given.append(node)
            continue
        enter = helper.make_node("Cast", [UNIT], [UNIT + HALF], UNIT + HALF, to=TensorProto.FLOAT16)
        leave = helper.make_node(
            "Cast", ["similarities" + HALF], ["similarities"], "similarities_float32", to=TensorProto.FLOAT
        )
        rename(node.input, UNIT, UNIT + HALF)
        rename(node.output, "similarities", "similarities" + HALF)
        given += [enter, node, leave]
    return given


def make_input(path: Path) -> None:
    """Turn the class vectors of a file into a second input [classes, D] float32, of as many classes as it is given.

    Raises:
        ExportError: it holds none that can be changed.
    """
    model = onnx.load(str(path))
    graph = model.graph
    matrix = class_vectors_in(graph, path)
    kind, width = matrix.data_type, matrix.dims[1]
    graph.initializer.remove(matrix)
    graph.input.append(helper.make_tensor_value_info(MATRIX, TensorProto.FLOAT, ["classes", width]))
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"  # in the place of their number
    if kind == TensorProto.FLOAT16:
        for node in graph.node:
            rename(node.input, MATRIX, MATRIX + HALF)
        graph.node.insert(0, helper.make_node("Cast", [MATRIX], [MATRIX + HALF], MATRIX + HALF, to=kind))
    save(model, path)


def write_classes(source: Path, path: Path, vectors: Matrix, classes: Sequence[str]) -> None:
    """Write a file with other class vectors [C, D], in the type that they have in it, and other names in its metadata.

    Where the vectors are an input, the names alone are other ones.

    Raises:
        ExportError: the file has them in no form that can be changed.
    """
    model = onnx.load(str(source))
    if MATRIX not in [one.name for one in model.graph.input]:
        matrix = class_vectors_in(model.graph, source)
        kind = helper.tensor_dtype_to_np_dtype(matrix.data_type)
        matrix.CopyFrom(numpy_helper.from_array(vectors.astype(kind), MATRIX))
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(classes)
    for entry in model.metadata_props:
        if entry.key == "classes":
            entry.value = json.dumps(list(classes), ensure_ascii=False)
    save(model, path)


def class_vectors_in(graph: onnx.GraphProto, path: Path) -> onnx.TensorProto:
    """Return the class vectors that the file at ``path`` holds; one that holds none is refused."""
    for initializer in graph.initializer:
        if initializer.name == MATRIX:
            return initializer
    raise ExportError(
        f"{path.name} holds no class vectors that can be changed",
        where=path,
        fix="remove the file, and export again where the student was trained: prgkit export --open-vocabulary",
    )


class FeatureRunner:
    """Runs an FP32 file of ours up to its unit features, keeps them, and scores them."""

    backend, device = "onnxruntime", "cpu"
    max_batch: int | None = None

    def __init__(self, path: Path, vectors: Matrix, logit_scale: float) -> None:
        self.name, self._vectors, self._scale = path.name, vectors, logit_scale
        self._seen: list[Matrix] = []
        with tempfile.TemporaryDirectory() as work:
            write_embedding(path, Path(work) / "features.onnx")
            self._runner = OnnxRunner(Path(work) / "features.onnx", name=path.name, spin=False)

    def run(self, pixels: NDArray[np.uint8]) -> Matrix:
        """Map pixels [batch, S, S, 3] to logits [batch, classes]."""
        self._seen.append(self._runner.run(pixels))
        return scored(self._seen[-1], self._vectors, self._scale)

    def take(self) -> Matrix:
        """Return the unit features [n, D] of all that was run since the last time."""
        features = np.concatenate(self._seen)
        self._seen = []
        return features

    def close(self) -> None:
        """Release the session."""
        self._runner.close()


def write_embedding(source: Path, path: Path) -> None:
    """Write an FP32 file without its product with the class vectors: it gives unit features [batch, D]."""
    model = onnx.load(str(source))
    graph = model.graph
    width = class_vectors_in(graph, source).dims[1]
    batch = graph.output[0].type.tensor_type.shape.dim[0].dim_param
    set_nodes(graph, [node for node in graph.node if node.name not in ("similarities", "logits")])
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(UNIT, TensorProto.FLOAT, [batch, width]))
    save(model, path)


def keep_features(
    folder: Path, runner: OnnxRunner | FeatureRunner, teacher_features: NDArray[np.float32] | None = None
) -> None:
    """Write the features of what a runner has just seen: with them, other class vectors give logits by one product."""
    if isinstance(runner, FeatureRunner):
        write_array(folder / "features.npy", runner.take())
        if teacher_features is not None:
            write_array(folder / "teacher_features.npy", teacher_features)

"""What an ONNX file of ours begins with, and how one is written; nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from prgkit.errors import ExportError, first_line
from prgkit.export.bundle.manifest import TensorSpec
from prgkit.storage.atomic import write_bytes

PROTOBUF_LIMIT = 2**31  # a larger model would need its weights in a second file


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check the model as a whole and write it as one file.

    It says the lowest IR version that its opset allows: runtimes refuse a newer one, whatever is in the file.

    Raises:
        ExportError: it is too large, or has what its opset does not know.
    """
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    if model.ByteSize() >= PROTOBUF_LIMIT:
        raise ExportError(
            "this student is larger than the 2 GB that one ONNX file can hold", fix="choose a smaller student"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        opset = model.opset_import[0].version
        raise ExportError(
            f"{path.name} would be no valid ONNX file of opset {opset}: {first_line(error)}",
            fix="--set export.opset=20 writes the default one",
        ) from error
    write_bytes(path, model.SerializeToString(deterministic=True))


def normalised_input(graph: onnx.GraphProto) -> tuple[str, list[onnx.NodeProto]]:
    """Follow the input through cast, scale, offset and transpose: the name of the network's input, and those nodes."""
    edge, before = "pixels", []
    while True:
        consumers = [node for node in graph.node if edge in node.input and node.op_type != "Shape"]
        if len(consumers) != 1 or consumers[0].op_type not in ("Cast", "Mul", "Add", "Transpose"):
            break
        before.append(consumers[0])
        edge = consumers[0].output[0]
    if "Transpose" not in [node.op_type for node in before]:
        raise ExportError(
            "this ONNX file does not begin with prgkit's preprocessing", fix="export it with: prgkit export"
        )
    return edge, before


def rename(names: Any, old: str, new: str) -> None:
    """Replace ``old`` by ``new`` in a repeated field of names."""
    for position, name in enumerate(names):
        if name == old:
            names[position] = new


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let a graph consist of these nodes, without the weights that none of them takes."""
    nodes = list(nodes)
    used = {name for node in nodes for name in node.input}
    weights = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)


def write_nchw(fp32_path: Path, path: Path, takes: TensorSpec) -> None:
    """Write an FP32 file of ours without its cast, transpose and normalisation; all that follows them is the same.

    ``takes`` is the input of the file that is written.
    """
    model = onnx.load(str(fp32_path))
    graph = model.graph
    edge, before = normalised_input(graph)
    outside = {node.output[0] for node in before}
    inside = [node for node in graph.node if node.output[0] not in outside]
    for node in inside:
        rename(node.input, edge, takes.name)
        rename(node.input, "pixels", takes.name)  # of which only the batch is read; it comes first in both layouts
    set_nodes(graph, inside)
    batch, height, width, _ = graph.input[0].type.tensor_type.shape.dim
    shape = [batch.dim_param, 3, height.dim_value, width.dim_value]
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(takes.name, TensorProto.FLOAT, shape))
    model.metadata_props.add(key="input", value=json.dumps(takes.to_json()))
    save(model, path)

"""INT8 as explicit Q/DQ nodes: what can be quantised in an ONNX file of ours, and the file in which that is so.

Two layouts. ONNX Runtime's x86 kernels want uint8 activations with a zero-point, and quantised inputs and outputs of
every convolution that shall run in 8 bits. TensorRT wants int8 activations around zero, on the inputs of convolutions
alone, over a graph whose other types are FP16. Weights are int8, symmetric, with a scale for each output channel.

On x86 without VNNI, ONNX Runtime's kernels add the products of two neighbouring channels in 16 bits, which saturate
where both activations and both weights are large. So no two neighbours of one sign may sum to more than 128 steps:
0.4 of the 8 bits on average, where weights of 7 bits, the usual remedy, cost a whole one
(benchmarks/results/emulated.json).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from prgkit.errors import ExportError
from prgkit.export.formats.onnx_graph import normalised_input, save, set_nodes
from prgkit.export.int8.calibration import Spread

QdqLayout = Literal["onnxruntime", "tensorrt"]
POOLS = ("ReduceMean", "GlobalAveragePool")
DENSE_CHANNELS = 32  # into a kernel larger than 1 x 1
LEAST_WORK = 24  # products per value that a 1 x 1 convolution takes or gives: below, rounding costs what INT8 gains
LEAST_SCALE = {np.dtype(np.float32): 1e-12, np.dtype(np.float16): 2.0**-14}  # below it float16 loses precision
MOST_BIAS = 2.0**30  # a bias is int32 in steps of input scale x weight scale


def find_convolutions(path: Path) -> list[str]:
    """Return the nodes that are quantised in an ONNX file of ours: every dense convolution of feature maps.

    There the arithmetic is. Depthwise ones, those of few channels and the sums between blocks stay in float: ONNX
    Runtime's 8-bit kernels for them are slower than its float ones (a whole EfficientNet-B0 in INT8 took 1.3 times
    FP32's time at 224 px), and their errors are the largest. What works on pooled features (squeeze-excite, the head)
    takes no time, and its errors reach everything.

    Raises:
        ExportError: there is no convolution to quantise, or the file is none of ours.
    """
    graph = onnx.load(str(path)).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    _, before = normalised_input(graph)
    outside = {node.output[0] for node in before} | {graph.output[0].name}
    pooled: set[str] = set()
    found = []
    for node in graph.node:
        activations = [name for name in node.input if name and name not in weights]
        if node.op_type in POOLS or (activations and all(name in pooled for name in activations)):
            pooled.update(node.output)
        elif (
            node.op_type == "Conv" and node.output[0] not in outside and is_dense(node, weights.get(node.input[1], ()))
        ):
            found.append(node.name)
    if not found:
        raise ExportError(f"{path.name} has no convolution to quantise", where=path, fix="export without --int8")
    return found


def is_dense(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Tell whether a convolution with weights of ``shape`` [out, in, height, width] mixes enough channels to gain."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    if len(shape) != 4 or groups != 1:
        return False
    products = shape[0] * shape[1] / (shape[0] + shape[1])
    return products >= LEAST_WORK if shape[2:] == (1, 1) else shape[1] >= DENSE_CHANNELS


def tensors_of(path: Path, convolutions: Collection[str]) -> list[str]:
    """Return the tensors whose values must be known to quantise ``convolutions``: what they take and give."""
    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [name for node in graph.node if node.name in convolutions for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if name and name not in weights]


@dataclass(frozen=True)
class Quantizable:
    """An ONNX file and all that says how its nodes become INT8."""

    source: Path  # the FP32 file for ONNX Runtime, the FP16 file for TensorRT
    spreads: Mapping[str, Spread]  # of the FP32 file
    clip_quantile: float  # the share of the spreads' images that may reach beyond a tensor's range on either side
    layout: QdqLayout

    def write(self, path: Path, nodes: Collection[str]) -> None:
        """Write the file with Q/DQ nodes around ``nodes``; all else in it stays as it is."""
        model = onnx.load(str(self.source))
        graph, chosen = model.graph, set(nodes)
        quantised = [node for node in graph.node if node.name in chosen]
        writer = QdqWriter(graph, self.spreads, self.clip_quantile, self.layout)
        for node in quantised:
            writer.quantise_inputs(node)
        if self.layout == "onnxruntime":
            for node in quantised:
                writer.quantise_output(node)
        writer.write(graph)
        save(model, path)


def weight_scales(weight: NDArray[Any], layout: QdqLayout) -> NDArray[Any]:
    """Return the step of each output channel [out] of a convolution's weights [out, in, h, w].

    For ONNX Runtime no two neighbouring input channels' steps of one sign sum to more than 128: 255 x 128 fits 16 bits.
    """
    if layout == "tensorrt":
        return np.asarray(np.abs(weight).max(axis=(1, 2, 3)) / 127)
    inner = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)  # [out, h * w * in], as the kernels multiply it
    pairs = np.pad(inner, ((0, 0), (0, inner.shape[1] % 2))).reshape(len(weight), -1, 2)
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=2), np.maximum(-pairs, 0).sum(axis=2))  # [out, pairs]
    return np.asarray(sums.max(axis=1) / 127)  # each of a pair is rounded by half a step


class QdqWriter:
    """The Q/DQ nodes of one file while it is written, one pair for each tensor."""

    def __init__(
        self, graph: onnx.GraphProto, spreads: Mapping[str, Spread], clip_quantile: float, layout: QdqLayout
    ) -> None:
        self.spreads, self.clip_quantile, self.layout = spreads, clip_quantile, layout
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        # The FP16 file enters its network through a cast of the tensor that the FP32 file's first layer takes.
        self.aliases = {node.output[0]: node.input[0] for node in graph.node if node.output[0] == "network_input"}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.after: dict[str, list[onnx.NodeProto]] = {}  # tensor -> the nodes that follow its producer
        self.first: list[onnx.NodeProto] = []  # what dequantises weights
        self.added: list[onnx.TensorProto] = []
        self.scales: dict[str, float] = {}

    def quantise_inputs(self, node: onnx.NodeProto) -> None:
        """Quantise what a convolution takes: its activations and its weights."""
        name = node.input[0].removesuffix("_dequantised")
        self.quantise(name)
        node.input[0] = f"{name}_dequantised"
        self.quantise_weights(node)

    def quantise_output(self, node: onnx.NodeProto) -> None:
        """Quantise what a node gives, for all who take it: only then can it run in 8 bits from end to end."""
        name = node.output[0]
        self.quantise(name)
        given, consumers = f"{name}_dequantised", self.consumers.get(name, [])
        if len(consumers) > 1 and any(consumer.op_type == "Sigmoid" for consumer in consumers):
            # x * sigmoid(x): ONNX Runtime would dequantise once for each of the two, and then not fuse them into one
            # pass, which costs more than INT8 gains. It leaves a sum of one term alone.
            once = helper.make_node("Sum", [given], [f"{name}_once"], f"{name}_once")
            self.after[name].append(once)
            given = once.output[0]
        for consumer in consumers:
            for place, taken in enumerate(consumer.input):
                if taken == name:
                    consumer.input[place] = given

    def quantise(self, name: str) -> None:
        """Add the pair of nodes that rounds a tensor, once."""
        if name in self.after:
            return
        spread = self.spreads[self.aliases.get(name, name)]
        kind: Any
        if self.layout == "onnxruntime":
            low, high = spread.range(self.clip_quantile, symmetric=False)
            kind, steps = np.uint8, 255
        else:
            low, high = spread.range(self.clip_quantile, symmetric=True)
            kind, steps = np.int8, 254
        scale = self.floating((high - low) / steps or 1.0)
        zero = kind(np.clip(np.round(-low / float(scale)), 0, 255)) if self.layout == "onnxruntime" else kind(0)
        self.scales[name] = float(scale)
        parameters = [self.constant(f"{name}_scale", scale), self.constant(f"{name}_zero_point", np.asarray(zero))]
        self.after[name] = [
            helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_quantised"], f"{name}_quantise"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantised", *parameters], [f"{name}_dequantised"], f"{name}_dequantise"
            ),
        ]

    def quantise_weights(self, node: onnx.NodeProto) -> None:
        """Replace a convolution's weights [out, in, h, w] by int8 and a scale for each output channel."""
        activation = node.input[0].removesuffix("_dequantised")
        weight = self.weights[node.input[1]].astype(np.float64)
        has_bias = len(node.input) > 2 and node.input[2] in self.weights
        bias = self.weights[node.input[2]].astype(np.float64) if has_bias else np.zeros(len(weight))
        scale = weight_scales(weight, self.layout)  # [out]
        if self.layout == "onnxruntime":  # its biases are int32 in steps of both scales: none may overflow
            scale = np.maximum(scale, np.abs(bias) / (self.scales[activation] * MOST_BIAS))
        scales = self.floating(scale)
        steps = scales.astype(np.float64)
        rounded = np.clip(np.round(weight / steps[:, None, None, None]), -127, 127).astype(np.int8)
        node.input[1] = self.dequantised(f"{node.name}_weight", rounded, scales)
        if self.layout == "onnxruntime" and has_bias:
            both = (self.scales[activation] * steps).astype(np.float32)
            node.input[2] = self.dequantised(f"{node.name}_bias", np.round(bias / both).astype(np.int32), both)

    def dequantised(self, name: str, values: NDArray[Any], scales: NDArray[Any]) -> str:
        """Add a constant in whole numbers, dequantised with a scale for each entry of its first axis."""
        parameters = [
            self.constant(f"{name}_quantised", values),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero_point", np.zeros(len(scales), values.dtype)),
        ]
        result = f"{name}_dequantised"
        self.first.append(helper.make_node("DequantizeLinear", parameters, [result], f"{name}_dequantise", axis=0))
        return result

    def floating(self, values: Any) -> NDArray[Any]:
        """Return scales in the type of the graph around them."""
        kind = np.dtype(np.float32 if self.layout == "onnxruntime" else np.float16)
        return np.maximum(np.asarray(values, dtype=np.float64), LEAST_SCALE[kind]).astype(kind)

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add an initializer."""
        self.added.append(numpy_helper.from_array(values, name))
        return name

    def write(self, graph: onnx.GraphProto) -> None:
        """Put the new nodes and constants into the graph, in an order in which it can run, and drop unused weights."""
        nodes = list(self.first)
        for node in graph.node:
            nodes += [node, *self.after.get(node.output[0], [])]
        set_nodes(graph, nodes)
        graph.initializer.extend(self.added)

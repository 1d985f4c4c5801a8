"""The precision asked of an engine is the one built: a network's types before it is built, an engine's after."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError, NotWorthItError

DTYPE_OF = {"fp32": "FLOAT", "fp16": "HALF", "int8": "HALF"}  # INT8 is Q/DQ nodes around FP16 layers
LEAST_INT8_WEIGHTS = 275_000  # of a convolution that tensorrt_rtx runs in INT8; see `leave_small_in_fp16`
HEAVY_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")  # what the precision is about


def layer_dtypes(network: Any) -> dict[str, dict[str, int]]:
    """Count the output types of a parsed network's layers, by layer type."""
    counts: dict[str, Counter[str]] = {}
    for layer in layers_of(network):
        counts.setdefault(layer.type.name, Counter())[layer.get_output(0).dtype.name] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def require_precision(types: dict[str, dict[str, int]], precision: str, onnx_path: Path) -> None:
    """Refuse a file whose convolutions and matrix products are not in the precision that was asked for."""
    if precision not in DTYPE_OF:
        raise ExportError(f"unknown precision {precision!r}", fix=f"one of: {', '.join(DTYPE_OF)}")
    if (precision == "int8") != bool(types.get("QUANTIZE", {}).get("INT8")):
        which = "no" if precision == "int8" else "INT8"
        raise ExportError(
            f"{precision} was asked for, and {onnx_path.name} holds {which} Q/DQ nodes",
            where=onnx_path,
            fix="an engine has the precision of its ONNX file: export --int8 --trt writes model.int8.tensorrt.onnx",
        )
    counts: Counter[str] = Counter()
    for kind in HEAVY_LAYERS:
        counts.update(types.get(kind, {}))
    if set(counts) != {DTYPE_OF[precision]}:
        held = ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items())) or "none at all"
        raise ExportError(
            f"{precision} was asked for, and {onnx_path.name} holds convolutions and products as {held}, "
            f"not {DTYPE_OF[precision]}",
            where=onnx_path,
            fix="an engine has the precision of its ONNX file: export --fp16 writes model.fp16.onnx",
        )


def leave_small_in_fp16(trt: Any, network: Any) -> tuple[tuple[int, int], list[NDArray[np.float16]]]:
    """Give an INT8 network's small convolutions FP16 activations and weights; the weights keep the values of INT8.

    TensorRT for RTX 1.7 fuses nothing into an INT8 convolution, not even its bias: what rounds its input and what
    follows it are kernels of their own, with their source in the engine, about 200 KB for each. INT8 saves a byte for
    each weight: with fewer weights than `LEAST_INT8_WEIGHTS` the engine is larger than FP16's, and launches more
    (benchmarks/results/engine_size.json).

    Returns how many stay in INT8, of how many, and arrays that must live until the engine is built.

    Raises:
        NotWorthItError: all are small.
    """
    made_by = {layer.get_output(0).name: layer for layer in layers_of(network)}
    quantised = []
    for layer in layers_of(network):
        before = made_by.get(layer.get_input(0).name) if layer.type.name == "CONVOLUTION" else None
        if before is not None and before.type.name == "DEQUANTIZE":
            quantised.append((layer, made_by[before.get_input(0).name].get_input(0)))  # what is rounded
    small = [pair for pair in quantised if prod(pair[0].get_input(1).shape) < LEAST_INT8_WEIGHTS]
    if len(small) == len(quantised):
        raise NotWorthItError(
            f"none of its {len(quantised)} quantised convolutions has {LEAST_INT8_WEIGHTS:,} weights, and what "
            f"{trt.__name__} builds around a smaller one takes more than INT8 saves, so FP16's engine is smaller"
        )
    alive = []
    for layer, activations in small:
        dequantise = made_by[layer.get_input(1).name]
        steps, scales = (constant(trt, made_by[dequantise.get_input(place).name]) for place in (0, 1))
        alive.append((steps.astype(np.float32) * scales.reshape(-1, 1, 1, 1).astype(np.float32)).astype(np.float16))
        layer.set_input(0, activations)
        layer.set_input(1, network.add_constant(alive[-1].shape, alive[-1]).get_output(0))
    return (len(quantised) - len(small), len(quantised)), alive


def constant(trt: Any, layer: Any) -> NDArray[Any]:
    """Return the values of a constant layer, in its shape."""
    layer.__class__ = trt.IConstantLayer  # a network gives its layers as their base class
    return np.asarray(layer.weights).reshape(tuple(layer.shape))


def layers_of(network: Any) -> list[Any]:
    """Return a network's layers."""
    return [network.get_layer(number) for number in range(network.num_layers)]


def refuse_tf32(trt: Any, config: Any) -> bool:
    """Clear the flag, on by default, that rounds FP32 products to 10 bits; returns what it is now."""
    flag = getattr(trt.BuilderFlag, "TF32", None)
    if flag is None:
        return False
    config.clear_flag(flag)
    return bool(config.get_flag(flag))


def inspect(trt: Any, logger: Any, plan: bytes, precision: str, onnx_path: Path) -> dict[str, int] | None:
    """Count the tensor types inside the built engine; FP16 that vanished is an error. None where no GPU can open it.

    One fused node shows nothing but its ends, so only an engine of several layers is judged.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:  # built for other GPUs than the one here
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    types: Counter[str] = Counter()
    for layer in layers:
        for tensor in (*layer.get("Inputs", []), *layer.get("Outputs", [])):
            types[str(tensor.get("DataType") or tensor.get("Format/Datatype"))] += 1  # 11, 10
    is_half = any("half" in kind.lower() or "fp16" in kind.lower() for kind in types)
    if len(layers) > 1 and is_half != (precision != "fp32"):
        raise ExportError(
            f"{precision} was asked for, and the built engine holds {dict(types)}",
            where=onnx_path,
            fix="report this build",
        )
    return dict(types)

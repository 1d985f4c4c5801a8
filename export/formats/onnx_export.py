"""A student leaves PyTorch: reparameterised, its preprocessing inside, its class names in the file's metadata."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import prgkit
from prgkit.config.image_size import Size, sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError, first_line
from prgkit.export.bundle.manifest import MATRIX
from prgkit.export.formats.onnx_graph import normalised_input, rename, save, set_nodes
from prgkit.export.formats.open_vocabulary import FEATURES, append_scoring, half_scoring, scoring_nodes
from prgkit.export.runtimes.parity import FP32_RELATIVE_TOLERANCE
from prgkit.student.heads import OpenVocabulary, pooled
from prgkit.student.model import reparameterised

FP16_MAX = 65504.0  # the largest finite float16
LEAST_TRACED_OPSET = 18  # of PyTorch's exporter; `lower_opset` goes below it


class OnnxExportModule(nn.Module):
    """The network that is exported: uint8 NHWC pixels in, float32 logits out.

    The pixels are cast before they are transposed, as TensorRT's parser demands, and laid out plainly: torch.export
    would trace channels-last strides into the graph. Normalisation is one multiplication and one addition after the
    transpose: before it, ONNX Runtime broadcasts three numbers at a time, a tenth of EfficientNet-B0's latency.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)
        mean, std = (values.detach().double().reshape(3, 1, 1).cpu() for values in (mean, std))
        self.register_buffer("scale", (1.0 / std).float())
        self.register_buffer("offset", (-mean / std).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [batch, S, S, 3] uint8 to logits [batch, classes] float32."""
        images = pixels.to(torch.float32).permute(0, 3, 1, 2).contiguous()  # [batch, 3, S, S]
        return cast(Tensor, self.network(images * self.scale + self.offset))


class Embedding(nn.Module):
    """An open-vocabulary network without the scoring of its features; its layers keep their names."""

    def __init__(self, network: OpenVocabulary) -> None:
        super().__init__()
        self.model, self.projector = network.model, network.projector

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, D] for normalised images [B, 3, S, S]."""
        return cast(Tensor, self.projector(pooled(self.model, images)))


class Evidence(nn.Module):
    """A network with its head at each place of its last feature map besides, [B, C, h, w]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, C] and evidence for normalised images [B, 3, S, S]: the logits are its mean and a bias."""
        maps = self.network.forward_features(images)  # type: ignore[operator]
        weight = self.network.get_classifier().weight  # type: ignore[operator]
        evidence = nn.functional.conv2d(maps, weight[:, :, None, None])
        return self.network.forward_head(maps), evidence  # type: ignore[operator]


@torch.no_grad()
def with_evidence(module: OnnxExportModule, pixels: NDArray[np.uint8]) -> OnnxExportModule:
    """Return a module that gives logits and evidence, where the logits are linear in the pooled last feature map.

    Raises:
        ExportError: they are not, on ``pixels`` [n, S, S, 3].
    """
    explained = copy.copy(module)
    explained._modules = dict(module._modules)
    explained.network = Evidence(module.network)
    try:
        logits, evidence = explained(torch.from_numpy(pixels[:32]))
        bias = logits - evidence.mean(dim=(2, 3))  # [n, C], the same for every image
        linear = bool((bias - bias[0]).abs().max() <= 1e-3 * max(1.0, float(logits.abs().max())))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        linear = False
    if not linear:
        raise ExportError(
            "there are no heat maps of this student: its logits are not linear in its pooled last feature map",
            fix="leave --explain out, or choose a RepViT or EfficientNet student without a second head",
        )
    if evidence.shape[2:] == (1, 1):
        raise ExportError(
            "there are no heat maps of this student: its last feature map has one place",
            fix="leave --explain out, or distil at a larger student.image_size: 224 gives 7 x 7 places",
        )
    return explained


@torch.no_grad()
def onnx_export_module(student: nn.Module, pixels: Tensor) -> OnnxExportModule:
    """Reparameterise and fuse a copy of ``student`` and assert that it computes what the student computes.

    Args:
        student: uint8 NHWC pixels to logits, with ``model`` (the timm network), ``mean`` and ``std`` (in 0..255).
        pixels: real images [n, S, S, 3] uint8 on which the two must agree.

    Raises:
        ExportError: fusing changed the logits.
    """
    student = student.eval().cpu()
    fused = OnnxExportModule(
        reparameterised(cast(nn.Module, student.model)), cast(Tensor, student.mean), cast(Tensor, student.std)
    ).eval()
    before = torch.cat([student(batch) for batch in torch.split(pixels, 32)])  # [n, classes]
    after = torch.cat([fused(batch) for batch in torch.split(pixels, 32)])
    difference = float((before - after).abs().max())
    tolerance = FP32_RELATIVE_TOLERANCE * max(1.0, float(before.abs().max()))
    agreement = 100.0 * float((before.argmax(1) == after.argmax(1)).float().mean())
    if not (difference <= tolerance and agreement == 100.0):
        raise ExportError(
            f"reparameterising changed the student on {len(pixels)} images: max abs difference {difference:.3g} "
            f"(allowed {tolerance:.3g}), top-1 agreement {agreement:.2f} % (must be 100 %)",
            fix="choose another student, or report this model: its fused form is not the network that was trained",
        )
    return fused


def export_onnx(
    module: OnnxExportModule,
    path: Path,
    *,
    image_size: Size,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    opset: int,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Write ``module`` as one FP32 ONNX file: input ``pixels`` [batch, H, W, 3] uint8, output ``logits`` float32."""
    if isinstance(network := module.network, OpenVocabulary):
        embedding = copy.deepcopy(module)
        embedding.network = Embedding(network)
        model = trace(embedding, image_size=image_size, opset=opset, outputs=(FEATURES,))
        append_scoring(model, network.scorer.vectors.cpu().numpy(), float(network.scorer.scale))
    else:
        model = trace(module, image_size=image_size, opset=opset, outputs=outputs)
    lower_opset(model, opset)
    strip_traces(model)
    describe(model, classes=classes, preprocessing=preprocessing)
    save(model, path)


def write_fp16(fp32_path: Path, path: Path) -> None:
    """Write the FP16 version of an FP32 file of ours: weights and activations float16, casts at the edges.

    Done on the graph and not by ``module.half()``: BatchNorm is already folded there, in float32, so variances that
    float16 cannot hold never meet it.

    Raises:
        ExportError: a weight is larger than float16 can hold.
    """
    model = onnx.load(str(fp32_path))
    graph = model.graph
    edge, before = normalised_input(graph)  # everything up to `edge` stays float32
    after = scoring_nodes(graph)
    end = FEATURES if after else "logits"
    kept = {name for node in (*before, *after) for name in node.input} - {MATRIX}
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.FLOAT and initializer.name not in kept:
            initializer.CopyFrom(half_tensor(initializer))
    outside = {node.output[0] for node in (*before, *after)}
    inside = [node for node in graph.node if node.output[0] not in outside]
    for node in inside:
        halve_attributes(node)
        rename(node.input, edge, "network_input")
        rename(node.output, end, "network_output")
        rename(node.input, end, "network_output")
    enter = helper.make_node("Cast", [edge], ["network_input"], "to_float16", to=TensorProto.FLOAT16)
    leave = helper.make_node("Cast", ["network_output"], [end], "to_float32", to=TensorProto.FLOAT)
    scoring = half_scoring(after)
    del graph.node[:]
    graph.node.extend([*before, enter, *inside, leave, *scoring])
    save(model, path)


@torch.no_grad()
def rehearse_fp16(module: nn.Module, pixels: Tensor) -> Tensor:
    """Run ``module`` as FP16 hardware would and return its logits, asserting that every value fits into float16.

    Weights of convolutions and linear layers, and all that enters or leaves a layer, are rounded to float16; sums are
    float32, as in tensor cores. ONNX Runtime on a CPU cannot show this: it computes FP16 files in float32. Inputs are
    checked as well as outputs, since a residual sum belongs to no layer of its own.

    Raises:
        ExportError: an activation reaches 65,504 on these images; names the layer and the value.
    """
    rounded = copy.deepcopy(module).eval()
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for parameter in layer.parameters():
                parameter.copy_(half_value(parameter, f"a weight of {name}"))
        if not list(layer.children()):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: tuple(half_value(value, name) for value in inputs)
            )
            layer.register_forward_hook(lambda _, inputs, output, name=name: half_value(output, name))
    return torch.cat([half_value(rounded(batch), "the logits") for batch in torch.split(pixels, 32)])


def trace(
    module: OnnxExportModule, *, image_size: Size, opset: int, outputs: Sequence[str] = ("logits",)
) -> onnx.ModelProto:
    """Run the dynamo exporter, quietly; two example images keep the batch dimension symbolic."""
    example = torch.zeros((2, *sides(image_size), 3), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=max(opset, LEAST_TRACED_OPSET),
                input_names=["pixels"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"PyTorch's ONNX exporter refused this student: {first_line(error)}",
            fix="choose a student of another family, or another opset in the recipe's export section",
        ) from error
    if program is None:
        raise ExportError("PyTorch's ONNX exporter returned nothing")
    return cast(onnx.ModelProto, program.model_proto)


def lower_opset(model: onnx.ModelProto, opset: int) -> None:
    """Bring a traced model to an ``opset`` that PyTorch's exporter does not write: reductions name their axes again.

    Raises:
        ExportError: an operator of the model is another one in that opset; or the exporter wrote none of both.
    """
    written = model.opset_import[0]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    forbidding = set()
    for node in model.graph.node if written.version > opset else ():
        if onnx.defs.get_schema(node.op_type, written.version, node.domain).since_version <= opset:
            continue
        if not node.op_type.startswith("Reduce") or len(node.input) != 2 or node.input[1] not in constants:
            forbidding.add(node.op_type)
            continue
        kept = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
        axes = numpy_helper.to_array(constants[node.input.pop(1)]).tolist()
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("axes", axes)])
    if forbidding or written.version < opset:
        what = (
            f"its {', '.join(sorted(forbidding))} came with opset {written.version}"
            if forbidding
            else "PyTorch did not"
        )
        raise ExportError(
            f"this student cannot be written in opset {opset}: {what}",
            fix=f"--set export.opset={written.version}, or choose another student",
        )
    written.version = opset
    set_nodes(model.graph, model.graph.node)  # without the axes that are attributes now


def half_value(value: Any, name: str) -> Any:
    """Round a tensor to float16, or refuse it by the name of its layer."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    or_else = "; or train with weight decay and gradient clipping"
    require_fp16(float(value.abs().max()), name, " on real images", or_else)
    return value.half().float()


def require_fp16(largest: float, name: str, where: str = "", or_else: str = "") -> None:
    """Refuse a value that float16 cannot hold, or that is no number."""
    if not largest < FP16_MAX:
        what = (
            f"FP16 cannot hold this student: {name} reaches {largest:,.0f}{where}, and float16 ends at {FP16_MAX:,.0f}"
        )
        fix = f"export without --fp16, and without --int8 --trt, whose file is made of FP16's{or_else}"
        raise ExportError(what, fix=fix)


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces: they hold this machine's paths and are larger than the graph itself."""
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]


def describe(model: onnx.ModelProto, *, classes: Sequence[str], preprocessing: Preprocessing) -> None:
    """Put into the file all that a program needs to use it without the rest of the bundle."""
    model.producer_name, model.producer_version = "prgkit", prgkit.__version__
    contract = {
        "prgkit": prgkit.__version__,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocessing": json.dumps(preprocessing.to_dict()),
    }
    helper.set_model_props(model, contract)


def half_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a float32 tensor as float16, under the same name."""
    values = numpy_helper.to_array(tensor)
    require_fp16(float(np.abs(values).max(initial=0.0)), f"weight {tensor.name}")
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)


def halve_attributes(node: onnx.NodeProto) -> None:
    """Turn what a node says of float32 into float16: the target of a cast, the value of a constant."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(half_tensor(attribute.t))

"""QNN: an ONNX file whose one node is a program that was compiled ahead of time for the NPU of a Qualcomm chip."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import QNN, TensorSpec
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.mobile.apart import run_apart
from prgkit.export.formats.mobile.require import require_converter
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section_on_files

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

NEVER_EXECUTED = "never executed here: it runs on a Qualcomm NPU"


class Chip(NamedTuple):
    """What QNN knows a chip by."""

    soc_model: int
    htp_arch: int  # the version of its NPU, Hexagon


# By the numbers of Qualcomm's SDK. Older NPUs, v68 and before, do not compute in FP16.
CHIPS = {
    "SM8450": Chip(36, 69),  # Snapdragon 8 Gen 1
    "SM8475": Chip(42, 69),  # 8+ Gen 1
    "SM8550": Chip(43, 73),  # 8 Gen 2
    "SM8650": Chip(57, 75),  # 8 Gen 3
    "SM8750": Chip(69, 79),  # 8 Elite
    "SM8850": Chip(87, 81),  # 8 Elite Gen 5
    "SC8380XP": Chip(60, 73),  # X Elite
}


def make_qnn(export: StudentExport) -> Made:
    """Compile the FP32 file, one image at a time, to compute in FP16."""
    chip = str(export.options.qnn).upper()
    pixels = TensorSpec(name="pixels", dtype="uint8", layout="NHWC", shape=(1, *export.pixels.shape[1:]))
    artifact = export.finish(
        f"qnn-{chip.lower()}",
        f"model.{chip.lower()}.qnn.onnx",
        write=lambda path: run_apart(compile_ahead, export.folder / "model.onnx", path, CHIPS[chip]),
        converters=("onnxruntime-qnn",),
        runner=None,
        format=QNN,
        precision="fp16",
        backend=f"onnxruntime-qnn, {chip}",
        note=NEVER_EXECUTED,
        input=pixels,
        export_options=("--qnn", chip),
    )
    return Made([artifact])


def compile_ahead(source: Path, path: Path, chip: Chip) -> None:
    """Compile an ONNX file for a chip's NPU, all of it or not at all, into an ONNX file that holds the program."""
    import onnx
    import onnxruntime
    import onnxruntime_qnn

    model = onnx.load(str(source))
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1  # NPUs take no batch that varies
    name = onnxruntime_qnn.get_ep_name()
    onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in (("enable", "1"), ("embed_mode", "1"), ("file_path", str(path))):
        options.add_session_config_entry(f"ep.context_{key}", value)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(chip.soc_model),
        "htp_arch": str(chip.htp_arch),
        "enable_htp_fp16_precision": "1",
        "htp_graph_finalization_optimization_mode": "3",  # the slowest compiler for the fastest program
        "offload_graph_io_quantization": "0",
    }
    options.add_provider_for_devices(devices[:1], settings)
    onnxruntime.InferenceSession(onnx.shape_inference.infer_shapes(model).SerializeToString(), options)


def require_qnn(options: ExportOptions) -> None:
    """Refuse a chip that is not known, and a machine on which the compiler is not installed."""
    require_converter(options, "QNN", modules=("onnxruntime_qnn",), extra="qnn")
    if str(options.qnn).upper() not in CHIPS:
        raise ExportError(f"--qnn: {options.qnn} is not known", fix=f"one of: {', '.join(CHIPS)}")


QNN_FORMAT = Format(
    "qnn",
    wanted=lambda options: options.qnn is not None,
    make=make_qnn,
    require=require_qnn,
    how_to_run=partial(section_on_files, "qnn.md", QNN),
    asked_by="--qnn CHIP",
)

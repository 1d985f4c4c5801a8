"""QNN: an ONNX file whose one node is a program that was compiled ahead of time for the NPU of a Qualcomm chip."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.manifest import Manifest, TensorSpec
from prgkit.export.formats.base import Format, Made, require_vectors_inside
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

QNN_CONTEXT = "qnn"  # the format of an artifact
INSTALL = "pip install 'prgkit[qnn]'"
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
        write=lambda path: compile_ahead(export.folder / "model.onnx", path, CHIPS[chip], export.work),
        writers=("onnxruntime-qnn",),
        runner=None,
        format=QNN_CONTEXT,
        precision="fp16",
        backend=f"onnxruntime-qnn, {chip}",
        note=NEVER_EXECUTED,
        input=pixels,
        export_options=("--qnn", chip),
    )
    return Made([artifact])


def compile_ahead(source: Path, path: Path, chip: Chip, work: Path) -> None:
    """Compile an ONNX file for a chip's NPU into an ONNX file that holds the program.

    It is done by another process: QNN's libraries print to stdout.

    Raises:
        ExportError: a part of the network does not run there.
    """
    import onnx

    model = onnx.load(str(source))
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1  # NPUs take no batch that varies
    onnx.save(onnx.shape_inference.infer_shapes(model), str(work / "one-image.onnx"))
    code = f"import sys; from {__name__} import compile_here; compile_here(*sys.argv[1:])"
    given = [str(work / "one-image.onnx"), str(path), str(chip.soc_model), str(chip.htp_arch)]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    if done.returncode or not path.exists():
        said = done.stderr.strip().splitlines() or ["it says nothing"]
        raise ExportError(
            f"QNN cannot compile this student: {said[-1]}", fix="export without --qnn, or choose another student"
        )


def compile_here(source: str, path: str, soc_model: str, htp_arch: str) -> None:
    """Compile an ONNX file of static shapes in this process."""
    runtime, qnn = importlib.import_module("onnxruntime"), importlib.import_module("onnxruntime_qnn")
    runtime.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    for key, value in (("enable", "1"), ("embed_mode", "1"), ("file_path", path)):
        options.add_session_config_entry(f"ep.context_{key}", value)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # all of it, or an error
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
    options.add_provider_for_devices(devices[:1], {
        "backend_path": qnn.get_qnn_htp_path(),
        "soc_model": soc_model,
        "htp_arch": htp_arch,
        "enable_htp_fp16_precision": "1",
        "htp_graph_finalization_optimization_mode": "3",
        "offload_graph_io_quantization": "0",
    })  # fmt: skip
    runtime.InferenceSession(source, options)


def require_qnn(options: ExportOptions) -> None:
    """Refuse a chip that is not known, and a machine on which the compiler is not installed."""
    require_vectors_inside(options, "compiled files")
    if str(options.qnn).upper() not in CHIPS:
        raise ExportError(f"--qnn: {options.qnn} is not known", fix=f"one of: {', '.join(CHIPS)}")
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise BackendError("--qnn needs onnxruntime-qnn, which is not installed", fix=INSTALL)


def how_to_run(manifest: Manifest) -> str:
    """Return how the files are run on their chip, where there are any."""
    files = [artifact for artifact in manifest.artifacts if artifact.format == QNN_CONTEXT]
    return section("qnn.md", manifest, files=files) if files else ""


QNN = Format(
    "qnn",
    "qnn",
    wanted=lambda options: options.qnn is not None,
    make=make_qnn,
    require=require_qnn,
    how_to_run=how_to_run,
)

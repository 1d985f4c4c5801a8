"""ONNX for runtimes that bring their own preprocessing: a file that takes normalised floats, NCHW."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.export.bundle.manifest import NCHW, TensorSpec
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.onnxruntime import NormalisingRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

FILE = "model.nchw.onnx"
INPUT = "images"


def make_nchw(export: StudentExport) -> Made:
    """Cut the preprocessing off the FP32 file; pixels that are normalised outside must give PyTorch's logits."""
    from prgkit.export.formats.onnx_graph import write_nchw

    takes = float_input(export.preprocessing)
    artifact = export.finish(
        ONNX_NCHW.name,
        FILE,
        write=lambda path: write_nchw(export.folder / "model.onnx", path, takes),
        runner=lambda path: NormalisingRunner(path, export.preprocessing),
        kind=" from normalised floats",
        format=NCHW,
        precision="fp32",
        input=takes,
        export_options=("--float-input",),
    )
    return Made([artifact])


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


ONNX_NCHW = Format(
    "onnx-nchw",
    wanted=lambda options: options.float_input,
    make=make_nchw,
    how_to_run=partial(section, "float_input.md"),
    asked_by="--float-input",
)

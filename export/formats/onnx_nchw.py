"""ONNX for runtimes that bring their own preprocessing: a file that takes normalised floats, NCHW."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.export.bundle.manifest import NCHW, Manifest, TensorSpec
from prgkit.export.formats.base import Format, Made
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


def float_sections(manifest: Manifest) -> str:
    """Return what a reader must know of the file."""
    files = [artifact for artifact in manifest.artifacts if artifact.format == NCHW]
    return "".join(float_section(artifact.file, artifact.input) for artifact in files if artifact.input)


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


def float_section(file: str, takes: TensorSpec) -> str:
    """Return what a reader must know of the file that takes normalised floats."""
    mean, std, shape = list(takes.mean or ()), list(takes.std or ()), ", ".join(map(str, takes.shape))
    return f"""
## Floats in place of pixels

`{file}` is the same network for a runtime or tool that prepares images itself: input `{takes.name}`
[{shape}] float32, {takes.layout}, `{takes.values}` with mean {mean} and std
{std} of red, green and blue. Resize and crop as above.
"""


ONNX_NCHW = Format(
    "onnx-nchw",
    "distill",
    wanted=lambda options: options.float_input,
    make=make_nchw,
    how_to_run=float_sections,
    preprocessing_inside=False,
)

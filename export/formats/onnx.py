"""ONNX in FP32 and FP16: pixels in, logits out, the class names in the file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prgkit.export.bundle.manifest import ONNX
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.onnxruntime import OnnxRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"


def make_fp32(export: StudentExport) -> Made:
    """Trace the student and write it."""
    from prgkit.export.formats.onnx_export import export_onnx

    def write(path: Path) -> None:
        export_onnx(
            export.module,
            path,
            image_size=export.preprocessing.image_size,
            classes=export.classes,
            preprocessing=export.preprocessing.to_dict(),
            opset=export.options.opset,
        )

    how: dict[str, Any] = {"format": ONNX, "precision": "fp32", "runner": quiet_runner}
    return Made([export.finish(ONNX_FP32.name, "model.onnx", write=write, **how)])


def make_fp16(export: StudentExport) -> Made:
    """Halve the FP32 file's weights and activations."""
    how: dict[str, Any] = {"format": ONNX, "precision": "fp16", "note": CPU_FP16, "runner": quiet_runner}
    how |= {"write": export.write_fp16, "export_options": ("--fp16",)}
    return Made([export.finish(ONNX_FP16.name, "model.fp16.onnx", **how)])


def quiet_runner(path: Path) -> OnnxRunner:
    """Open a file with threads that do not wait busily."""
    return OnnxRunner(path, spin=False)


ONNX_FP32 = Format(
    "onnx-fp32",
    "distill",
    wanted=lambda options: True,
    make=make_fp32,
    how_to_run=partial(section, "onnxruntime.md"),
)
ONNX_FP16 = Format("onnx-fp16", "distill", wanted=lambda options: options.fp16, make=make_fp16)

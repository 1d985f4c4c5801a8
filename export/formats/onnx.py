"""ONNX in FP32 and FP16: pixels in, logits out, the class names in the file; and one that also says where."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import EXPLAIN, ONNX
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import section
from prgkit.export.runtimes.onnxruntime import OnnxRunner

if TYPE_CHECKING:
    from prgkit.export.formats.onnx_export import OnnxExportModule
    from prgkit.export.formats.student_export import StudentExport

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"


def make_fp32(export: StudentExport) -> Made:
    """Trace the student and write it."""

    def write(path: Path) -> None:
        write_fp32(export, path, export.module)

    how = {"format": ONNX, "precision": "fp32", "runner": quiet_runner}
    return Made([export.finish(ONNX_FP32.name, "model.onnx", write=write, **how)])


def write_fp32(
    export: StudentExport, path: Path, module: OnnxExportModule, outputs: Sequence[str] = ("logits",)
) -> None:
    """Write a module of the student's as FP32."""
    from prgkit.export.formats.onnx_export import export_onnx

    facts = export.preprocessing
    export_onnx(
        module,
        path,
        image_size=facts.image_size,
        classes=export.classes,
        preprocessing=facts.to_dict(),
        opset=export.options.opset,
        outputs=outputs,
    )


def make_fp16(export: StudentExport) -> Made:
    """Halve the FP32 file's weights and activations."""
    how: dict[str, Any] = {"format": ONNX, "precision": "fp16", "note": CPU_FP16, "runner": quiet_runner}
    how |= {"write": export.write_fp16, "export_options": ("--fp16",)}
    return Made([export.finish(ONNX_FP16.name, "model.fp16.onnx", **how)])


def quiet_runner(path: Path) -> OnnxRunner:
    """Open a file with threads that do not wait busily."""
    return OnnxRunner(path, spin=False)


def make_explain(export: StudentExport) -> Made:
    """Trace the student once more; its head at each place of the last feature map is a second output.

    Such maps are class activation maps (Zhou et al., 2016).
    """

    from prgkit.export.formats.onnx_export import with_evidence

    def write(path: Path) -> None:
        write_fp32(export, path, with_evidence(export.module, export.pixels), outputs=("logits", "evidence"))

    artifact = export.finish(
        ONNX_EXPLAIN.name,
        "model.explain.onnx",
        write=write,
        runner=quiet_runner,
        kind=" with evidence",
        format=EXPLAIN,
        precision="fp32",
        export_options=("--explain",),
    )
    return Made([artifact])


def require_own_head(options: ExportOptions) -> None:
    """Refuse class vectors: features are brought to unit length before these, so that no place has a share of them."""
    if options.explain and options.class_vectors:
        raise ExportError("there are no heat maps of a student that is scored by class vectors", fix="leave one out")


ONNX_FP32 = Format(
    "onnx-fp32",
    "distill",
    wanted=lambda options: True,
    make=make_fp32,
    how_to_run=partial(section, "onnxruntime.md"),
)
ONNX_FP16 = Format("onnx-fp16", "distill", wanted=lambda options: options.fp16, make=make_fp16)
ONNX_EXPLAIN = Format(
    "onnx-explain",
    "distill",
    wanted=lambda options: options.explain,
    make=make_explain,
    require=require_own_head,
    how_to_run=partial(section, "explain.md"),
)

"""ONNX in INT8, in the layout of each runtime, where that is as good as FP32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prgkit.errors import ExportError
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.options import ExportOptions

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

FP16_SCALES_OPSET = 19


def require_scales(options: ExportOptions) -> None:
    """Refuse INT8 engines of an opset that has no FP16 scales."""
    if options.int8 and options.trt and options.opset < FP16_SCALES_OPSET:
        raise ExportError(
            f"INT8 for TensorRT cannot be written in opset {options.opset}: its scales are FP16, which came with opset "
            f"{FP16_SCALES_OPSET}",
            fix=f"set export.opset to {FP16_SCALES_OPSET} or more, or export without --int8 or without --trt",
        )


def make_int8(export: StudentExport) -> Made:
    """Quantise the FP32 file for each runtime and, where engines are wanted, the FP16 file for TensorRT."""
    from prgkit.export.int8.files import int8_judge
    from prgkit.export.int8.quantise import quantise

    judge = int8_judge(export)
    return Made() if judge is None else quantise(export, judge)


ONNX_INT8 = Format(
    "onnx-int8",
    wanted=lambda options: options.int8,
    make=make_int8,
    require=require_scales,
    asked_by="--int8",
)

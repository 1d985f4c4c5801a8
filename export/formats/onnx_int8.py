"""ONNX in INT8: as many blocks of the network as keep the fidelity floor, in the layouts of two runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prgkit.errors import ExportError
from prgkit.export.bundle.manifest import Artifact, Manifest
from prgkit.export.formats.base import Made
from prgkit.export.formats.options import ExportOptions

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

FP16_SCALES_OPSET = 19


@dataclass(frozen=True)
class OnnxInt8:
    """Files for ONNX Runtime and, where engines are wanted, for TensorRT to build from."""

    name: str = "onnx-int8"
    extra: str | None = "distill"
    preprocessing_inside: bool = True

    def wanted(self, options: ExportOptions) -> bool:
        """Tell whether 8-bit integers are asked for."""
        return options.int8

    def require(self, options: ExportOptions) -> None:
        """Refuse INT8 engines of an opset that has no FP16 scales."""
        if options.int8 and options.trt and options.opset < FP16_SCALES_OPSET:
            raise ExportError(
                f"INT8 for TensorRT cannot be written in opset {options.opset}: its scales are FP16, which came with "
                f"opset {FP16_SCALES_OPSET}",
                fix=f"set export.opset to {FP16_SCALES_OPSET} or more, or export without --int8 or without --trt",
            )

    def make(self, export: StudentExport) -> Made:
        """Quantise the FP32 file, and the FP16 file for TensorRT."""
        from prgkit.export.int8.quantise import quantise

        if export.calibration is None:
            return Made()
        results, names = quantise(export, export.calibration())
        kept = [result for result in results if isinstance(result, Artifact)]
        return Made(kept, [result for result in results if not isinstance(result, Artifact)], names)

    def how_to_run(self, manifest: Manifest) -> str:
        """Say nothing: it runs as the FP32 file does."""
        return ""


ONNX_INT8 = OnnxInt8()

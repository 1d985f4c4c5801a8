"""ONNX in FP32 and FP16: pixels in, logits out, the class names in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prgkit.export.bundle.manifest import ONNX, Manifest
from prgkit.export.formats.base import Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import cpp_section
from prgkit.export.runtimes.onnxruntime import OnnxRunner

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

CPU_FP16 = "ONNX Runtime's CPU provider computes in float32 with the float16 weights"


@dataclass(frozen=True)
class OnnxFp32:
    """The file that every bundle has, and that most others are made of."""

    name: str = "onnx-fp32"
    extra: str | None = "distill"
    preprocessing_inside: bool = True

    def wanted(self, options: ExportOptions) -> bool:
        """Tell that it is always made."""
        return True

    def require(self, options: ExportOptions) -> None:
        """Refuse nothing."""

    def make(self, export: StudentExport) -> Made:
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

        how = {"format": ONNX, "precision": "fp32", "runner": quiet_runner}
        return Made([export.finish(self.name, "model.onnx", write=write, **how)])

    def how_to_run(self, manifest: Manifest) -> str:
        """Return how it runs in C++, and how its classes are changed where they can be."""
        return cpp_section(manifest)


@dataclass(frozen=True)
class OnnxFp16:
    """Half the size, and what FP16 engines are built from."""

    name: str = "onnx-fp16"
    extra: str | None = "distill"
    preprocessing_inside: bool = True

    def wanted(self, options: ExportOptions) -> bool:
        """Tell whether 16-bit floats are asked for."""
        return options.fp16

    def require(self, options: ExportOptions) -> None:
        """Refuse nothing."""

    def make(self, export: StudentExport) -> Made:
        """Halve the FP32 file's weights and activations."""
        how = {"format": ONNX, "precision": "fp16", "note": CPU_FP16, "runner": quiet_runner}
        options = ("--fp16",)
        return Made(
            [export.finish(self.name, "model.fp16.onnx", write=export.write_fp16, export_options=options, **how)]
        )

    def how_to_run(self, manifest: Manifest) -> str:
        """Say nothing: it runs as the FP32 file does."""
        return ""


ONNX_FP32, ONNX_FP16 = OnnxFp32(), OnnxFp16()


def quiet_runner(path: Path) -> OnnxRunner:
    """Open a file with threads that do not wait busily."""
    return OnnxRunner(path, spin=False)

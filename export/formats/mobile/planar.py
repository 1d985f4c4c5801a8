"""The student for converters that take TorchScript: one image in planes, as floats from 0 to 255."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prgkit.config.image_size import sides
from prgkit.export.formats.onnx_export import OnnxExportModule

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


class PlanarStudent(nn.Module):
    """A fused student of an image in planes: mean and standard deviation are inside."""

    def __init__(self, module: OnnxExportModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        """Map RGB [1, 3, H, W] float32, 0 to 255, to logits [1, classes]."""
        return cast(Tensor, self.module.network(image * self.module.scale + self.module.offset))


def torchscript(export: StudentExport) -> Path:
    """Return a file with the student of an export in TorchScript."""
    path = export.work / "planar.pt"
    if not path.exists():
        traced(PlanarStudent(export.module), sides(export.preprocessing.image_size)).save(str(path))
    return path


def classifier(torchscript: Path, size: tuple[int, int]) -> Any:
    """Return the student of a TorchScript file for images [1, 3, H, W] of a ``size``, its logits as probabilities."""
    student = torch.jit.load(str(torchscript))  # type: ignore[no-untyped-call]
    return traced(nn.Sequential(student, nn.Softmax(dim=1)), size)


def traced(student: nn.Module, size: tuple[int, int]) -> Any:
    """Return a student as TorchScript, which PyTorch calls deprecated and these converters ask for."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(student.eval(), torch.zeros((1, 3, *size)), check_trace=False)  # type: ignore[no-untyped-call]

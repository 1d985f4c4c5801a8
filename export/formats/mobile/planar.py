"""The student as converters take it: TorchScript of one image in planes, as floats from 0 to 255."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from prgkit.config.image_size import Size, sides
from prgkit.export.formats.onnx_export import OnnxExportModule


class PlanarStudent(nn.Module):
    """A fused student whose input is RGB [1, 3, H, W], 0 to 255: mean and standard deviation are inside."""

    def __init__(self, module: OnnxExportModule, *, probabilities: bool = False) -> None:
        super().__init__()
        self.module, self.probabilities = module, probabilities

    def forward(self, image: Tensor) -> Any:
        """Map an image [1, 3, H, W] to logits [1, classes], or to probabilities and logits."""
        logits = cast(Tensor, self.module.network(image * self.module.scale + self.module.offset))
        return (logits.softmax(dim=1), logits) if self.probabilities else logits


def trace_planar(student: PlanarStudent, image_size: Size) -> Any:
    """Return a student as TorchScript, quietly: PyTorch calls it deprecated, and converters still ask for it."""
    example = torch.zeros((1, 3, *sides(image_size)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(student.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]

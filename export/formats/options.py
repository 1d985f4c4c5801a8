"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BATCH = (1, 1, 32)


@dataclass(frozen=True)
class ExportOptions:
    """What to export besides FP32 ONNX, and how."""

    opset: int = 20
    fp16: bool = False
    int8: bool = False
    margin: float = 2.0  # percent points that INT8 may be worse than FP32
    float_input: bool = False  # also a file that takes normalised floats, NCHW
    explain: bool = False  # also a file that says where in an image each class was found
    trt: bool = False
    batch: tuple[int, int, int] | None = None  # of the engines: min, opt, max; None: the recipe's
    backend: str | None = None  # None: tensorrt where a GPU is, else tensorrt_rtx
    sm: tuple[str, ...] | None = None  # GPU generations, as "SM86"; None: all that tensorrt_rtx builds for
    class_vectors: Literal["initializer", "input"] | None = None  # in place of a class head; None: as it was trained
    embedding: bool = False  # also files that give the student's embedding; class vectors are in place of a head then
    evaluation_images: int | None = None  # that travel; None: as many as the recipe says
    qnn: str | None = None  # a chip of Qualcomm's, as "SM8550", whose NPU a file is compiled for
    formats: tuple[str, ...] = ()  # the names of further formats

    @property
    def batch_profile(self) -> tuple[int, int, int]:
        """The batch sizes of engines: min, opt, max."""
        return self.batch or BATCH

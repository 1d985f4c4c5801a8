"""LiteRT and ExecuTorch: real conversions of a small student, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.export.formats.options import ExportOptions

SIDE = 16
IMAGES = 256


def network() -> Any:
    """Return a network with what RepViTs and EfficientNets are made of."""
    torch = pytest.importorskip("torch")
    from timm.layers import SqueezeExcite

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, 2, 1),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 32, 3, 1, 1),
        torch.nn.Conv2d(32, 32, 3, 1, 1, groups=32),
        SqueezeExcite(32),
        torch.nn.SiLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 3),
    )


def find_executorch() -> bool:
    import importlib.util

    return importlib.util.find_spec("executorch") is not None


def export(folder: Path, **options: Any) -> SimpleNamespace:
    """Export the network with ``options``; return the manifest and what was noted."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from prgkit.data.preprocessing import Preprocessing
    from prgkit.export.formats.student_export import CalibrationSet
    from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student

    class Student(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()
            self.register_buffer("mean", torch.full((3,), 127.5))
            self.register_buffer("std", torch.full((3,), 60.0))

        def forward(self, pixels: Any) -> Any:
            return self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))

    colours = np.random.default_rng(0).integers(0, 256, (2 * IMAGES, 4, 4, 3), dtype=np.uint8)
    pixels = colours.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    facts = {
        "run": {"name": "colours", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
        "recipe": {},
        "teacher": {"model": "eye", "fingerprint": "1" * 16},
        "student": {"model": "small"},
    }
    teacher = np.eye(3, dtype=np.float32)[np.arange(IMAGES) % 3]
    notes: list[str] = []
    manifest = export_student(
        TrainedStudent(
            Student(),
            ["red", "green", "blue"],
            Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3),
            StudentOrigin.model_validate(facts),
        ),
        ExportImages(
            pixels[:IMAGES],
            [Image.fromarray(picture) for picture in pixels[:2]],
            EvaluationSet(iter(pixels[:IMAGES]), teacher, teacher, None, "made up", keys=("0" * 32,) * IMAGES),
            lambda: CalibrationSet(IMAGES, lambda places: pixels[IMAGES + places]),
        ),
        folder,
        ExportOptions(**options),
        note=notes.append,
    )
    return SimpleNamespace(folder=folder, manifest=manifest, notes=notes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bundle with all that LiteRT has, and ExecuTorch's file where that is installed."""
    pytest.importorskip("litert_torch", reason="pip install 'prgkit[litert-export]'")
    formats = ("litert", "executorch") if find_executorch() else ("litert",)
    folder = tmp_path_factory.mktemp("mobile") / "bundle"
    return export(folder, formats=formats, fp16=True, int8=True, margin=10.0)

"""What several test files share: two real students, exported once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

FAMILIES = ("repvit_m0_9", "efficientnet_b0")
CLASSES = tuple(f"thing {number}" for number in range(20))
SIZE = 64


@dataclass(frozen=True)
class Exported:
    """A student with random weights and its files."""

    student: Any  # prgkit.student.Deployed, unfused
    module: Any  # prgkit.export.onnx.Deployable, fused
    fp32: Path
    fp16: Path
    pixels: NDArray[np.uint8]  # [256, 64, 64, 3]
    preprocessing: Any


def smooth_pictures(count: int, *, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures with large shapes and a little noise, as photographs have; a network tells them apart."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    shapes = np.stack([np.asarray(Image.fromarray(picture).resize((size, size), 3)) for picture in coarse])
    noisy = shapes + generator.normal(0, 6, shapes.shape)
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("torch")
    return export_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def repvit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("torch")
    return export_family(FAMILIES[0], tmp_path_factory.mktemp("repvit"))


_done: dict[str, Exported] = {}


def export_family(model: str, folder: Path) -> Exported:
    """Build, settle and export one student; once a session, since tracing takes seconds."""
    if model in _done:
        return _done[model]
    import torch

    from prgkit.export.onnx import deployable, export_onnx, write_fp16
    from prgkit.recipe import StudentPage
    from prgkit.student import build_student

    torch.manual_seed(0)
    page = StudentPage(model=model, image_size=SIZE, initial="random")
    built = build_student(page, classes=len(CLASSES), teacher_width=8)
    pixels = smooth_pictures(256)
    student = built.deployed().train()
    with torch.no_grad():  # batch norms that have seen pictures: without them every picture has the same logits
        for batch in torch.split(torch.from_numpy(pixels), 64):
            student(batch)
    for layer in student.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.5)  # spread the logits as training does
    module = deployable(student.eval(), torch.from_numpy(pixels[:64]))
    fp32, fp16 = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(
        module,
        fp32,
        image_size=SIZE,
        classes=CLASSES,
        preprocessing=built.preprocessing.to_dict(),
        opset=20,
    )
    write_fp16(fp32, fp16)
    _done[model] = Exported(student, module, fp32, fp16, pixels, built.preprocessing)
    return _done[model]

"""What several test files share: two real students, exported once."""

from __future__ import annotations

import os

# Two busy cores and two spinning OpenMP threads are a hundred times slower than one thread; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

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

    student: Any  # prgkit.student.model.Deployed, unfused
    module: Any  # prgkit.export.formats.onnx_export.Deployable, fused
    fp32: Path
    fp16: Path
    pixels: NDArray[np.uint8]  # [256, 64, 64, 3]
    preprocessing: Any


def pictures(count: int, *, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures as varied as photographs: shapes of many sizes, contrasts and brightnesses, and some noise."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        grid = int(generator.choice([2, 3, 4, 8, 16, 32]))
        coarse = Image.fromarray(generator.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
        shapes = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        middle, contrast = generator.uniform(40, 215), generator.uniform(0.1, 1)
        noise = generator.normal(0, generator.uniform(0, 12), shapes.shape)
        made.append(middle + contrast * (shapes - 128) + noise)
    return np.stack(made).clip(0, 255).astype(np.uint8)


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

    from prgkit.config.recipe import StudentConfig
    from prgkit.export.formats.onnx_export import export_onnx, onnx_export_module, write_fp16
    from prgkit.student.model import build_student

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    page = StudentConfig(model=model, image_size=SIZE, initial="random")
    built = build_student(page, classes=len(CLASSES), teacher_width=8)
    pixels = pictures(256)
    student = settled(built.deployed(), torch.from_numpy(pixels))
    module = onnx_export_module(student, torch.from_numpy(pixels[:64]))
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
    torch.set_num_threads(threads)
    _done[model] = Exported(student, module, fp32, fp16, pixels, built.preprocessing)
    return _done[model]


def settled(student: Any, pixels: Any) -> Any:
    """Give a random network what training gives it: batch norms that know the pictures, logits that differ."""
    import torch

    norms = [layer for layer in student.modules() if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the average over what follows
    student.train()
    with torch.no_grad():
        for batch in torch.split(pixels, 64):
            student(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        student.eval()
        head = [layer for layer in student.modules() if isinstance(layer, torch.nn.Linear)][-1]
        logits = student(pixels)
        scale = 3 / logits.std(0).mean()
        head.weight.mul_(scale)
        head.bias.copy_(scale * (head.bias - logits.mean(0)))
    return student

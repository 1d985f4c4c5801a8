"""What several test files share: the command line in this process, a small recipe, two real students exported once."""

from __future__ import annotations

import os

# Two busy cores and two spinning OpenMP threads are a hundred times slower than one thread; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import importlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

# A recipe that trains in a second: the demo's teacher, timm's smallest student, 24 pictures.
TINY_RECIPE = """\
# Distil a few pictures, to try the command line.
data: {images: photos, classes: [one, two, three], prompts: ["a {}", "the digit {}"], held_out: 0.2}
teacher: {model: "demo:digits", batch_size: 8}
views: {count: 1, flip: false}
student: {model: test_efficientnet, image_size: 32}
objective: {name: ce}
training: {epochs: 1, batch_size: 8, workers: 0, precision: fp32}
"""


@dataclass(frozen=True)
class CliResult:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


PrgkitCommand = Callable[..., CliResult]


@pytest.fixture
def prgkit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> PrgkitCommand:
    """Call the command line in this process; an error that is a bug comes out as itself."""
    from prgkit.cli.main import main

    monkeypatch.setenv("COLUMNS", "80")

    def call(line: str = "", *more: str) -> CliResult:
        arguments = [*shlex.split(line), *more]
        monkeypatch.setattr(sys, "argv", ["prgkit", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        result = capfd.readouterr()
        assert "Traceback" not in result.err
        return CliResult(code, result.out, result.err)

    return call


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_photos(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(**_: Any) -> None:
        raise error

    return raises


def pyproject() -> dict[str, Any]:
    """Return pyproject.toml; in Python 3.10 tomli reads it, which pytest brings along."""
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    read: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    return read


FAMILIES = ("repvit_m0_9", "efficientnet_b0")
CLASSES = tuple(f"thing {number}" for number in range(20))
SIZE = 64


@dataclass(frozen=True)
class Exported:
    """A student with random weights and its files."""

    student: Any  # prgkit.student.model.InferenceModel, unfused
    module: Any  # prgkit.export.formats.onnx_export.OnnxExportModule, fused
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


def pytest_collection_finish(session: pytest.Session) -> None:
    """Trace each network once in a session: what PyTorch's exporter makes of the same module and arguments is kept.

    Tracing takes seconds, and many tests export the same student. What differs in one byte is traced anew.
    """
    if "torch" not in sys.modules:
        return  # no test of this session exports
    import onnx
    import torch

    export, traced = torch.onnx.export, dict[bytes, bytes]()

    def export_once(module: Any, examples: tuple[Any, ...], **options: Any) -> Any:
        key = sha256_of(module, repr([(example.shape, example.dtype) for example in examples] + [options]))
        if key not in traced:
            traced[key] = export(module, examples, **options).model_proto.SerializeToString()
        return SimpleNamespace(model_proto=onnx.load_from_string(traced[key]))

    torch.onnx.export = export_once


def sha256_of(module: Any, arguments: str) -> bytes:
    """Return the SHA-256 of a network: its layers with their plain attributes, its weights, and how it is traced."""
    digest = hashlib.sha256(arguments.encode())
    for name, layer in module.named_modules():
        plain = {
            key: value for key, value in vars(layer).items() if isinstance(value, bool | int | float | str | tuple)
        }
        digest.update(f"{name} {type(layer)} {layer.extra_repr()} {plain}".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.detach().numpy().tobytes())
    return digest.digest()


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

    from prgkit.config.sections import StudentConfig
    from prgkit.export.formats.onnx_export import export_onnx, onnx_export_module, write_fp16
    from prgkit.student.model import build_student

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    page = StudentConfig(model=model, image_size=SIZE, initial="random")
    built = build_student(page, classes=len(CLASSES), teacher_width=8)
    pixels = pictures(256)
    student = settled(built.inference_model(), torch.from_numpy(pixels))
    module = onnx_export_module(student, torch.from_numpy(pixels[:64]))
    fp32, fp16 = folder / "model.onnx", folder / "model.fp16.onnx"
    export_onnx(
        module,
        fp32,
        image_size=SIZE,
        classes=CLASSES,
        preprocessing=built.preprocessing,
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

"""A new format and a new runtime are an object each, and a line in a list: no other module knows their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prgkit.errors import ExportError, ParityError
from prgkit.evaluate.bench.bench import bench
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.predict import Model
from prgkit.export.bundle.bundle import open_bundle
from prgkit.export.bundle.manifest import Artifact, Manifest
from prgkit.export.formats import FORMATS
from prgkit.export.formats.base import Format, Made
from prgkit.export.formats.options import ExportOptions
from prgkit.export.runtimes import RUNTIMES
from prgkit.export.runtimes.base import Runner, Runtime, Setup, Variant
from prgkit.storage.atomic import sha256, write_sealed

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

SIDE = 16
CLASSES = ["red", "green", "blue"]
POOLED = "pooled-npz"  # the format: weights [3, classes] and bias [classes] of a classifier of the mean colour


class Pooling(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A student so simple that a toy runtime runs it: a linear classifier of an image's mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, len(CLASSES))
        with torch.no_grad():
            self.head.weight.copy_(4 * torch.eye(3))
            self.head.bias.zero_()

    def forward(self, images: Any) -> Any:
        return self.head(images.mean(dim=(2, 3)))


class Student(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Pixels [batch, S, S, 3] uint8 to logits, as `prgkit.student.model.Deployed`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pooling()
        for name, value in (("mean", 127.5), ("std", 127.5)):
            self.register_buffer(name, torch.full((3,), value))

    def forward(self, pixels: Any) -> Any:
        return self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))


def make_pooled(export: StudentExport) -> Made:
    from prgkit.export.runtimes import open_runner

    def write(path: Path) -> None:
        student: Any = export.student
        weight, bias = (values.detach().numpy() for values in (student.model.head.weight, student.model.head.bias))
        scaled = weight / student.std.numpy()
        with open(path, "wb") as file:
            np.savez(file, weight=scaled.T, bias=bias - scaled @ student.mean.numpy() + OFFSET["bias"])

    def runner(path: Path) -> Runner:
        facts = {"precision": "fp32", "backend": "pooled", "bytes": 0, "sha256": "", "executed": True}
        return open_runner(
            path.parent, Artifact(name=POOLED, file=path.name, format=POOLED, **facts, note=None, parity=None)
        )

    how: dict[str, Any] = {"format": POOLED, "precision": "fp32", "export_options": ("--format", POOLED)}
    return Made([export.finish(POOLED, "model.pooled.npz", write=write, runner=runner, **how)])


def how_to_run(manifest: Manifest) -> str:
    files = [artifact for artifact in manifest.artifacts if artifact.format == POOLED]
    return "\n## Pooled\n\n`pixels.mean((1, 2)) @ weight + bias`.\n" if files else ""


POOLED_FORMAT = Format(
    POOLED, wanted=lambda options: POOLED in options.formats, make=make_pooled, how_to_run=how_to_run
)
OFFSET = {"bias": 0.0}  # what a broken writer would add


class PooledRunner:
    """An open file of the toy format."""

    backend, device = "pooled", "cpu"
    max_batch: int | None = None

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        with np.load(path) as arrays:
            self.weight, self.bias = arrays["weight"], arrays["bias"]

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        means = pixels.mean(axis=(1, 2), dtype=np.float64)  # [batch, 3]
        logits: NDArray[np.float32] = (means @ self.weight + self.bias).astype(np.float32)
        return logits

    def close(self) -> None:
        pass


def open_pooled(setup: Setup) -> Runner:
    return PooledRunner(setup.path, setup.artifact.name)


def examine_pooled(versions: Mapping[str, str | None]) -> Sequence[tuple[str, str | None]]:
    return [("pooled by numpy", None)]


POOLED_RUNTIME = Runtime(
    name="pooled",
    formats=(POOLED,),
    variants=(Variant("numpy", "pooled", "cpu"),),
    libraries=("numpy",),
    open=open_pooled,
    examine=examine_pooled,
)


@pytest.fixture
def _registered() -> Iterator[None]:
    FORMATS.append(POOLED_FORMAT)
    RUNTIMES.append(POOLED_RUNTIME)
    yield
    FORMATS.pop()
    RUNTIMES.pop()


def export(folder: Path, **options: Any) -> Manifest:
    from prgkit.data.preprocessing import Preprocessing
    from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (32, 1, 1, 3), dtype=np.uint8).repeat(SIDE, 1).repeat(SIDE, 2)
    facts = {
        "run": {"name": "colours", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
        "recipe": {},
        "teacher": {"model": "eye", "fingerprint": "1" * 16},
        "student": {"model": "pooling"},
    }
    preprocessing = Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    teacher = pixels[:, 0, 0].astype(np.float32)
    return export_student(
        TrainedStudent(Student(), CLASSES, preprocessing, StudentOrigin.model_validate(facts)),
        ExportImages(
            pixels,
            [Image.fromarray(picture) for picture in pixels[:2]],
            EvaluationSet(
                iter(pixels), teacher, teacher, teacher.argmax(axis=1), "made up", keys=("0" * 32,) * len(pixels)
            ),
        ),
        folder,
        ExportOptions(**options),
        note=lambda _: None,
    )


@pytest.mark.usefixtures("_registered")
def test_a_toy_format_is_exported_measured_predicted_with_and_reported(tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    manifest = export(bundle, formats=(POOLED,))
    artifact = manifest.artifacts[-1]
    assert (artifact.name, artifact.backend, artifact.executed) == (POOLED, "pooled", True)
    assert artifact.parity is not None
    assert artifact.parity.top1_agreement == 100
    assert open_bundle(bundle).manifest == manifest
    readme = (bundle / "README.md").read_text()
    assert "| model.pooled.npz | fp32 | pooled | yes |" in readme
    assert "## Pooled" in readme
    bench(bundle, BenchOptions(threads=1, seconds=0.2, batches=(1,)), out=out, note=lambda _: None)
    rows = json.loads((out / "report.json").read_text())["rows"]
    row = next(row for row in rows if row["artifact"] == POOLED)
    assert (row["backend"], row["status"], row["agreement_fp32"]) == ("pooled", "measured", 100)
    for page in ("report.md", "report.html"):
        assert POOLED in (out / page).read_text(), page
    selection = {"schema": "prgkit.selection/2", "artifact": POOLED, "sha256": artifact.sha256, "int8": []}
    write_sealed(out / "selection.json", selection)
    (answer,) = Model(bundle, bench=out).predict(bundle / "golden" / "00.png")
    assert answer.artifact == POOLED
    assert answer.label == CLASSES[np.load(bundle / "golden" / "logits.npy")[0].argmax()]


@pytest.mark.usefixtures("_registered")
def test_its_parity_is_asserted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFSET, "bias", np.array([1.0, 0.0, 0.0]))
    with pytest.raises(ParityError, match=rf"{POOLED} \(fp32\) does not agree with torch on 32 images"):
        export(tmp_path / "bundle", formats=(POOLED,))


@pytest.mark.usefixtures("_registered")
def test_doctor_says_of_the_runtime_whether_it_runs_here() -> None:
    from prgkit.cli.doctor import examine

    assert {"name": "pooled by numpy", "runs": True, "detail": ""} in examine()["backends"]


@pytest.mark.usefixtures("_registered")
def test_a_damaged_file_of_it_is_named(tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", formats=(POOLED,))
    path = tmp_path / "bundle" / "model.pooled.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert sha256(path) != manifest.artifacts[-1].sha256
    with pytest.raises(ExportError, match=r"model\.pooled\.npz is damaged") as caught:
        open_bundle(tmp_path / "bundle")
    assert str(caught.value.fix).endswith(f"make the file again: prgkit export --format {POOLED}")


def test_a_format_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no format 'tflite'") as caught:
        export(tmp_path / "bundle", formats=("tflite",))
    assert caught.value.fix == "one of: onnx-fp32, litert, executorch, ncnn, coreml"


def test_a_format_that_another_option_asks_for_is_not_left_out_without_a_word() -> None:
    from prgkit.export.pipeline import wanted_formats

    by_name = [one.name for one in FORMATS if one.asked_by is None]
    assert [one.name for one in FORMATS if one.wanted(ExportOptions(formats=(one.name,)))] == by_name
    with pytest.raises(ExportError, match="the format 'tensorrt-int8' is not asked for by its name") as caught:
        wanted_formats(ExportOptions(formats=("litert", "tensorrt-int8"), trt=True))
    assert caught.value.fix == "--trt --int8 asks for it; in Python, arguments of these names"
    asked = wanted_formats(ExportOptions(formats=("onnx-fp32", "onnx-fp16"), fp16=True))
    assert [one.name for one in asked] == ["onnx-fp32", "onnx-fp16"]

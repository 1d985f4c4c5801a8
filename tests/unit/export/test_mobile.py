"""LiteRT and ExecuTorch: real conversions of a small student, and what is refused."""

from __future__ import annotations

import importlib.util
import operator
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.errors import BackendError, ExportError
from prgkit.evaluate.bench.bench import bench
from prgkit.evaluate.bench.options import BenchOptions
from prgkit.evaluate.predict import Model
from prgkit.export.bundle.bundle import read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32
from prgkit.export.formats import FORMATS
from prgkit.export.formats.mobile import executorch, litert
from prgkit.export.formats.mobile.apart import run_apart
from prgkit.export.formats.options import ExportOptions
from prgkit.export.int8 import files
from prgkit.export.runtimes import executorch as executorch_runtime
from prgkit.export.runtimes.executorch import ExecuTorchRunner
from prgkit.export.runtimes.litert import LiteRtRunner
from prgkit.export.runtimes.ncnn import NcnnRunner

SMALL = Path(__file__).with_name("small.tflite")  # `network`, converted by litert-torch 0.10.0, pixels of 16 x 16
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
    return SimpleNamespace(folder=folder, manifest=manifest, notes=notes, formats=options.get("formats", ()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bundle with all that LiteRT has, and ExecuTorch's file where that is installed."""
    pytest.importorskip("litert_torch", reason="pip install 'prgkit[litert-export]'")
    formats = ("litert", "executorch") if find_executorch() else ("litert",)
    folder = tmp_path_factory.mktemp("mobile") / "bundle"
    return export(folder, formats=formats, fp16=True, int8=True, margin=10.0)


def test_every_file_takes_pixels_and_gives_pytorchs_logits(exported: SimpleNamespace) -> None:
    made = {one.name: one for one in exported.manifest.artifacts if one.format in ("litert", "executorch")}
    assert set(made) - {"executorch"} == {"litert", "litert-fp16", "litert-int8"}
    assert ("executorch" in made) == find_executorch()
    for artifact in made.values():
        assert artifact.executed
        assert artifact.parity is not None
        assert artifact.parity.images == IMAGES
        assert artifact.parity.top1_agreement == 100 or artifact.precision != "fp32"
    sizes = [made[name].bytes for name in ("litert-int8", "litert-fp16", "litert")]
    assert sizes == sorted(sizes)
    litert = importlib.import_module("ai_edge_litert.interpreter")
    for name in ("litert", "litert-fp16", "litert-int8"):
        model = litert.Interpreter(str(exported.folder / made[name].file))
        (given,), (given_back,) = model.get_input_details(), model.get_output_details()
        assert (given["dtype"], given["shape"].tolist()) == (np.uint8, [1, SIDE, SIDE, 3])
        assert (given_back["dtype"], given_back["shape"].tolist()) == (np.float32, [1, 3])
        weights = [tensor for tensor in model.get_tensor_details() if tensor["shape"].tolist() == [32, 3, 3, 32]]
        assert np.int8 in {tensor["dtype"] for tensor in weights} or name != "litert-int8"


def test_int8_is_held_to_the_floor_of_all_int8(exported: SimpleNamespace) -> None:
    made = next(one.quantization for one in exported.manifest.artifacts if one.name == "litert-int8")
    assert (made.layout, made.kept, made.margin, made.calibration_images) == ("litert", True, 10.0, IMAGES)
    evaluation = read_evaluation(exported.folder)
    runner = LiteRtRunner(exported.folder / "model.int8.tflite")
    logits = runner.run(evaluation.pixels)
    assert made.comparison == compare_with_fp32(evaluation.logits, logits, evaluation.teacher_logits)


def never(*_: Any) -> None:
    raise AssertionError


def test_what_is_finished_is_not_converted_again(exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "run_apart", never)
    monkeypatch.setattr(executorch, "run_apart", never)
    again = export(exported.folder, formats=exported.formats, fp16=True, int8=True, margin=10.0)
    for file in ("model.tflite", "model.fp16.tflite", "model.int8.tflite"):
        assert f"{file}: finished before, and made from the same; it is kept" in again.notes
    assert again.manifest.artifacts == exported.manifest.artifacts


def test_a_miss_is_told_and_not_tried_again(
    exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "bundle")
    noise = 50 * np.random.default_rng(0).normal(size=(IMAGES, 3)).astype(np.float32)
    monkeypatch.setattr(files, "run_and_close", lambda runner, pixels: noise)
    first = export(folder, formats=("litert",), int8=True, margin=9.0)
    (missed,) = (facts for facts in first.manifest.not_kept if facts.name == "litert-int8")
    assert not (folder / "model.int8.tflite").exists()
    told = next(note for note in first.notes if note.startswith("model.int8.tflite: INT8 is not kept"))
    monkeypatch.setattr(litert, "run_apart", never)
    second = export(folder, formats=("litert",), int8=True, margin=9.0)
    assert f"{told} (found before, from the same)" in second.notes
    assert missed in second.manifest.not_kept


def test_predict_and_bench_run_them(exported: SimpleNamespace, tmp_path: Path) -> None:
    picture = exported.folder / "golden" / "00.png"
    wanted = exported.manifest.classes[np.load(exported.folder / "golden" / "logits.npy")[0].argmax()]
    for name in exported.formats:
        (answer,) = Model(exported.folder, runtime=name).predict(picture)
        assert (answer.artifact, answer.label) == (name, wanted)
    with pytest.raises(BackendError, match="no file that tensorrt runs"):
        Model(exported.folder, runtime="tensorrt")
    with pytest.raises(BackendError, match="there is no runtime 'tflite'") as caught:
        Model(exported.folder, runtime="tflite")
    assert {"onnxruntime", "litert", "executorch"} <= set(str(caught.value.fix).removeprefix("one of: ").split(", "))
    report = bench(
        exported.folder, BenchOptions(threads=1, seconds=0.1, batches=(1,)), out=tmp_path, note=lambda _: None
    )
    rows = {row.artifact: row for row in report.rows if row.backend == "litert"}
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "measured")
    assert (rows["litert"].agreement_fp32, rows["litert"].threads) == (100, 1)
    assert set(rows) == {"litert", "litert-fp16", "litert-int8"}


def test_the_readmes_python_runs(exported: SimpleNamespace) -> None:
    text = (exported.folder / "README.md").read_text()
    wanted = exported.manifest.classes[np.load(exported.folder / "golden" / "logits.npy")[0].argmax()]
    for heading in ("LiteRT", "ExecuTorch") if find_executorch() else ("LiteRT",):
        python = text.split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]
        done = subprocess.run(
            [sys.executable, "-c", python], cwd=exported.folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [wanted]


def test_litert_gives_pytorchs_logits_of_each_picture() -> None:
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("ai_edge_litert")
    pixels = np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    runner = LiteRtRunner(SMALL, threads=1)
    with torch.inference_mode():
        expected = network()(torch.from_numpy((pixels.astype(np.float32) - 127.5) / 60).permute(0, 3, 1, 2)).numpy()
    logits = runner.run(pixels)
    assert (logits.shape, logits.dtype, runner.max_batch) == ((5, 3), np.float32, 1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    runner.close()


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    whole = SMALL.read_bytes()
    for name, data in {"short": whole[: len(whole) // 2], "none": b"", "other": b"PK" + whole}.items():
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(data)
        with pytest.raises(BackendError, match=rf"LiteRT cannot open {name}\.tflite: ") as caught:
            LiteRtRunner(path)
        assert "\n" not in caught.value.what
        assert caught.value.fix == "export it again: prgkit export"
    with pytest.raises(BackendError, match=r"there is no gone\.tflite"):
        LiteRtRunner(tmp_path / "gone.tflite")


@pytest.mark.skipif(not find_executorch(), reason="pip install 'prgkit[executorch]'")
def test_a_pte_of_another_version_is_named(exported: SimpleNamespace, tmp_path: Path) -> None:
    whole = (exported.folder / "model.pte").read_bytes()
    says = {
        whole[: len(whole) // 2]: r"ExecuTorch cannot open bad\.pte, a program of format ET12: ",
        whole[:4] + b"ET99" + whole[8:]: r"ExecuTorch cannot open bad\.pte, a program of format ET99: ",
        b"PK" + whole: r"bad\.pte is no ExecuTorch program: it begins with ",
    }
    for data, message in says.items():
        (tmp_path / "bad.pte").write_bytes(data)
        with pytest.raises(BackendError, match=message) as caught:
            ExecuTorchRunner(tmp_path / "bad.pte")
        assert caught.value.fix == "export it again: prgkit export"


def test_a_ptes_version_is_named_without_executorch(tmp_path: Path) -> None:
    (path := tmp_path / "model.pte").write_bytes(b"\x30\x00\x00\x00ET99" + bytes(32))
    told = executorch_runtime.why_not_opened(path, RuntimeError("error: 0x23\nat program.cpp"))
    assert told == "ExecuTorch cannot open model.pte, a program of format ET99: error: 0x23 at program.cpp"
    path.write_bytes(b"")
    assert executorch_runtime.why_not_opened(path, RuntimeError()).startswith("model.pte is no ExecuTorch program: ")


@pytest.mark.parametrize(
    ("runner", "module", "extra"),
    [
        (LiteRtRunner, "ai_edge_litert.interpreter", "litert"),
        (ExecuTorchRunner, "executorch.runtime", "executorch"),
        (NcnnRunner, "ncnn", "ncnn"),
    ],
)
def test_a_missing_runtime_is_one_line_with_the_fix(
    runner: Any, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r"^(LiteRT|ExecuTorch|ncnn) is not installed") as caught:
        runner(tmp_path / "model")
    assert caught.value.fix == f"pip install 'prgkit[{extra}]'"


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("litert", "litert_torch", "litert-export"), ("executorch",) * 3]
)
def test_a_missing_converter_is_told_before_any_work(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = next(one for one in FORMATS if one.name == name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == module else asked)
    with pytest.raises(BackendError, match=f"written by {module}, which is not installed") as caught:
        known.require(ExportOptions(formats=(name,)))
    assert caught.value.fix == f"pip install 'prgkit[{extra}]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: asked)
    with pytest.raises(ExportError, match="hold their class vectors") as refused:
        known.require(ExportOptions(formats=(name,), class_vectors="input"))
    assert str(refused.value.fix).endswith(f"or without --{name}")


def test_a_converters_failure_and_its_death_are_told() -> None:
    with pytest.raises(ExportError, match="the converter failed: division by zero"):
        run_apart(operator.truediv, 1, 0)
    with pytest.raises(ExportError, match="ended with exit code -6"):
        run_apart(os.abort)


def test_a_converter_does_not_run_its_callers_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a main guard
    work = "import time\nfrom prgkit.export.formats.mobile.apart import run_apart\nrun_apart(time.sleep, 0)\n"
    script.write_text(f"print('once')\n{work}")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_converter_ends_with_the_export_that_waits_for_it() -> None:
    code = "import time\nfrom prgkit.export.formats.mobile.apart import run_apart\nrun_apart(time.sleep, 600)"
    with subprocess.Popen([sys.executable, "-c", code]) as export:
        children: list[int] = []
        while not any("spawn_main" in told(child) for child in children):
            assert export.poll() is None
            time.sleep(0.1)
            children = [
                int(child) for child in Path(f"/proc/{export.pid}/task/{export.pid}/children").read_text().split()
            ]
        export.kill()
    deadline = time.monotonic() + 20
    while any("spawn_main" in told(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def told(process: int) -> str:
    """Return a process's command; nothing where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""

"""The device's install, without torch: what a bundle needs runs there, and what does not run says what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.storage.atomic import write_sealed

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-base" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-base: make .venv-base/base.stamp makes it")
HEAVY = ("torch", "torchvision", "timm", "open_clip", "accelerate", "safetensors", "onnx", "onnxscript", "tensorrt")


def prgkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "prgkit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def result(*arguments: str, cwd: Path) -> Any:
    done = prgkit(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout).values()
    return answer


@pytest.fixture(scope="module")
def bundle(repvit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RepViT with random weights, exported here, travels to the device."""
    from prgkit.export.formats.options import ExportOptions
    from prgkit.export.pipeline import EvaluationSet, ExportImages, StudentOrigin, TrainedStudent, export_student

    folder = tmp_path_factory.mktemp("device") / "bundle"
    logits = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32)
    origin = StudentOrigin.model_validate(
        {
            "run": {"name": "test", "fingerprint": "0" * 16, "objective": "prg", "epochs": 1},
            "recipe": {"student": {"model": "repvit_m0_9"}},
            "teacher": {"model": "tiny", "weights": "none", "fingerprint": "1" * 16},
            "student": {"model": "repvit_m0_9", "parameters": 5, "image_size": 64, "initial": "random"},
        }
    )
    classes, golden = [f"thing {number}" for number in range(20)], [Image.fromarray(one) for one in repvit.pixels[:16]]
    keys = tuple(f"{number:032x}" for number in range(16))
    evaluation = EvaluationSet(iter(repvit.pixels[:16]), logits, logits, np.arange(16), "made up", keys)
    export_student(
        TrainedStudent(repvit.student, classes, repvit.preprocessing, origin),
        ExportImages(repvit.pixels[:64], [picture.resize((50, 90)) for picture in golden], evaluation),
        folder,
        ExportOptions(),
        note=lambda _: None,
    )
    return folder


def test_nothing_heavy_is_installed_there(tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {HEAVY} if u.find_spec(name)])"
    done = subprocess.run([PYTHON, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_small() -> None:
    files = [path for path in (ROOT / ".venv-base").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < 250 * 2**20


def test_help_and_recipes(tmp_path: Path) -> None:
    done = prgkit("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert result("recipes", cwd=tmp_path).keys() >= {"cifar100", "custom", "demo", "imagenet1k"}
    page = prgkit("recipes", "--show", "custom", cwd=tmp_path)
    assert page.stdout == (ROOT / "recipes" / "custom.yaml").read_text()


def test_doctor_says_what_runs_and_what_each_other_needs(tmp_path: Path) -> None:
    found = result("doctor", cwd=tmp_path)
    assert found["versions"]["torch"] is None
    assert found["versions"]["onnxruntime"]
    running = [backend["name"] for backend in found["backends"] if backend["runs"]]
    assert "onnxruntime CPU" in running
    assert not [name for name in running if name.startswith(("torch", "tensorrt"))]
    for name, extra in (("torch", "distill"), ("tensorrt:", "trt"), ("tensorrt_rtx", "rtx")):
        details = [backend["detail"] for backend in found["backends"] if backend["name"].startswith(name)]
        assert details
        assert all(f"pip install 'prgkit[{extra}]'" in detail for detail in details)


def test_predict_gives_the_torch_students_answer(bundle: Path, repvit: Any) -> None:
    import torch

    sources = sorted((bundle / "golden").glob("[0-9][0-9].png"))
    assert len(sources) == 16
    prepared = np.stack([repvit.preprocessing.prepare(Image.open(path).convert("RGB")) for path in sources])
    with torch.no_grad():
        expected = repvit.student(torch.from_numpy(prepared)).softmax(1).numpy()
    classes = json.loads((bundle / "manifest.json").read_text())["classes"]
    answers = result("predict", *(f"golden/{path.name}" for path in sources), "--top-k", "20", cwd=bundle)
    assert len({answer["class"] for answer in answers}) > 1
    for answer, probabilities in zip(answers, expected, strict=True):
        assert answer["class"] == classes[probabilities.argmax()]
        assert not answer["abstained"]
        told = dict(answer["top"])
        np.testing.assert_allclose([told[name] for name in classes], probabilities, atol=1e-4)


def test_python_answers_as_the_command_line_does(bundle: Path) -> None:
    code = "import json, prgkit; print(json.dumps([one.top for one in prgkit.load('.').predict('golden/00.png')]))"
    done = subprocess.run([PYTHON, "-c", code], cwd=bundle, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [answer["top"] for answer in result("predict", "golden/00.png", cwd=bundle)]


def test_predict_promises_and_rejects(bundle: Path, tmp_path: Path) -> None:
    here = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["confidence"] = {
        "temperature": 2.0, "fitted_to": "ticks", "images": 50, "calibration_error": 1.0, "uncalibrated_error": 2.0,
        "right": [0.9] * 50, "wrong": [], "held_out": 50, "reject_below": 1e9,
    }  # fmt: skip
    del manifest["digest"]
    write_sealed(here / "manifest.json", manifest)
    done = prgkit("predict", "golden/00.png", "--min-confidence", "0.5", "--reject-unknown", cwd=here)
    assert done.stdout.startswith("golden/00.png: none of the classes")
    assert done.stderr.startswith(
        "of the answers at 0.5 or above, at least 92.9 % were right on ticked held-out images"
    )


def test_the_readmes_lines_give_the_same_answer_there(bundle: Path) -> None:
    """They are run as they stand."""
    lines = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "prgkit" not in lines
    for number in (0, 7, 15):
        picture = f"golden/{number:02}.png"
        done = subprocess.run([PYTHON, "-c", lines, picture], cwd=bundle, capture_output=True, text=True, check=True)
        (answer,) = result("predict", picture, cwd=bundle)
        assert done.stdout == f"{answer['class']}\n"


def test_a_bundle_is_packed_and_opened_there(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    packed = result("export", "--zip", cwd=tmp_path / "bundle")
    assert packed["zip"] == str(tmp_path / "test.zip")
    refused = prgkit("predict", "bundle/golden/00.png", "--run", "test.zip", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == (
        "Error: this bundle is still packed\n  where: test.zip\n"
        "  fix: unpack it here, and give its folder: python -m zipfile -e test.zip .\n"
    )
    subprocess.run([PYTHON, "-m", "zipfile", "-e", "test.zip", "."], cwd=tmp_path, check=True)
    (answer,) = result("predict", "bundle/golden/00.png", "--run", "test", cwd=tmp_path)
    assert answer == result("predict", "golden/00.png", cwd=bundle)[0] | {"image": "bundle/golden/00.png"}


def test_predict_abstains(bundle: Path) -> None:
    answers = result("predict", "golden/00.png", "--min-confidence", "1", cwd=bundle)
    assert [(answer["class"], answer["abstained"]) for answer in answers] == [(None, True)]


def test_bench_measures_on_the_device(bundle: Path) -> None:
    report = result("bench", "--seconds", "1", "--threads", "1", "--batches", "1,4", cwd=bundle)
    (row,) = report["rows"]
    assert (row["artifact"], row["backend"], row["device"], row["status"]) == (
        *("onnx-fp32", "onnxruntime", "cpu", "measured"),
    )
    assert row["latency"]["p50_ms"] > 0
    assert [entry["batch"] for entry in row["throughput"]] == [1, 4]
    assert row["agreement_fp32"] == 100
    (html,) = (bundle / "bench").rglob("report.html")
    assert html.with_name("report.json").exists()


def test_export_trt_names_both_tensorrts(bundle: Path) -> None:
    done = prgkit("export", "--trt", cwd=bundle)
    assert done.returncode == 1
    what, tensorrt, rtx, fix = done.stderr.strip().splitlines()
    assert what == "Error: no TensorRT can build an engine here"
    assert tensorrt.startswith("  tensorrt: not installed; pip install 'prgkit[trt]'")
    assert rtx == "  tensorrt_rtx: not installed; pip install 'prgkit[rtx]'"
    assert fix.startswith("  fix: pip install 'prgkit[rtx]'; or pip install 'prgkit[trt]'")


@pytest.mark.parametrize("command", ["distill", "targets", "audit"])
def test_what_needs_torch_names_the_extra(command: str, tmp_path: Path) -> None:
    done = prgkit(command, "cifar100", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: this command needs torch, which the base install leaves out\n  fix: pip install 'prgkit[distill]'\n"
    )
    assert not list(tmp_path.iterdir())

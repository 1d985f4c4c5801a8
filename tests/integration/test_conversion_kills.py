"""SIGKILL while a format is converted, then the same command: the files are those of an export that nobody killed."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY_RECIPE, write_photos
from tests.integration.test_kills import Launcher, Trap

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

RECIPE = TINY_RECIPE.replace("held_out: 0.2", "held_out: 0.45") + "export: {margin: 20}\n"  # for INT8, 16 images
MOBILE = "prgkit.export.formats.mobile"
# What is asked for, the module that it takes, and where the kill comes: half a file is written, or a converter is at
# work, after so many seconds of its processor time. Core ML's, QNN's, LiteRT's and ExecuTorch's start a process, and import.
CONVERSIONS: dict[str, tuple[str, str, Trap]] = {
    "onnx": ("", "onnx", ("prgkit.export.formats.onnx_export:save", 1, "within")),
    "ncnn": ("--ncnn", "pnnx", (f"{MOBILE}.ncnn:convert", 1, 0.05)),
    "coreml": ("--coreml", "coremltools", (f"{MOBILE}.coreml:run_apart", 2, 4.0)),  # the first looks whether it starts
    "openvino": ("--int8", "nncf", ("prgkit.export.int8.quantise:nncf.write_for_openvino", 1, 1.0)),
    "litert": ("--litert", "litert_torch", (f"{MOBILE}.litert:run_apart", 1, 10.0)),
    "qnn": ("--qnn SM8650", "onnxruntime_qnn", (f"{MOBILE}.qnn:run_apart", 1, 3.0)),
    "executorch": ("--executorch", "executorch", (f"{MOBILE}.executorch:run_apart", 1, 6.0)),
}
QUICK = ["onnx", "ncnn"]  # these belong to `make test`, all to `make soak`


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """What starts commands, in a folder with a finished run and a copy of its ONNX bundle."""
    folder = tmp_path_factory.mktemp("conversions")
    write_photos(folder / "photos", 36)
    (folder / "recipe.yaml").write_text(RECIPE)
    launcher = Launcher(folder)
    for command in ("distill recipe.yaml --run run", "export --run run"):
        end = launcher.run(command, folder)
        assert end.code == 0, end.said
    (folder / "run/bundle").rename(folder / "onnx")
    yield launcher
    launcher.close()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in CONVERSIONS]
)
def test_a_kill_while_converting_leaves_the_same_files(launcher: Launcher, name: str) -> None:
    option, module, trap = CONVERSIONS[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    folder, command = launcher.out.parent, f"export --run run {option}"
    bundle, whole = folder / "run/bundle", folder / "onnx"
    if option:  # the ONNX file is there before, and stays
        shutil.copytree(folder / "onnx", bundle)
        assert launcher.run(command, folder).code == 0, launcher.out.read_text()
        whole = shutil.move(bundle, folder / name)
        shutil.copytree(folder / "onnx", bundle)
    before = files_of(bundle)
    killed = launcher.run(command, folder, trap)
    assert killed.code == -signal.SIGKILL, killed.said
    assert files_of(bundle) == before
    again = launcher.run(command, folder)
    assert again.code == 0, again.said
    assert "Traceback" not in again.said
    assert ("model.onnx: finished before" in again.said) == bool(option)
    assert files_of(bundle) == files_of(whole)
    assert len(files_of(bundle)) > len(files_of(folder / "onnx")) or not option
    assert not list((folder / "run").glob(".bundle*"))
    shutil.rmtree(bundle)


def files_of(bundle: Path) -> dict[str, bytes]:
    """Return a bundle's models by their paths; in Core ML's Manifest.json the names of parts are chance.

    QNN's compiler leaves addresses of its memory in a program: of that only the length is the same twice.
    """
    paths = [path for path in bundle.rglob("*") if path.relative_to(bundle).parts[0].startswith("model.")]
    return {
        str(path.relative_to(bundle)): bytes(path.stat().st_size) if "qnn" in path.name else path.read_bytes()
        for path in paths
        if path.is_file() and path.name != "Manifest.json"
    }

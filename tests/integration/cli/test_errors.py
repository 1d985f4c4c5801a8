"""Every mistake in what a command is given is told with its fix."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from prgkit.config.objectives import OBJECTIVES
from tests.conftest import TINY_RECIPE, PrgkitCommand, write_photos


def tiny(empty_folder: Path, *changes: tuple[str, str]) -> None:
    text = TINY_RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (empty_folder / "tiny.yaml").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("test_efficientnet", "repvit_m0_99"), "timm has no model 'repvit_m0_99'; did you mean 'repvit_m0_9'?"),
        (('"demo:digits"', "ViT-B-61"), "open_clip has no model 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (('"demo:digits"', "ViT-B-32, weights: openay"), "ViT-B-32 has no weights 'openay'; did you mean 'openai'?"),
        (('"demo:digits"', "ViT-B-32"), "teacher.weights is missing for ViT-B-32"),
        (('"demo:digits"', "local-dir:nowhere"), "there is no such folder\n  where: nowhere\n"),
        (("{name: ce}", "{name: cee}"), "the recipe has a mistake:\n    objective.name: unknown objective 'cee', known are "
                                        f"{', '.join(OBJECTIVES)}; did you mean 'ce'?"),
        (("[one, two, three]", "[one, two, One]"), "class names repeat: 'One' (entry 1 and entry 3)"),
        (("[one, two, three]", "[one]"), "there is only one class, 'one'"),
        (('"a {}"', "a"), "the template 'a' has not exactly one {}"),
        (("images: photos", "images: photo"), "photo does not exist; did you mean 'photos'?"),
        (("images: photos", "images: empty"), "empty holds no images"),
        (("images: photos", "images: broken"), "none of the 3 images in broken can be read"),
        (("held_out: 0.2", "evaluation: labelled"), "1 of 1 labels match no class: 'tow' (did you mean 'two'?)"),
    ],
)  # fmt: skip
def test_bad_input_is_told_with_its_fix(
    prgkit: PrgkitCommand, empty_folder: Path, change: tuple[str, str], message: str
) -> None:
    pytest.importorskip("torch")
    write_photos(empty_folder / "photos", 4)
    write_photos(empty_folder / "labelled/tow", 2)
    (empty_folder / "empty").mkdir()
    (empty_folder / "broken").mkdir()
    for number in range(3):
        (empty_folder / f"broken/{number}.jpg").write_bytes(b"no picture")
    tiny(empty_folder, change)
    result = prgkit("distill", "tiny.yaml", "export")
    assert result.code == 1
    error = result.err[result.err.index("Error: ") :]
    assert error.startswith(f"Error: {message}")
    assert "\n  fix: " in error or "did you mean" in error
    assert len(error) < 800
    assert result.out == "" or "labels" in message


@pytest.mark.parametrize("command", ["bench", "predict photos/00.png"])
def test_a_truncated_onnx_file_is_named(prgkit: PrgkitCommand, project_copy: Path, command: str) -> None:
    model = project_copy / "runs/tiny/bundle/model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-100])
    result = prgkit(command)
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"Error: model.onnx is truncated: {len(whole) - 100} of {len(whole)} bytes\n"
        "  where: runs/tiny/bundle/model.onnx\n"
        "  fix: copy the bundle again, or make the file again: prgkit export\n"
    )


def test_a_truncated_engine_is_named(prgkit: PrgkitCommand, project_copy: Path) -> None:
    from prgkit.export.bundle.bundle import describe_artifact
    from prgkit.storage.atomic import read_sealed, write_sealed

    bundle = project_copy / "runs/tiny/bundle"
    engine = bundle / "model.fp32.tensorrt_rtx.engine"
    engine.write_bytes(b"x" * 1000)
    manifest = read_sealed(bundle / "manifest.json")
    manifest["artifacts"].append(
        describe_artifact(bundle, engine.name, name="tensorrt_rtx-fp32", format="engine", precision="fp32",
                          backend="tensorrt_rtx", executed=False, note=None, parity=None, export_options=("--trt",)).to_json()
    )  # fmt: skip
    write_sealed(bundle / "manifest.json", manifest)
    engine.write_bytes(b"x" * 900)
    result = prgkit("bench")
    assert result.code == 1
    assert result.err.startswith("Error: model.fp32.tensorrt_rtx.engine is truncated: 900 of 1000 bytes\n")
    assert result.err.endswith("make the file again: prgkit export --trt\n")


def test_a_full_disk_is_told_before_the_work(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    write_photos(empty_folder / "photos")
    tiny(empty_folder)
    usage = type(shutil.disk_usage(empty_folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1024, 1024))
    result = prgkit("distill", "tiny.yaml")
    assert result.code == 1
    assert re.search(r"Error: the target store needs 5\.\d KiB, and 1\.0 KiB are free\n  where: targets/", result.err)
    assert "  fix: free some space, or choose another disk with --run and --targets\n" in result.err


def test_a_disk_that_fills_up_is_told_with_what_was_needed(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from safetensors import SafetensorError

    write_photos(empty_folder / "photos")
    tiny(empty_folder)

    def full(*_: Any, **__: Any) -> None:  # what safetensors says, on a file system of 1 MiB
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("prgkit.storage.tensors.save_file", full)
        result = prgkit("distill", "tiny.yaml")
    assert result.code == 1
    error = result.err[result.err.index("Error: ") :].splitlines()
    assert error[0].startswith("Error: no disk space left for ")
    assert "; it needed " in error[0]
    assert error[2] == "  fix: free some space and run the same command again: finished work is kept"

    def write(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        result = prgkit("distill", "tiny.yaml", "--run", "other")
    assert result.code == 1
    assert "Error: no disk space left for recipe.yaml; it needed " in result.err
    assert prgkit("distill", "tiny.yaml").code == 0  # space was made, and the same command goes on

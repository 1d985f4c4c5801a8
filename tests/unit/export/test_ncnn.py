"""ncnn's files: PyTorch's logits in two precisions, a folder that travels whole, and short errors where it is not."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prgkit.errors import BackendError, ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache, building
from prgkit.export.bundle.bundle import verify_artifact
from prgkit.export.bundle.manifest import Artifact
from prgkit.export.formats.mobile.ncnn import NCNN_FORMAT
from prgkit.export.formats.options import ExportOptions
from prgkit.export.formats.snippets import render
from prgkit.export.runtimes import open_runner
from prgkit.export.runtimes.ncnn import BIN, NCNN_RUNTIME, PARAM, NcnnRunner
from tests.conftest import SIZE, Exported, export_family

pytest.importorskip("pnnx")
pytest.importorskip("ncnn")


def student_export(student: Exported, folder: Path, cache: ArtifactCache, **options: Any) -> Any:
    """An export of a student whose FP32 ONNX file is made."""
    from prgkit.export.formats.student_export import StudentExport

    work = folder.parent / "work"
    work.mkdir(exist_ok=True)
    shutil.copy(student.fp32, folder / "model.onnx")
    return StudentExport(
        student.student,
        [f"thing {number}" for number in range(20)],
        student.preprocessing,
        ExportOptions(**options),
        student.pixels[:48],
        None,
        folder=folder,
        work=work,
        cache=cache,
        origin={},
        note=lambda _: None,
    )


Converted = tuple[Path, list[Artifact]]


def convert(student: Exported, folder: Path) -> Converted:
    """Return a folder with a student's ncnn files in FP32 and FP16."""
    folder.mkdir()
    cache = ArtifactCache(folder, bundle=folder / "none", note=lambda _: None)
    export = student_export(student, folder, cache, formats=("ncnn",), fp16=True)
    return folder, list(NCNN_FORMAT.make(export).artifacts)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The files of timm's smallest student."""
    folder = tmp_path_factory.mktemp("ncnn")
    return convert(export_family("test_efficientnet", folder), folder / "bundle")


def test_its_files_give_pytorchs_logits_and_say_what_they_take(exported: Exported, tmp_path: Path) -> None:
    folder, (fp32, fp16) = convert(exported, tmp_path / "bundle")
    for artifact in (fp32, fp16):
        assert artifact.executed
        assert artifact.parity is not None
        assert artifact.parity.top1_agreement >= 99
        assert artifact.input is not None
        assert (artifact.input.name, artifact.input.shape) == ("in0", (3, SIZE, SIZE))
        assert sorted(path.name for path in (folder / artifact.file).iterdir()) == [BIN, PARAM]
    assert fp32.bytes == sum(path.stat().st_size for path in (folder / "model.ncnn").iterdir())
    assert fp16.bytes < 0.6 * fp32.bytes
    runner = open_runner(folder, fp32, threads=1)
    assert (runner.name, runner.backend, runner.device) == ("ncnn-fp32", "ncnn", "cpu")
    logits = runner.run(exported.pixels[:2])
    assert (logits.shape, logits.dtype) == ((2, 20), np.float32)
    runner.close()


def test_a_folder_is_an_artifact_like_a_file(converted: Converted, tmp_path: Path) -> None:
    """It is verified, kept by an export that was killed, taken over by the next one, and removed where it is not."""
    source, (artifact, _) = converted
    new = tmp_path / ".bundle.new"
    shutil.copytree(source / "model.ncnn", new / "model.ncnn")
    ArtifactCache(new, bundle=tmp_path / "bundle", note=print).add(artifact, {"of": "this"})
    shutil.copytree(source / "model.ncnn", new / "model.fp16.ncnn")  # unfinished when the kill came
    notes: list[str] = []
    with building(tmp_path / "bundle") as folder:
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["model.ncnn"]
        cache = ArtifactCache(folder, bundle=tmp_path / "bundle", note=notes.append)
        kept = cache.get(artifact.name, {"of": "this"}, lambda: pytest.fail("made again"))
    verify_artifact(tmp_path / "bundle", kept)
    assert notes == ["model.ncnn: finished before, and made from the same; it is kept"]
    other = tmp_path / "other"
    other.mkdir()
    cache = ArtifactCache(other, bundle=tmp_path / "bundle", note=print)
    verify_artifact(other, cache.bring(kept))
    cache.leave_only([])
    assert not (other / "model.ncnn").exists()
    (tmp_path / "bundle/model.ncnn" / BIN).unlink()
    with pytest.raises(ExportError, match=r"model.ncnn is truncated: \d+ of \d+ bytes") as caught:
        verify_artifact(tmp_path / "bundle", kept)
    assert caught.value.fix == "copy the bundle again, or make the file again: prgkit export --ncnn"


@pytest.mark.parametrize(
    ("file", "keep", "what"),
    [
        (BIN, None, f"model.ncnn has no {BIN}"),
        (PARAM, None, f"model.ncnn has no {PARAM}"),
        (BIN, 0.5, f"ncnn cannot open {BIN}: it is damaged or truncated"),
        (PARAM, 0.5, f"ncnn cannot open {PARAM}: it is damaged or truncated"),
        (PARAM, 0, f"ncnn cannot open {PARAM}: it is damaged or truncated"),
    ],
)
def test_a_damaged_folder_is_a_short_error(
    converted: Converted,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    file: str,
    keep: float | None,
    what: str,
) -> None:
    shutil.copytree(converted[0] / "model.ncnn", folder := tmp_path / "model.ncnn")
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if keep is not None:
        (folder / file).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BackendError) as caught:
        NcnnRunner(folder)
    assert caught.value.what == what
    assert "prgkit export --ncnn" in str(caught.value.fix)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif("NCNN_ROOT" not in os.environ, reason="NCNN_ROOT: a folder with ncnn's include/ and lib/")
def test_the_readmes_program_in_cpp_gives_the_runtimes_answers(converted: Converted, tmp_path: Path) -> None:
    student = export_family("test_efficientnet", tmp_path)
    folder, files = converted
    program = render("ncnn.cpp", student.preprocessing, files=files)
    (tmp_path / "name.cpp").write_text(program)
    command = program.splitlines()[0].removeprefix("// ").replace("NCNN", os.environ["NCNN_ROOT"])
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    pixels = student.pixels[:12]
    wanted = NcnnRunner(folder / "model.ncnn", threads=1).run(pixels).argmax(axis=1)
    assert len(set(wanted)) > 1
    for image, answer in zip(pixels, wanted, strict=True):
        done = subprocess.run([tmp_path / "name"], input=image.tobytes(), cwd=folder, capture_output=True, check=True)
        assert done.stdout.decode() == f"class {answer}, counted from 0\n"
    short = subprocess.run([tmp_path / "name"], input=b"", cwd=folder, check=False)
    assert short.returncode == 1


def test_what_is_missing_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(formats=("ncnn",))
    NCNN_FORMAT.require(options)
    with pytest.raises(ExportError, match="hold their class vectors"):
        NCNN_FORMAT.require(ExportOptions(formats=("ncnn",), class_vectors="input"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError) as caught:
        NCNN_FORMAT.require(options)
    assert caught.value.fix == "pip install 'prgkit[ncnn-export]'"
    assert NCNN_RUNTIME.examine({"ncnn": None}) == [("ncnn CPU", "pip install 'prgkit[ncnn]'")]

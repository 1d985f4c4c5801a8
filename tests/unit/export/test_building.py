"""A bundle takes the place of an older one, and of nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache, building
from prgkit.export.bundle.bundle import describe_artifact, input_spec, output_spec
from prgkit.export.bundle.manifest import EvaluationFacts, Manifest, RunFacts, StudentFacts, TeacherFacts
from prgkit.storage.atomic import write_sealed


@pytest.mark.parametrize("text", ['{"name": "app"}', '{"schema": "prgkit.run/3"}', '["prgkit.bundle/3"]', "{", ""])
def test_a_folder_with_somebody_elses_manifest_stays(tmp_path: Path, text: str) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text(text)
    (app / "index.html").write_text("<html>")
    with pytest.raises(ExportError, match="holds something that is not a bundle"), building(app, "pulled"):
        pytest.fail("it is somebody else's")
    assert sorted(path.name for path in app.iterdir()) == ["index.html", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["app"]


def test_a_bundle_of_another_version_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text('{"schema": "prgkit.bundle/9"}')
    with building(tmp_path / "bundle") as new:
        (new / "model.onnx").touch()
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["model.onnx"]


def a_bundle(folder: Path, *files: str) -> Path:
    """Write a bundle with these artifacts, of a student that never was."""
    (folder / "golden").mkdir(parents=True)
    (folder / "golden/00.png").touch()
    (folder / "README.md").write_text("how it is run")
    artifacts = []
    for file in files:
        (folder / file).write_text(file)
        facts = {"name": file, "format": "onnx", "precision": "fp32", "backend": "onnxruntime"}
        artifacts.append(describe_artifact(folder, file, **facts, executed=False, note=None, parity=None))
    preprocessing = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    manifest = Manifest(
        prgkit="0",
        created="today",
        run=RunFacts(name="none", fingerprint="0", objective="kd", epochs=1),
        recipe={},
        teacher=TeacherFacts(model="none", fingerprint="0"),
        student=StudentFacts(model="none"),
        classes=("a", "b"),
        preprocessing=preprocessing,
        input=input_spec(preprocessing),
        output=output_spec("ab"),
        artifacts=tuple(artifacts),
        evaluation=EvaluationFacts(images=0, labelled=False, source="none"),
    )
    write_sealed(folder / "manifest.json", {"schema": "prgkit.bundle/3", **manifest.to_json()})
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle in which the user keeps things of all kinds, and an export, killed ones, what they leave."""
    folder = a_bundle(tmp_path / "run/bundle", "model.onnx", "model.fp16.onnx")
    (folder / "answers.csv").write_text("mine")
    (folder / "maps/deep").mkdir(parents=True)
    (folder / "maps/deep/00.png").write_text("mine")
    (folder / "maps/gone").symlink_to("nowhere")
    (folder / "photos").symlink_to("../photos")  # what it leads to is elsewhere
    (tmp_path / "run/photos").mkdir()
    (tmp_path / "run/photos/00.png").touch()
    (folder / "lost").symlink_to("nowhere")
    for name in (".lock", ".README.md.x7.part", "model.fp32.tensorrt_rtx.engine", "finished.jsonl"):
        (folder / name).touch()
    return folder


THEIRS = ["answers.csv", "lost", "maps", "photos"]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_kept(folder: Path) -> None:
    """Assert that what the user keeps there is what it was."""
    assert (folder / "answers.csv").read_text() == (folder / "maps/deep/00.png").read_text() == "mine"
    links = [folder / name for name in ("lost", "photos", "maps/gone")]
    assert [os.readlink(link) for link in links] == ["nowhere", "../photos", "nowhere"]
    assert listed(folder / "photos") == ["00.png"]


def test_what_no_export_made_stays_and_what_one_made_does_not_pile_up(bundle: Path) -> None:
    for file in ("model.int8.onnx", "model.ncnn", "model.onnx"):
        with building(bundle, note=pytest.fail) as new:
            a_bundle(new, file)
        is_kept(bundle)
        assert listed(bundle) == sorted(["README.md", "golden", "manifest.json", file, *THEIRS])
        assert listed(bundle.parent) == ["bundle", "photos"]
    (bundle / "manifest.json").write_text('{"schema": "prgkit.bundle/9"}')
    with building(bundle, note=pytest.fail) as new:
        a_bundle(new, "model.fp16.onnx")
    is_kept(bundle)
    assert listed(bundle) == sorted(["README.md", "golden", "manifest.json", "model.fp16.onnx", *THEIRS])


def test_what_cannot_stay_is_named(bundle: Path) -> None:
    (bundle / "model.ncnn").write_text("mine")
    (bundle / "model.rknn").write_text("mine")
    notes: list[str] = []
    with building(bundle, note=notes.append) as new:
        a_bundle(new, "model.ncnn")
    assert notes == ["model.ncnn, which no export made, makes way for the bundle's own of that name"]
    assert [(bundle / f"model.{kind}").read_text() for kind in ("ncnn", "rknn")] == ["model.ncnn", "mine"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_loses_nothing_that_no_export_made(bundle: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    if (child := os.fork()) == 0:
        with building(bundle) as new:
            a_bundle(new, "model.onnx")
            rename, left = Path.rename, iter(range(renames))
            monkeypatch.setattr(Path, "rename", lambda one, to: die() if next(left, None) is None else rename(one, to))
            monkeypatch.setattr("shutil.rmtree", die)  # of the old one
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(ExportError), building(bundle):
        raise ExportError("stopped, so that nothing but the repair is done")
    is_kept(bundle)
    assert listed(bundle.parent) == ["bundle", "photos"]
    assert listed(bundle.parent / "photos") == ["00.png"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_bundle_that_is_a_link_stays_one(tmp_path: Path, is_there: bool) -> None:
    disk, link = tmp_path / "bigdisk/bundle", tmp_path / "run/bundle"
    (disk if is_there else disk.parent).mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk)
    for name in "abc":
        with building(link) as new:
            assert new.parent == disk.parent
            (new / "manifest.json").write_text('{"schema": "prgkit.bundle/3"}')
            (new / f"model.{name}").touch()
        assert link.is_symlink()
        assert sorted(path.name for path in disk.iterdir()) == ["manifest.json", f"model.{name}"]
    assert [path.name for path in disk.parent.iterdir()] == ["bundle"]
    assert [path.name for path in link.parent.iterdir()] == ["bundle"]


def test_a_finished_folder_of_another_origin_makes_way(tmp_path: Path) -> None:
    """A killed export of another student has left it; its format writes a folder of the same name."""
    pytest.importorskip("torch")
    from prgkit.export.formats.options import ExportOptions
    from prgkit.export.formats.student_export import StudentExport

    facts = {"name": "ncnn-fp32", "format": "ncnn", "precision": "fp32", "backend": "ncnn"}
    new, nothing = tmp_path / ".bundle.new", object()
    (new / "model.ncnn").mkdir(parents=True)
    (new / "model.ncnn/old.bin").touch()
    cache = ArtifactCache(new, bundle=tmp_path / "bundle", note=print)
    before = describe_artifact(new, "model.ncnn", **facts, executed=False, note=None, parity=None)
    cache.add(before, {"of": "another student"})

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "new.bin").touch()

    given: Any = (nothing, (), nothing, ExportOptions(), nothing, None)
    export = StudentExport(*given, folder=new, work=tmp_path, cache=cache, origin={"of": "this one"}, note=print)
    how = {key: facts[key] for key in ("format", "precision", "backend")}
    made = export.finish("ncnn-fp32", "model.ncnn", write=write, runner=None, note="never executed", **how)
    assert [path.name for path in (new / "model.ncnn").iterdir()] == ["new.bin"]
    assert made.sha256 != before.sha256

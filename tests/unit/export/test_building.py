"""A bundle takes the place of an older one, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import ArtifactCache, building
from prgkit.export.bundle.bundle import describe_artifact


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
            (new / name).touch()
        assert link.is_symlink()
        assert sorted(path.name for path in disk.iterdir()) == [name, "manifest.json"]
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

"""A bundle takes the place of an older one, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import building


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

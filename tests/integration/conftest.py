"""A run and its bundle, made once; every test works on a copy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from prgkit.cli.main import main
from tests.conftest import TINY_RECIPE, write_photos


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a recipe, a finished run and its bundle; tests copy it."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("project")
    write_photos(folder / "photos")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["prgkit", "distill", "tiny.yaml", "export"])
        main()
    return folder


@pytest.fixture
def project_copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is the current folder."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"

"""mypy --strict over the package under its import names, which an editable install hides from mypy."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import prgkit
from tests.conftest import pyproject

ROOT = Path(__file__).parents[2]


def test_the_stub_of_the_package_names_what_it_exports() -> None:
    stub = ast.parse((ROOT / "toolkit" / "__init__.pyi").read_text())
    named = {
        name.asname: (statement.module, name.name)
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom)
        for name in statement.names
    }
    assert named == {name: (home, name) for name, home in prgkit._HOMES.items()}


def test_strict_types(tmp_path: Path) -> None:
    folders = pyproject()["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, tmp_path / package.replace(".", "/"), ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(
        ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results")
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "-p",
        "prgkit",
        "-p",
        "benchmarks",
        "--config-file",
        str(ROOT / "pyproject.toml"),
    ]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

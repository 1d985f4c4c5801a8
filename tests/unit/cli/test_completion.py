"""What a shell completes, as Click's script asks for it, and what is told of versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from prgkit import __version__
from prgkit.cli.main import cli
from prgkit.cli.versions import WORKED_WITH
from tests.conftest import PrgkitCommand


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dis", ["distill"]),
        ("recipes --n", ["--new"]),
        ("distill cifar1", ["cifar10", "cifar100"]),
        ("distill mi", ["mine.yaml"]),
        ("distill demo ex", ["export"]),  # the command that follows
        ("distill demo export --lit", ["--litert"]),  # options are those of the last one
        ("export --open-vocabulary in", ["initializer", "input"]),
        ("export --litert be", ["bench"]),
        ("completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_a_line_is_completed(line: str, offered: list[str], empty_folder: Path) -> None:
    (empty_folder / "mine.yaml").write_text("")
    *words, begun = line.split(" ")
    found = ShellComplete(cli, {}, "prgkit", "_PRGKIT_COMPLETE").get_completions(words, begun)
    assert [item.value for item in found] == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_prgkit_and_its_variable(
    prgkit: PrgkitCommand, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(click.shell_completion.BashComplete, "_check_version", staticmethod(lambda: None))
    script = prgkit(f"completion {shell}").out
    assert f"_PRGKIT_COMPLETE={shell}_complete" in script
    assert script == prgkit(f"completion {shell} --json").json["completion"]["script"]


def test_versions(prgkit: PrgkitCommand) -> None:
    lines = prgkit("--version").out.splitlines()
    assert lines[0].split() == ["prgkit", __version__]
    assert [line.split()[0] for line in lines] == ["prgkit", "Python", *WORKED_WITH]
    assert any(
        line.split(maxsplit=1) == ["tensorrt", "not installed"] or line.startswith("tensorrt ") for line in lines
    )


def test_versions_import_nothing_of_it() -> None:
    code = (
        "import sys\n"
        "from prgkit.cli.main import cli\n"
        "try: cli.main(['--version'], prog_name='prgkit')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'PIL', 'timm', 'openvino', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

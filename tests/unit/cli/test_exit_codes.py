"""How a command ends: a user's mistake with its fix, a bug with its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from prgkit.cli.main import cli
from prgkit.errors import PrgkitError
from prgkit.storage.atomic import write_sealed
from tests.conftest import TINY_RECIPE, CliResult, PrgkitCommand, raising


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PrgkitError("it is wrong", where="here", fix="do this"), 1, "Error: it is wrong\n  where: here\n  fix: do this\n"),
        (KeyboardInterrupt(), 130, "\nStopped. What was finished is kept; the same command goes on from there.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1,
         "Error: no disk space left\n  where: x.bin\n  fix: free some and run the same command again\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1,
         "Error: no disk space left\n  fix: free some and run the same command again\n"),
        (OSError(errno.EROFS, "Read-only file system", "bench"), 1, "Error: read-only file system\n  where: bench\n"
         "  fix: make it accessible, or work in another place, such as a copy of it\n"),
    ],
)  # fmt: skip
def test_exit_codes(
    prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(cli.commands["doctor"], "callback", raising(error))
    assert prgkit("doctor") == CliResult(code, "", message)


@pytest.mark.parametrize("bug", [ValueError("a bug"), OSError(errno.EACCES, "denied"), EOFError("a bug")])
def test_a_bug_keeps_its_traceback(prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    monkeypatch.setattr(cli.commands["doctor"], "callback", raising(bug))
    with pytest.raises(type(bug)) as caught:
        prgkit("doctor")
    assert caught.value is bug


def test_being_stopped_is_no_error(prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    from prgkit.interrupt import Interrupted

    stopped = Interrupted("stopped in epoch 1 of 2; everything up to here is saved", fix="the same command goes on")
    monkeypatch.setattr(cli.commands["doctor"], "callback", raising(stopped))
    message = "Stopped in epoch 1 of 2; everything up to here is saved\n  fix: the same command goes on\n"
    assert prgkit("doctor") == CliResult(130, "", message)


@pytest.mark.parametrize(
    "line",
    ["distill demo", "targets demo", "audit demo", "distill demo --dry-run", "distill imagenet1k", "export --run run"],
)
def test_the_base_install_says_which_extra_a_command_needs(empty_folder: Path, line: str) -> None:
    (empty_folder / "run").mkdir()
    (empty_folder / "run/recipe.yaml").write_text(TINY_RECIPE)
    card = {"schema": "prgkit.run/3", "prgkit": "", "created": "", "fingerprint": "", "origin": "..", "finished": False}
    write_sealed(empty_folder / "run/card.json", card)
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {line.split()}; from prgkit.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert CliResult(done.returncode, done.stdout, done.stderr) == CliResult(
        1,
        "",
        "Error: this command needs torch, which the base install leaves out\n  fix: pip install 'prgkit[distill]'\n",
    )


def test_trt_without_tensorrt_is_told_before_the_training(
    prgkit: PrgkitCommand, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    result = prgkit("distill", "demo", "export", "--trt")
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith(
        "Error: no TensorRT can build an engine here\n  tensorrt: not installed; pip install 'prgkit[trt]'"
    )
    assert "\n  fix: pip install 'prgkit[rtx]'" in result.err
    assert not list(empty_folder.iterdir())
    only = prgkit("export", "--backend", "tensorrt_rtx").err
    assert "tensorrt_rtx: not installed" in only
    assert "tensorrt:" not in only

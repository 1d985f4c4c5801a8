"""What reaches a terminal, a file or a pipe, whatever their encoding and width."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import PrgkitCommand


def test_a_terminal_that_is_not_utf_8_loses_nothing_and_ends_nothing(
    prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {"käse – 3 × 2 ± 1 …": "5 µs → 日\udce9 ┃━"}
    monkeypatch.setattr(
        "prgkit.config.recipe.shipped_recipes", lambda: {name: Path(text) for name, text in lines.items()}
    )
    monkeypatch.setattr("prgkit.config.recipe.summary_line", str)
    result = {}
    for encoding in ("ascii", "latin-1", "cp1252"):
        for option in ("", "--json"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding)
            monkeypatch.setattr(sys, "stdout", stream)
            assert prgkit(f"recipes {option}").code == 0
            stream.flush()
            result[encoding + option] = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert result["ascii"] == "  k\\xe4se - 3 x 2 +- 1 ...  5 us -> \\u65e5\\udce9 |-\n"
    assert result["latin-1"] == "  käse - 3 × 2 ± 1 ...  5 µs -> \\u65e5\\udce9 |-\n"
    assert result["cp1252"] == "  käse – 3 × 2 ± 1 …  5 µs -> \\u65e5\\udce9 |-\n"
    assert all(json.loads(result[f"{encoding}--json"]) == {"recipes": lines} for encoding in ("ascii", "latin-1"))


@pytest.mark.parametrize("line", ["recipes", "recipes --json", "recipes --show demo"])
def test_a_reader_that_has_seen_enough_is_no_error(empty_folder: Path, line: str) -> None:
    ends, writes = os.pipe()
    os.close(ends)
    command = [sys.executable, "-m", "prgkit", *line.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_without_a_home_the_temporary_folder_stands_for_it(
    prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert prgkit("recipes").code == 0
    assert os.environ["HOME"] == tempfile.gettempdir()
    monkeypatch.delenv("HOME")
    assert prgkit("predict ~/x.png --run nowhere").err.startswith("Error: there is no such run folder\n")


def test_a_terminal_shows_a_bar_that_long_facts_do_not_push_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.cli.terminal import Terminal

    monkeypatch.setenv("COLUMNS", "80")

    with Terminal(says_results=True, shows_progress=True) as terminal:
        terminal.err._force_terminal = True
        terminal.start("teacher", 10, "img")
        terminal.advance(4, "epoch 1/2  loss [0.5]" + 10 * "  agreement 98.4 %")
        terminal.note("a [note]")
        terminal.advance(6)
        terminal.end_stage()
        terminal.start("student", 5, "img")
        terminal.say("done [all]")
    result = capsys.readouterr()
    assert result.out == "done [all]\n"
    assert "10/10" in result.err
    assert "epoch 1/2  loss [0.5]" in result.err
    assert "a [note]" in result.err


def test_where_no_bar_can_move_a_line_comes_every_30_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.cli.terminal import Terminal

    clock = iter([100.0, 110.0, 129.9, 130.0, 150.0, 3760.0])
    monkeypatch.setattr("prgkit.cli.terminal.time.monotonic", lambda: next(clock))
    with Terminal(says_results=True, shows_progress=True) as terminal:
        terminal.start("student", 100_000, "img")
        terminal.advance(40_000)  # a stage that goes on where another process stopped
        for _ in range(5):
            terminal.advance(1_000, "epoch 1/2  loss [0.5]")
        terminal.end_stage()
    assert capsys.readouterr().err == (
        "student: 100,000 img\n"
        "student: 43,000/100,000 img  100 img/s  10 min left  epoch 1/2  loss [0.5]\n"
        "student: 45,000/100,000 img  1.4 img/s  11 h 11 min left  epoch 1/2  loss [0.5]\n"
    )
    with Terminal(says_results=True, shows_progress=False) as terminal:
        terminal.start("student", 10, "img")
        terminal.advance(10)
    assert capsys.readouterr().err == ""

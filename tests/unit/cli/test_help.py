"""The help: one screen, in 80 columns, and a word on every option."""

from __future__ import annotations

import click
import pytest

from prgkit.cli.main import cli
from tests.conftest import CliResult, PrgkitCommand

HELP = """\
Usage: prgkit [OPTIONS] COMMAND [ARGS]...

  Distil CLIP into a small classifier for your device, without a label.

  Commands chain; each one works on what the one before made:
    prgkit distill demo export --trt bench
    prgkit distill --images photos/ --classes names.txt export bench

Options:
  --version   Show versions and exit.
  -h, --help  Show this message and exit.

Commands:
  distill         Teach a student from unlabelled images.
  export          Turn the student into ONNX and TensorRT.
  relabel         Give an open-vocabulary bundle other classes.
  bench           Measure every artifact on this machine.
  predict         Name what is in an image.
  push            Publish a bundle on the Hugging Face Hub.
  pull            Bring a bundle from the Hugging Face Hub.
  targets         Let the teacher see the images, and no more.
  adapt-teacher   Fit the teacher to your images by a few labels.
  audit           Tick some of the teacher's answers yourself.
  label           Write down the teacher's answer to each image.
  suggest-labels  Say which images to label, if you label a few.
  compare         Set objectives and students against each other.
  recipes         List the recipes.
  completion      Print what completes prgkit in a shell.
  doctor          Say what can run on this machine.
"""


def test_help_is_one_screen(prgkit: PrgkitCommand) -> None:
    assert prgkit("--help") == CliResult(0, HELP, "")
    assert prgkit("-h").out == HELP
    assert prgkit().code == 2
    assert prgkit("--version").out.startswith("prgkit ")


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_its_help_in_80_columns(prgkit: PrgkitCommand, name: str) -> None:
    result = prgkit(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: prgkit {name} ")
    assert max(map(len, result.out.splitlines())) <= 80


def test_options_say_what_they_take() -> None:
    for command in cli.commands.values():
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, option.name

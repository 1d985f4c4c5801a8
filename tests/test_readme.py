"""What the README tells people to type is typed here: every command parses, every recipe loads, every link exists."""

import re
import shlex
from pathlib import Path

import click
import pytest
import tomllib

from prgkit.chain import split_at_commands
from prgkit.cli import cli
from prgkit.page import parse
from prgkit.recipe import validate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 10
    assert {command.split()[0] for command in COMMANDS} == {"make", "prgkit"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("prgkit")])
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command.split(" > ")[0])[1:]
    head, parts = split_at_commands(words, cli.commands)
    assert head == []
    assert parts
    for name, *rest in parts:
        with click.Context(cli) as group:
            cli.commands[name].make_context(name, list(rest), parent=group)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_every_make_target_exists(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [block for kind, block in BLOCKS if kind == "yaml"])
def test_every_recipe_on_the_page_is_valid(page: str) -> None:
    recipe = validate(parse(page, where="README"), where="README").resolved()
    assert recipe.objective_name == "prg"


def test_every_file_it_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_packages_it_names_are_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"prgkit\[(\w+)\]", README)) | {"rtx", "trt", "hf"} <= set(extras)

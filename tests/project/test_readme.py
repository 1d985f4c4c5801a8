"""What README and docs tell people to type is typed here: commands parse, recipes load, linked files exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from prgkit.cli.chain import split_at_commands
from prgkit.cli.main import cli
from prgkit.config.recipe import validate
from prgkit.config.yaml_io import parse_yaml
from tests.conftest import pyproject

ROOT = Path(__file__).parents[2]
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]
TYPED = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]
COMMANDS = list(dict.fromkeys(TYPED))


def test_there_are_commands_and_links_to_check() -> None:
    assert len(COMMANDS) > 10
    assert "](docs/start.md)" in PAGES[ROOT / "README.md"]
    assert {command.split()[0] for command in COMMANDS} >= {"make", "prgkit"}


@pytest.mark.parametrize(
    "command", [found for line in COMMANDS for found in re.findall(r"(?:^|[ '/])(prgkit [^']+(?:'[^']*'[^']*)*)", line)]
)
def test_every_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").touch()
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
    recipe = validate(parse_yaml(page, where="README"), where="README").resolved()
    assert recipe.objective_name == "prg"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_it_links_to_exists(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


def test_the_packages_it_names_are_the_extras() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    named = {name for text in PAGES.values() for name in re.findall(r"prgkit\[(\w+)\]", text)}
    assert named | {"rtx", "trt", "hf"} <= set(extras)

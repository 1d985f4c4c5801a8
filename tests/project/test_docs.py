"""The site: its reference has every key and command of the code, and it builds without a warning."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prgkit.cli.main import cli
from prgkit.config.objectives import OBJECTIVES
from tests.conftest import pyproject

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "row",
    [
        "| `images` | text | required | a folder, a .zip,",
        "| `min_confidence` | number, ≥ 0, < 1 | `0.0` | images below it are not learned from |",
        "| `image_size` | whole number or \\[whole number, whole number\\] | `224` |",
        # A comment above the field, and YAML's word for Python's None.
        "| `aspect` | number or null, > 0 | `null` | Width / height that crops have on average; null: the",
        "| `warmup_epochs` | number, ≥ 0 | `1.0` |",
        "| `trackers` | list of `tensorboard`, `wandb` | `[]` |",
    ],
)
def test_a_recipe_key_has_its_value_default_and_comment(generate: ModuleType, row: str) -> None:
    assert row in generate.recipe_keys()


def test_every_objective_and_command_is_there(generate: ModuleType) -> None:
    objectives, commands = generate.objective_keys(), generate.commands()
    assert [name for name in OBJECTIVES if f"\n## `{name}`\n" not in objectives] == []
    assert [name for name in cli.commands if f"Usage: prgkit {name} " not in commands] == []
    assert "| `edge_weight` | number, ≥ 0 | `1.0` |" in objectives


def test_a_file_has_the_schema_of_the_model_that_writes_it(generate: ModuleType) -> None:
    page = generate.file_schemas()
    blocks = [block.split("\n```")[0] for block in page.split("```json\n")[1:]]
    assert [json.loads(block) for block in blocks] == [model.model_json_schema() for model in generate.FILES.values()]
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## `{name}`" for name in generate.FILES]


def test_what_is_generated_is_of_this_code(generate: ModuleType) -> None:
    """In a process of its own, whose commands no other test has touched."""
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")]
    assert sum(len(generate.MARK.findall(text)) for text in pages) == len(generate.PARTS)
    command = [sys.executable, DOCS / "generate.py", "--check"]
    stale = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert stale == "", "python docs/generate.py writes them"


def test_what_the_architecture_names_is_there() -> None:
    """Paths of files and folders, as `toolkit/training/distill.py`; what a reader looks for must be where it says."""
    page = (DOCS / "architecture.md").read_text()
    table = page.split("## Where is what")[1].split("## Layers")[0]
    paths = re.findall(r"`((?:toolkit|export|evaluate|recipes|benchmarks|tools|tests)/[^`]*)`", table)
    assert len(paths) > 40
    assert [path for path in paths if not (DOCS.parent / path).exists()] == []


def test_every_folder_of_the_code_is_in_the_tree() -> None:
    page = (DOCS / "architecture.md").read_text()
    packages = pyproject()["tool"]["setuptools"]["packages"]
    tops = {"export": "export", "evaluate": "evaluate", "recipes": "recipes"}
    folders = [
        "/".join([tops.get(top, f"toolkit/{top}"), *rest]) for _, top, *rest in (p.split(".") for p in packages[1:])
    ]
    assert [folder for folder in folders if f"| `{folder}/` |" not in page] == ["evaluate/report/plots"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    done = subprocess.run([*command, str(DOCS), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recipe = (tmp_path / "reference" / "recipe.html").read_text()
    assert "warmup_epochs" in recipe
    assert "@recipe_keys@" not in recipe

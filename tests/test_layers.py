"""The house's plan, read from its imports: who may import what, and what the device's install can live without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PACKAGES: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

# One owner for each heavy dependency.
OWNERS = {
    "open_clip": {"prgkit.prompts", "prgkit.teacher"},
    "timm": {"prgkit.student"},
    "click": {"prgkit.cli", "prgkit.chain", "prgkit.options"},
    "yaml": {"prgkit.page"},
    "rich": {"prgkit.terminal", "prgkit.evaluate.tables"},
    "accelerate": {"prgkit.devices", "prgkit.distill"},
    "tensorrt": {"prgkit.export.tensorrt", "prgkit.export.engine_runner"},
    "tensorrt_rtx": {"prgkit.export.tensorrt", "prgkit.export.engine_runner"},
    "onnxruntime": {"prgkit.export.runners", "prgkit.export.ranges", "prgkit.evaluate.bench", "prgkit.doctor"},
    "onnx": {
        "prgkit.export.onnx",
        "prgkit.export.graph",
        "prgkit.export.nchw",
        "prgkit.export.open_vocabulary",
        "prgkit.export.quantize",
        "prgkit.export.ranges",
    },
    "datasets": {"prgkit.datasets"},
    "torchvision": {"prgkit.datasets"},
    "sklearn": {"prgkit.demo.digits"},
}
# Modules that import torch, or onnx that comes with it, at their top, besides the objectives; all else needs no more than
# the base install.
NEEDS_TORCH = {
    "prgkit.adapt", "prgkit.answers", "prgkit.audit", "prgkit.checkpoint", "prgkit.context",
    "prgkit.devices", "prgkit.distill", "prgkit.estimate", "prgkit.evaluate.compare",
    "prgkit.evaluate.novel", "prgkit.evaluate.similarity", "prgkit.export.fidelity", "prgkit.export.graph",
    "prgkit.export.int8", "prgkit.export.nchw", "prgkit.export.onnx", "prgkit.export.open_vocabulary",
    "prgkit.export.pipeline", "prgkit.export.quantize", "prgkit.export.ranges",
    "prgkit.export.relabel", "prgkit.export.run", "prgkit.heads",
    "prgkit.joint", "prgkit.labelled", "prgkit.lesson", "prgkit.mixup", "prgkit.student", "prgkit.targets",
    "prgkit.teacher", "prgkit.tensors", "prgkit.trust", "prgkit.views",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in {
        **PACKAGES,
        "prgkit.objectives": "toolkit/objectives",
        "prgkit.demo": "toolkit/demo",
    }.items():
        for path in (ROOT / folder).glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_its_owners(dependency: str) -> None:
    users = {
        name
        for name, path in modules().items()
        if any(used == dependency or used.startswith(f"{dependency}.") for used in imports(path))
    }
    assert users <= OWNERS[dependency]


def test_only_the_modules_that_say_so_need_torch() -> None:
    reach = {name: imports(path, top_level_only=True) for name, path in modules().items()}

    def needs(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if any(used.split(".")[0] in ("torch", "timm", "open_clip", "accelerate", "onnx") for used in reach[name]):
            return True
        inner = {used for used in reach[name] if used in reach and used not in seen}
        return any(needs(used, seen | inner) for used in inner)

    objectives = {name for name in reach if name.startswith("prgkit.objectives")}
    assert {name for name in reach if needs(name)} == NEEDS_TORCH | objectives


def test_only_the_command_line_prints() -> None:
    for name, path in modules().items():
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        printing = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
        assert not printing, name


def test_every_module_says_in_one_sentence_what_it_is() -> None:
    for name, path in modules().items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert docstring.split("\n\n")[0].strip().endswith((".", "?")), name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from prgkit.cli import cli\n"
        "try: cli.main(['--help'], prog_name='prgkit')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'PIL', 'timm', 'open_clip', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

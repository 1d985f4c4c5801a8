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
    "open_clip": {"prgkit.config.prompts", "prgkit.teacher.clip"},
    "timm": {"prgkit.student.model"},
    "click": {"prgkit.cli.main", "prgkit.cli.chain", "prgkit.cli.options"},
    "yaml": {"prgkit.config.yaml_io"},
    "rich": {"prgkit.cli.terminal", "prgkit.evaluate.report.terminal"},
    "accelerate": {"prgkit.training.distributed", "prgkit.training.distill"},
    "tensorrt": {"prgkit.export.formats.tensorrt", "prgkit.export.runtimes.tensorrt"},
    "tensorrt_rtx": {"prgkit.export.formats.tensorrt", "prgkit.export.runtimes.tensorrt"},
    "onnxruntime": {
        "prgkit.export.runtimes.base",
        "prgkit.export.int8.calibration",
        "prgkit.evaluate.bench.bench",
        "prgkit.cli.doctor",
    },
    "onnx": {
        "prgkit.export.formats.onnx",
        "prgkit.export.formats.onnx_graph",
        "prgkit.export.formats.onnx_nchw",
        "prgkit.export.open_vocabulary",
        "prgkit.export.int8.qdq",
        "prgkit.export.int8.calibration",
    },
    "datasets": {"prgkit.data.hub"},
    "torchvision": {"prgkit.data.hub"},
    "sklearn": {"prgkit.demo.digits"},
}
# Modules that import torch, or onnx that comes with it, at their top, besides the objectives; all else needs no more than
# the base install.
NEEDS_TORCH = {
    "prgkit.teacher.prompt_tuning", "prgkit.teacher.zero_shot", "prgkit.annotation.audit", "prgkit.training.checkpoint", "prgkit.teacher.prompt_context",
    "prgkit.training.distributed", "prgkit.training.distill", "prgkit.cli.dry_run", "prgkit.evaluate.compare.trials",
    "prgkit.evaluate.compare.base_to_novel", "prgkit.evaluate.compare.diswot", "prgkit.export.int8.accuracy_control", "prgkit.export.formats.onnx_graph",
    "prgkit.export.int8.pipeline", "prgkit.export.formats.onnx_nchw", "prgkit.export.formats.onnx", "prgkit.export.open_vocabulary",
    "prgkit.export.pipeline", "prgkit.export.int8.qdq", "prgkit.export.int8.calibration",
    "prgkit.export.relabel", "prgkit.export.from_run", "prgkit.student.heads",
    "prgkit.teacher.ensemble", "prgkit.training.few_shot", "prgkit.training.dataset", "prgkit.training.mixup", "prgkit.student.model", "prgkit.teacher.feature_store",
    "prgkit.teacher.clip", "prgkit.storage.tensors", "prgkit.training.pseudo_labels", "prgkit.data.augment",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in {
        **PACKAGES,
        "prgkit.objectives": "toolkit/objectives",
        "prgkit.demo": "toolkit/demo",
    }.items():
        for path in (ROOT / folder).rglob("*.py"):
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
        "from prgkit.cli.main import cli\n"
        "try: cli.main(['--help'], prog_name='prgkit')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'PIL', 'timm', 'open_clip', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

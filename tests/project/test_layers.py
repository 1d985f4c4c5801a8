"""The house's plan, read from its imports: which folder may import which, and who owns a heavy dependency."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import pyproject

ROOT = Path(__file__).parents[2]
PACKAGES: dict[str, str] = pyproject()["tool"]["setuptools"]["package-dir"]

# The folders from low to high: an import points down, or stays within its layer. "" is what lies beside the folders.
LAYERS = [
    {"prgkit", "prgkit.demo"},
    {"prgkit.config", "prgkit.storage"},
    {"prgkit.data"},
    {"prgkit.teacher"},
    {"prgkit.objectives", "prgkit.objectives.features", "prgkit.objectives.logits", "prgkit.objectives.text"},
    {"prgkit.student"},
    {"prgkit.training"},
    {"prgkit.export.bundle"},
    {"prgkit.export.runtimes"},
    {"prgkit.export.formats", "prgkit.export.formats.mobile", "prgkit.export.int8"},
    {"prgkit.export"},
    {"prgkit.evaluate.report", "prgkit.evaluate.report.plots"},
    {"prgkit.evaluate"},
    {"prgkit.evaluate.accuracy"},
    {"prgkit.evaluate.bench"},
    {"prgkit.evaluate.compare"},
    {"prgkit.annotation"},
    {"prgkit.api"},
    {"prgkit.cli"},
]
ALONE = {
    "prgkit.__main__": "prgkit.cli",
    "prgkit.api": "prgkit.api",
}  # modules beside the folders with a layer of their own
# One owner for each heavy dependency: a folder, or a module where one is enough.
OWNERS = {
    "open_clip": {"prgkit.config.prompts", "prgkit.teacher"},
    "timm": {"prgkit.student", "prgkit.training"},
    "click": {"prgkit.cli"},
    "yaml": {"prgkit.config.yaml_io"},
    "jinja2": {"prgkit.evaluate.report.html", "prgkit.export.formats.snippets"},
    "rich": {"prgkit.cli.terminal", "prgkit.evaluate.report.terminal"},
    "accelerate": {"prgkit.training"},
    "tensorrt": {"prgkit.export.formats", "prgkit.export.runtimes"},
    "tensorrt_rtx": {"prgkit.export.formats", "prgkit.export.runtimes"},
    "onnxruntime": {
        "prgkit.cli.doctor",
        "prgkit.evaluate.bench",
        "prgkit.export.formats.mobile.qnn",
        "prgkit.export.int8",
        "prgkit.export.runtimes",
    },
    "onnx": {"prgkit.export.formats", "prgkit.export.formats.mobile", "prgkit.export.int8"},
    "cv2": {"prgkit.evaluate.accuracy.opencv", "prgkit.evaluate.live"},
    "ncnn": {"prgkit.export.runtimes.ncnn"},
    "pnnx": {"prgkit.export.formats.mobile.ncnn"},
    "coremltools": {"prgkit.export.formats.mobile.coreml"},
    "onnxruntime_qnn": {"prgkit.export.formats.mobile.qnn"},
    "litert_torch": {"prgkit.export.formats.mobile"},
    "ai_edge_quantizer": {"prgkit.export.formats.mobile"},
    "ai_edge_litert": {"prgkit.export.runtimes"},
    "executorch": {"prgkit.export.formats.mobile", "prgkit.export.runtimes"},
    "datasets": {"prgkit.data.hub"},
    "huggingface_hub": {"prgkit.export.hub", "prgkit.export.model_card"},
    "torchvision": {"prgkit.data.hub"},
    "ray": {"prgkit.teacher.ray_engine"},
    "fsspec": {"prgkit.storage.remote"},
    "sklearn": {"prgkit.demo.digits", "prgkit.teacher.refine"},
}
HEAVY = {"torch", "timm", "open_clip", "accelerate", "onnx"}
# Folders in which no module needs more than the base install, which has no torch.
LIGHT = [
    "prgkit.cli", "prgkit.config", "prgkit.demo", "prgkit.evaluate", "prgkit.evaluate.accuracy", "prgkit.evaluate.bench",
    "prgkit.evaluate.report", "prgkit.evaluate.report.plots", "prgkit.export.bundle", "prgkit.export.runtimes",
]  # fmt: skip


def modules() -> dict[str, Path]:
    """Return every module of the product by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path: Path, *, top_level_only: bool = False) -> frozenset[str]:
    nodes = ast.parse(path.read_text()).body if top_level_only else nodes_of(path)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def folder_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def layer_of(module: str) -> int:
    folder = ALONE.get(module) or folder_of(module)
    return next((number for number, layer in enumerate(LAYERS) if folder in layer), 0)  # recipes/ imports nothing


def test_imports_point_down_the_layers() -> None:
    upwards = [
        f"{name} imports {used}"
        for name, path in MODULES.items()
        for used in imports(path) & MODULES.keys()
        if layer_of(used) > layer_of(name)
    ]
    assert upwards == []


def test_no_modules_import_each_other() -> None:
    reach = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while leaves := {name for name, used in reach.items() if not used & reach.keys()}:
        reach = {name: used for name, used in reach.items() if name not in leaves}
    assert sorted(reach) == []


def test_a_folder_holds_no_more_than_one_can_read() -> None:
    """But one of an objective a file grows by them, and is read by name."""
    folders = [path.parent for path in MODULES.values() if path.parent != ROOT / "toolkit" / "objectives"]
    assert {str(folder) for folder in folders if folders.count(folder) > 14} == set()


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_its_owners(dependency: str) -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(used == dependency or used.startswith(f"{dependency}.") for used in imports(path))
    }
    assert {name for name in users if not {name, folder_of(name)} & OWNERS[dependency]} == set()


@pytest.mark.parametrize("folder", LIGHT)
def test_the_base_install_is_enough(folder: str) -> None:
    reach = {name: imports(path, top_level_only=True) for name, path in MODULES.items()}

    def needs(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if any(used.split(".")[0] in HEAVY for used in reach[name]):
            return True
        inner = {used for used in reach[name] if used in reach and used not in seen}
        return any(needs(used, seen | inner) for used in inner)

    assert [name for name in MODULES if folder_of(name) == folder and needs(name)] == []


def test_only_the_command_line_prints() -> None:
    for name, path in MODULES.items():
        calls = (node.func for node in nodes_of(path) if isinstance(node, ast.Call))
        printing = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
        assert not printing, name


def test_every_module_says_in_one_sentence_what_it_is() -> None:
    for name, path in MODULES.items():
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


def test_every_folder_with_modules_is_in_the_wheel() -> None:
    packages = set(pyproject()["tool"]["setuptools"]["packages"])
    assert {folder_of(name) for name in MODULES if name != "prgkit.recipes"} | {"prgkit.recipes"} == packages

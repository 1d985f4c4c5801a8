"""The reference, made from the code: recipe keys, objectives, commands and JSON schemas as Markdown. Needs no torch.

    python docs/generate.py

writes it into the pages between its marks, but for the schemas, which are on the site alone, and prints which pages
that changed; with --check it prints them alone.
"""

import ast
import inspect
import io
import json
import re
import sys
import tokenize
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prgkit.cli.main import cli
from prgkit.config.objectives import OBJECTIVES, Config, ObjectiveConfig, objective_lines
from prgkit.config.recipe import Recipe
from prgkit.evaluate.compare.schema import DeviceComparison, ObjectiveComparison, Ranking, TrialResult
from prgkit.evaluate.report.samples import Samples
from prgkit.evaluate.report.schema import Report
from prgkit.export.bundle.engine_metadata import EngineMetadata
from prgkit.export.bundle.manifest import Manifest
from prgkit.storage.quality import Statistics
from prgkit.storage.run_card import RunCard

# Every file that people or programs read, and the model that it is written by. A new file's model gets its line here.
FILES: dict[str, type[BaseModel]] = {
    "recipe.yaml": Recipe,
    "runs/NAME/card.json": RunCard,
    "runs/NAME/quality.json": Statistics,
    "bundle/manifest.json": Manifest,
    "bundle/NAME.engine.json": EngineMetadata,
    "bench/MACHINE/report.json": Report,
    "bench/MACHINE/samples.json": Samples,
    "comparison/comparison.json": DeviceComparison,
    "runs/NAME-compared/compare.json": ObjectiveComparison,
    "runs/NAME-compared/rank.json": Ranking,
    "runs/NAME-compared/trials/TRIAL/trial.json": TrialResult,
}
LAYERS = Path(__file__).parents[1] / "tests" / "project" / "test_layers.py"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def recipe_keys() -> str:
    """Return a heading, a sentence and a table of keys for each section of a recipe."""
    return "\n\n".join(f"## `{name}`\n\n{first_line(model)}\n\n{table(model)}" for name, model in sections(Recipe))


def objective_keys() -> str:
    """Return a heading, a sentence and a table of its own keys for each objective."""
    common = f"## Every objective\n\n{table(ObjectiveConfig)}"
    return "\n\n".join(
        [common, *(f"## `{name}`\n\n{first_line(model)}\n\n{own_keys(model)}" for name, model in OBJECTIVES.items())]
    )


def objective_uses() -> str:
    """Return a table of what each objective is and when to use it."""
    rows = [line.split(" Use: ") for line in objective_lines().values()]
    named = zip(OBJECTIVES, rows, strict=True)
    table = [f"| [`{name}`](reference/objectives.md#{name}) | {use} | {what} |" for name, (what, use) in named]
    return "\n".join(["| objective | when to use it | what it is |", "|---|---|---|", *table])


def commands() -> str:
    """Return what `prgkit COMMAND --help` prints, for every command."""
    with click.Context(cli, info_name="prgkit", terminal_width=80, **cli.context_settings) as group:
        return "\n\n".join(
            f"## `prgkit {name}`\n\n```text\n{help_of(command, name, group)}\n```"
            for name, command in cli.commands.items()
            if not command.hidden
        )


def file_schemas() -> str:
    """Return a heading, a sentence and the JSON schema for each of `FILES`."""
    return "\n\n".join(
        f"## `{name}`\n\n{first_line(model)}\n\n{folded(schema(model))}" for name, model in FILES.items()
    )


def schema(model: type[BaseModel]) -> str:
    """Return a model's JSON schema as a block of code."""
    return f"```json\n{json.dumps(model.model_json_schema(), indent=2, ensure_ascii=False)}\n```"


def folded(block: str) -> str:
    """Return Markdown that is shown once the reader asks for it."""
    return f"<details><summary>JSON schema</summary>\n\n{block}\n\n</details>"


def layers() -> str:
    """Return the folders from low to high as a numbered list, as the tests hold it."""
    order: list[set[str]] = plan("LAYERS")
    rows = [" and ".join(f"`{folder}`" for folder in sorted(layer)) for layer in order]
    return "\n".join(f"{number}. {row}" for number, row in enumerate(rows, 1))


def dependency_owners() -> str:
    """Return a table of the heavy dependencies and the modules that may import them, as the tests hold it."""
    owners: dict[str, set[str]] = plan("OWNERS")
    rows = [f"| `{name}` | {', '.join(f'`{module}`' for module in sorted(owners[name]))} |" for name in owners]
    return "\n".join(["| dependency | modules that may import it |", "|---|---|", *rows])


def plan(name: str) -> Any:
    """Return a table of the layers' test by its name."""
    tree = ast.parse(LAYERS.read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(values[name])


def help_of(command: click.Command, name: str, group: click.Context) -> str:
    """Return one command's help, 80 columns wide."""
    with click.Context(command, parent=group, info_name=name, terminal_width=80) as context:
        return command.get_help(context)


def own_keys(model: type[Config]) -> str:
    """Return the table of an objective's keys without those that all have."""
    hidden = {"name", *ObjectiveConfig.model_fields}
    return table(model, hidden=hidden) if model.model_fields.keys() - hidden else "It has no keys of its own."


def sections(model: type[Config]) -> Iterator[tuple[str, type[Config]]]:
    """Yield the sections of a recipe by name; one within another comes after it, as ``data.keep``."""
    for name, field in model.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            yield name, inner
            yield from ((f"{name}.{deeper}", page) for deeper, page in sections(inner))


def section_of(field: FieldInfo) -> type[Config] | None:
    """Return the model of a section, of which a list may stand there too; None for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)), None)


def table(model: type[Config], *, hidden: set[str] | frozenset[str] = frozenset()) -> str:
    """Return a Markdown table of a model's keys: type, limits, default, and the comment that stands beside it."""
    notes = comments(model)
    rows = [
        f"| `{name}` | {kind(field.annotation)}{limits(field)} | {default(field)} | {notes.get(name, '')} |"
        for name, field in model.model_fields.items()
        if name not in hidden and section_of(field) is None
    ]
    return "\n".join(["| key | value | default | about |", "|---|---|---|---|", *rows])


def kind(annotation: Any) -> str:
    """Return a type in the words of someone who writes YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(one) for one in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return f"mapping of {kind(inner[0])} to {kind(inner[1])}"
    if origin is tuple:
        return f"\\[{', '.join(kind(one) for one in inner)}\\]"
    return WORDS[annotation]


def limits(field: FieldInfo) -> str:
    """Return what a number must hold, as ``, ≥ 0, < 1``."""
    return "".join(
        f", {sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in LIMITS.items()
        if hasattr(limit, name)
    )


def default(field: FieldInfo) -> str:
    """Return a default as YAML has it."""
    return "required" if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"


def comments(model: type[Config]) -> dict[str, str]:
    """Return the comment at the end of each field's line, or else the comment lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(model)).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                above.append(text)
            elif name:
                found[name] = text
        elif token.type == tokenize.NAME and token.start[1] == 4 and token.line[token.end[1] :].startswith(":"):
            name = token.string
            if above:
                found[name] = " ".join(above)
        elif token.type == tokenize.NEWLINE:
            above, name = [], ""
    return {key: text.replace("|", "\\|").replace("None:", "null:") for key, text in found.items()}


def first_line(model: type[BaseModel]) -> str:
    """Return the first line of a docstring, its double backquotes as Markdown has them."""
    return (model.__doc__ or "").splitlines()[0].replace("``", "`")


def written(page: str) -> str:
    """Return a page's text with what is generated for each of its marks between them, as of now."""
    return MARK.sub(lambda mark: f"{mark[1]}\n\n{PARTS[mark[2]]()}\n\n{mark[3]}", page)


MARK = re.compile(r"(<!-- (\w+), written by docs/generate.py -->).*?(<!-- end -->)", re.DOTALL)
PARTS: dict[str, Callable[[], str]] = {
    "recipe_keys": recipe_keys,
    "objective_keys": objective_keys,
    "objective_uses": objective_uses,
    "commands": commands,
    "layers": layers,
    "dependency_owners": dependency_owners,
}

if __name__ == "__main__":
    stale = [
        page
        for page in Path(__file__).parent.rglob("*.md")
        if written(page.read_text("utf-8")) != page.read_text("utf-8")
    ]
    for page in stale:
        print(page.name)
        if "--check" not in sys.argv:
            page.write_text(written(page.read_text("utf-8")), "utf-8")

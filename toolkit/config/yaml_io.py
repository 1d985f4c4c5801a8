"""YAML as a recipe may have it: read without its traps, and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from prgkit.errors import RecipeError
from prgkit.storage.atomic import read_text, write_text

YamlMapping = dict[str, Any]  # of sections and keys, as they stand in a file and before anything in it is checked


def read_yaml(path: Path) -> YamlMapping:
    """Read a recipe's file.

    Raises:
        RecipeError: it cannot be read, or is broken.
    """
    return parse_yaml(read_recipe_text(path), where=path)


def read_recipe_text(path: Path) -> str:
    """Read a recipe's text as it stands in its file."""
    try:
        return read_text(path)
    except ValueError as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=path, fix="save it as UTF-8 text") from error


def parse_yaml(text: str, *, where: object) -> YamlMapping:
    """Read YAML into a mapping, or say on which line it is broken."""
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        what = problem if isinstance(error, _Refused) else f"the recipe is no valid YAML: {problem}"
        raise RecipeError(what, where=f"{where}{line}") from error
    except RecursionError as error:
        raise RecipeError("the recipe is nested too deeply", where=where) from error
    if not isinstance(raw, dict):
        raise RecipeError(
            "the recipe is no mapping of sections", where=where, fix="prgkit recipes --show custom prints one to copy"
        )
    return raw


def plain_yaml(text: str) -> Any:
    """Read any YAML without tags; None where it is none. A key that stands twice is refused: one would be lost."""
    try:
        return yaml.load(text, _Plain)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def yaml_text(value: object) -> str:
    """Return a value as one line of YAML, from which `parse_yaml` reads it back; paths become text."""

    def plain_value(other: Any) -> Any:
        return other.tolist() if hasattr(other, "tolist") else os.fspath(other)  # numpy's numbers and arrays, paths

    plain = json.loads(json.dumps(value, default=plain_value))
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def write_yaml(values: YamlMapping, path: Path) -> None:
    """Write a mapping as YAML, in its own order."""
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a recipe has no use for."""


class _Plain(yaml.SafeLoader):
    """Any YAML without tags in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if len({str(key.value) for key, _ in node.value}) < len(node.value):
            fix = "keep one of each"
            raise RecipeError("a key stands twice", where=f"line {node.start_mark.line + 1} and below", fix=fix)
        return super().construct_mapping(node, deep=deep)


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no aliases (they can explode), no key twice (the first would be lost)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _Refused(problem="an alias (*name) stands for a value; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _Refused(problem="a key is a single word; write key: value", problem_mark=key.start_mark)
            if key.value in seen:
                raise _Refused(problem=f"the key {key.value!r} stands twice; keep one", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, IndexError, AttributeError, OverflowError) as error:  # a 13th month, 5,000 digits
            problem = f"this cannot be read as a value: {str(node.value)[:40]!r}; put quotes around it"
            raise _Refused(problem=problem, problem_mark=node.start_mark) from error

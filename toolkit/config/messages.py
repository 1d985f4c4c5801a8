"""A recipe's mistakes in its writer's words: the path of each, what is wrong, and the nearest right key."""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from prgkit.config.yaml_io import yaml_text
from prgkit.errors import nearest

Location = Sequence[int | str]
Models = Mapping[str, type[BaseModel]]
ONE_OR_MANY = ("teacher", "objective")  # sections that are one mapping, or a list of them


def explain(mistake: Mapping[str, Any], sections: Models, objectives: Models, *, listed: Container[str]) -> str:
    """Say one of pydantic's errors; ``listed`` are those of ONE_OR_MANY that are a list in the recipe."""
    location, kind, value = mistake["loc"], mistake["type"], mistake["input"]
    path = spell(location, listed=listed)
    if kind == "extra_forbidden":
        return f"{path}: unknown key{right_key(location, sections, objectives)}"
    if kind == "missing":
        return f"{path}: missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}.name: {wrong_objective(value.get('name'), objectives)}"
    if kind in ("model_type", "model_attributes_type"):
        wanted = "{name: prg}" if location[0] == "objective" else "{key: value}"
        return f"{path}: empty" if value is None else f"{path}: write a mapping such as {wanted}, not {value!r}"
    if kind == "literal_error":
        known = [word.strip("' ") for word in mistake["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(value, known) if isinstance(value, str) else ""
        return f"{path}: {value!r} is none of {', '.join(known)}{hint}"
    return f"{path}: {misread(kind, value) or described(mistake)}" if path else described(mistake)


def spell(location: Location, *, listed: Container[str]) -> str:
    """Return a place in the recipe as its writer sees it: ``training.epochs``, ``data.classes[2]``."""
    path = ""
    for before, part in zip(("", *location), location, strict=False):
        if isinstance(part, int):
            path += f"[{part}]" if before in listed or before not in ONE_OR_MANY else ""
        elif " " not in part and not (isinstance(before, int) and location[0] == "objective"):  # else a union's tag
            path += f".{part}" if path else part
    return path


def right_key(location: Location, sections: Models, objectives: Models) -> str:
    """Name the key that was meant: the same word in another section, else a close one of this section."""
    wrong, section = str(location[-1]), location[:-1]
    if section and section[0] == "objective":
        owners = [name for name, model in objectives.items() if wrong in model.model_fields]
        if owners:
            return f"; it is a parameter of {' and '.join(filter(None, [', '.join(owners[:-1]), owners[-1]]))}"
        known = list(objectives[str(section[-1])].model_fields)
    else:
        known = list(sections[".".join(part for part in section if isinstance(part, str))].model_fields)
    elsewhere = [f"{name}.{wrong}" for name, model in sections.items() if name and wrong in model.model_fields]
    if any(wrong in model.model_fields for model in objectives.values()):
        elsewhere.append(f"objective.{wrong}")
    if elsewhere:
        return f"; it belongs in {' or '.join(elsewhere)}"
    if difflib.get_close_matches(wrong.lower(), known, n=1, cutoff=0.5):
        return nearest(wrong, known)
    return f"; known: {', '.join(known)}"


def wrong_objective(name: object, objectives: Models) -> str:
    """Say that an objective has no name, or none that is known."""
    known = ", ".join(objectives)
    if name is None:
        return f"missing; known: {known}"
    return f"unknown objective {name!r}, known are {known}{nearest(str(name), objectives)}"


def misread(kind: str, value: object) -> str | None:
    """Say what YAML made of a value that was meant as another: ``1e-3`` is text to it, ``no`` is false."""
    if kind == "string_type" and isinstance(value, bool):
        return f"YAML reads yes, no, on and off as {str(value).lower()}; put the word in quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return f"YAML reads {value} as a number; put it in quotes"
    number = to_number(value) if kind in ("float_type", "int_type") else None
    if number is None:
        return None
    if kind == "int_type" and number.is_integer():
        return f"YAML reads {value} as text; write {int(number)}, without quotes"
    return f"YAML reads {value} as text; write {yaml_text(number)}, with a dot and no quotes"


def to_number(value: object) -> float | None:
    """Read text as a finite number, or return None."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return number if number is not None and abs(number) < float("inf") else None


def described(mistake: Mapping[str, Any]) -> str:
    """Return pydantic's own words, or those of one of the recipe's validators, in the recipe's terms."""
    if mistake["type"] in ("too_long", "too_short"):
        return f"must have {mistake['ctx'].get('max_length') or mistake['ctx']['min_length']} values"
    if not mistake["loc"]:
        return str(mistake["msg"]).removeprefix("Value error, ")
    words = str(mistake["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    for theirs, ours in (("valid array", "list"), ("valid integer", "whole number"), ("boolean", "true or false")):
        words = words.replace(theirs, ours)
    words = words.replace("a valid ", "a ").replace("a true or false", "true or false")
    return f"{words[0].lower()}{words[1:]}, not {mistake['input']!r}"


def first_mistake(error: ValidationError) -> str:
    """Return the first of pydantic's mistakes in a file that a program wrote: where it is, and what."""
    mistake = error.errors()[0]
    return f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}"

"""A figure for each class: how often it comes (targets.prior), or what its images count (training.class_weights)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from prgkit.config.delimited import LARGEST_TABLE_BYTES, ways
from prgkit.config.prompts import canonical
from prgkit.errors import RecipeError, nearest, some
from prgkit.storage.atomic import read_text

EVEN: Literal["even"] = "even"
LEAST_SHARE = 1e-6


def load_by_class(
    given: str | Mapping[str, float] | None, classes: Sequence[str], *, key: str, word: str
) -> str | dict[str, float] | None:
    """Return the recipe's ``word``, or the figure of each class in label order; those of a file, where one is named.

    Raises:
        RecipeError: the file cannot be read, or names other classes than the recipe.
    """
    if given is None or given == word:
        return given
    where: object = key
    if isinstance(given, str):
        where = f"{key}: {given}"
        given = read_figures(Path(os.path.expanduser(given)), word)
    spelled = {canonical(name): name for name in classes}
    names = [spelled.get(canonical(name), name) for name in given]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(f"{twice[0]!r} stands twice", where=where, fix="keep one of the two")
    given = dict(zip(names, given.values(), strict=True))
    if unknown := [name for name in given if name not in classes]:
        hint = nearest(unknown[0], classes)
        raise RecipeError(
            f"no class is named {unknown[0]!r}{hint}", where=where, fix="write the names as the classes are"
        )
    if missing := [name for name in classes if name not in given]:
        raise RecipeError(
            f"there is no figure of {some(missing)}", where=where, fix="give every class one, 0 where it is none"
        )
    if not any(given.values()):
        raise RecipeError("the figure of every class is 0", where=where, fix="give some class one above 0")
    return {name: given[name] for name in classes}


def class_shares(prior: str | Mapping[str, float] | None, classes: Sequence[str]) -> list[float] | None:
    """Return the share of each class [C], summing to 1, of a loaded prior; None where none is known.

    None is below LEAST_SHARE: an image of a class that "never comes" is not ruled out, and its logarithm is finite.
    """
    if prior is None:
        return None
    shares = [1.0] * len(classes) if isinstance(prior, str) else [prior[name] for name in classes]
    total = math.fsum(shares)
    shares = [max(share / total, LEAST_SHARE) for share in shares]
    total = math.fsum(shares)
    return [share / total for share in shares]


def read_figures(path: Path, word: str) -> dict[str, float]:
    """Read a table of two columns, class and figure, with or without a header; percentages will do, if all are.

    Raises:
        RecipeError: there is no such file, or a line has no share in it.
    """
    fix = (
        "name a file with one class and its figure a line, such as: ripe tomato,0.4; or give {name: figure, ...}, or "
        f"{word}"
    )
    try:
        by_delimiter, at_spaces = ways(read_text(path, most_bytes=LARGEST_TABLE_BYTES))
        rows = [*by_delimiter, *at_spaces][0]()
    except (ValueError, csv.Error) as error:
        raise RecipeError(f"the figures cannot be read: {error}", where=path, fix=fix) from error
    figures: dict[str, float] = {}
    percents = {cells[1].endswith("%") for _, cells in rows if len(cells) == 2 and as_figure(cells[1]) is not None}
    if len(percents) > 1:
        raise RecipeError("some figures are percentages and some are not", where=path, fix="write all of them alike")
    for number, (line, cells) in enumerate(rows):
        figure = as_figure(cells[1]) if len(cells) == 2 else None
        if figure is None and number == 0 and len(cells) == 2 and not any(letter.isdigit() for letter in cells[1]):
            continue  # a header
        if figure is None:
            what = f"{' '.join(cells)!r} is no class with a figure from 0 on"
            raise RecipeError(what, where=f"{path}, line {line}", fix=fix)
        if cells[0] in figures:
            raise RecipeError(f"{cells[0]!r} stands twice", where=f"{path}, line {line}", fix="keep one of the two")
        figures[cells[0]] = figure
    return figures


def as_figure(text: str) -> float | None:
    """Read a number from 0 on, with or without a percent sign; None for anything else."""
    try:
        figure = float(text.removesuffix("%"))
    except ValueError:
        return None
    return figure if 0 <= figure < math.inf else None

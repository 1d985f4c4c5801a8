"""How often each class comes, where the user knows it: targets.prior."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from prgkit.config.delimited import LARGEST_TABLE_BYTES, ways
from prgkit.errors import RecipeError, nearest, some
from prgkit.storage.atomic import read_text

EVEN: Literal["even"] = "even"
LEAST_SHARE = 1e-6


def load_prior(prior: str | Mapping[str, float] | None, classes: Sequence[str]) -> str | dict[str, float] | None:
    """Return "even", or the share of each class in label order; the shares of a file, where one is named.

    Raises:
        RecipeError: the file cannot be read, or names other classes than the recipe.
    """
    if prior is None or prior == EVEN:
        return prior
    where: object = "targets.prior"
    if isinstance(prior, str):
        where = Path(os.path.expanduser(prior))
        prior = read_shares(where)
    fix = "give every class a share, 0 where it never comes"
    if unknown := [name for name in prior if name not in classes]:
        hint = nearest(unknown[0], classes)
        raise RecipeError(
            f"no class is named {unknown[0]!r}{hint}", where=where, fix="write the names as the classes are"
        )
    if missing := [name for name in classes if name not in prior]:
        raise RecipeError(f"the prior has no share of {some(missing)}", where=where, fix=fix)
    if not any(prior.values()):
        raise RecipeError(
            "every share of the prior is 0", where=where, fix="give the classes that come a share above 0"
        )
    return {name: prior[name] for name in classes}


def class_shares(prior: str | Mapping[str, float] | None, classes: Sequence[str]) -> list[float] | None:
    """Return the share of each class [C], summing to 1, of a loaded prior; None where none is known.

    None is below LEAST_SHARE: an image of a class that "never comes" is not ruled out, and its logarithm is finite.
    """
    if prior is None:
        return None
    shares = [1.0] * len(classes) if isinstance(prior, str) else [prior[name] for name in classes]
    total = math.fsum(shares)
    shares = [max(share / total, LEAST_SHARE) for share in shares]
    return [share / math.fsum(shares) for share in shares]


def read_shares(path: Path) -> dict[str, float]:
    """Read a table of two columns, class and share, with or without a header; counts will do as well.

    Raises:
        RecipeError: there is no such file, or a line has no share in it.
    """
    fix = (
        "name a file with one class and its share a line, such as: ripe tomato,0.4; or give {name: share, ...}, or even"
    )
    try:
        by_delimiter, at_spaces = ways(read_text(path, most_bytes=LARGEST_TABLE_BYTES))
        rows = [*by_delimiter, *at_spaces][0]()
    except (ValueError, csv.Error) as error:
        raise RecipeError(f"the shares cannot be read: {error}", where=path, fix=fix) from error
    shares: dict[str, float] = {}
    percents = {cells[1].endswith("%") for _, cells in rows if len(cells) == 2 and as_share(cells[1]) is not None}
    if len(percents) > 1:
        raise RecipeError("some shares are percentages and some are not", where=path, fix="write all of them alike")
    for number, (line, cells) in enumerate(rows):
        share = as_share(cells[1]) if len(cells) == 2 else None
        if share is None and number == 0 and len(cells) == 2 and not any(letter.isdigit() for letter in cells[1]):
            continue  # a header
        if share is None:
            raise RecipeError("this is no class with its share", where=f"{path}, line {line}", fix=fix)
        if cells[0] in shares:
            raise RecipeError(f"{cells[0]!r} stands twice", where=f"{path}, line {line}", fix="keep one of the two")
        shares[cells[0]] = share
    return shares


def as_share(text: str) -> float | None:
    """Read a number from 0 on, with or without a percent sign; None for anything else."""
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        return None
    return share if 0 <= share < math.inf else None

"""Values that an option takes in one word: ``1,8,32``, ``5%``, ``86,89``, ``edge_weight=0,1,3``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prgkit.config.shard import Shard


def batch_sizes(text: str) -> list[int]:
    """Read ``1,8,32``."""
    batches = whole_numbers(text)
    if min(batches) < 1:
        raise click.BadParameter(f"write batch sizes as 1,8,32, not {text!r}.")
    return batches


def thread_counts(text: str) -> list[int]:
    """Read ``1,2,4``, in ascending order, each once."""
    counts = sorted(set(whole_numbers(text)))
    if counts[0] < 1:
        raise click.BadParameter(f"write numbers of threads as 1,2,4, not {text!r}.")
    return counts


def shard(text: str) -> Shard:
    """Read ``0/8``, or ``auto``."""
    from prgkit.config.shard import parse_shard

    try:
        return parse_shard(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} {error}.") from error


def worker_count(text: str) -> tuple[int, int]:
    """Read ``2:8``, or one number for both."""
    counts = whole_numbers(text.replace(":", ","))
    if len(counts) > 2 or not 1 <= counts[0] <= counts[-1]:
        raise click.BadParameter(f"write the least and the most workers as 2:8, not {text!r}.")
    return counts[0], counts[-1]


def batch_profile(text: str) -> tuple[int, int, int]:
    """Read ``1,1,32``: the least, the usual and the largest batch of an engine."""
    sizes = whole_numbers(text)
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise click.BadParameter(f"write the least, the usual and the largest as 1,1,32, not {text!r}.")
    return sizes[0], sizes[1], sizes[2]


def whole_numbers(text: str) -> list[int]:
    """Read whole numbers between commas; where one of them is none, return a 0, which no option takes."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return [0]


def minutes(text: str) -> float:
    """Read ``30`` or ``0.5``: minutes above none, and up to a day."""
    count = number(text)
    if not 0 < count <= 24 * 60:
        raise click.BadParameter(f"write minutes above 0 and up to 1440, a day, as 30; not {text!r}.")
    return count


def tolerance(text: str) -> float:
    """Read ``5%`` or ``0.05``; a bare ``5`` could be either, and is refused."""
    share = number(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    if not 0 <= share < 1:
        raise click.BadParameter(f"write a tolerance as 5% or 0.05, not {text!r}.")
    return share


def number(text: str) -> float:
    """Read a number, NaN where it is none: that lies within no bounds."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def gpu_generations(text: str) -> tuple[str, ...]:
    """Read ``86,89``, or ``8.6,8.9``, as ("SM86", "SM89"), and ``80+`` as ("SM80+",)."""
    numbers = [part.strip().upper().removeprefix("SM").replace(".", "") for part in text.split(",")]
    if numbers != ["80+"] and not all(number.isdecimal() and len(number) in (2, 3) for number in numbers):
        raise click.BadParameter(f"write compute capabilities as 86,89, not {text!r}.")
    return tuple(f"SM{number}" for number in dict.fromkeys(numbers))


def names(text: str) -> list[str]:
    """Read ``ce,kd,prg``, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def each_key_once(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse two values for one key: the first would be passed over in silence."""
    for key in {text.partition("=")[0].strip() for text in texts}:
        values = [text.partition("=")[2].strip() for text in texts if text.partition("=")[0].strip() == key]
        refuse_twice(f"{option.opts[-1]} {key}", values, ctx)
    return texts


def table_file(ctx: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Take a file whose name says whether it is CSV or JSON lines."""
    if path is not None and path.suffix.lower() not in (".csv", ".jsonl"):
        raise click.BadParameter(f"name a .csv or a .jsonl, not {str(path)!r}.", ctx, option)
    return path


def swept_values(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> list[tuple[str, list[Any]]]:
    """Read ``edge_weight=0,1,3`` as a parameter and its values, which are read as YAML."""
    from prgkit.config.yaml_io import parse_yaml
    from prgkit.errors import RecipeError

    each_key_once(ctx, option, texts)
    sweeps = []
    for text in texts:
        key, _, values = text.partition("=")
        try:
            parsed = parse_yaml(f"values: [{values}]", where="--sweep")["values"]
        except RecipeError:
            parsed = []
        if not key.strip() or not parsed:
            raise click.BadParameter(f"write a sweep as edge_weight=0,1,3, not {text!r}.", ctx, option)
        sweeps.append((key.strip(), parsed))
    return sweeps


def refuse_twice(option: str, values: Sequence[object], ctx: click.Context) -> None:
    """Refuse more than one value of what has one."""
    if len(values) > 1:
        listed = " and as ".join(value if isinstance(value, str) else "nothing" for value in values)
        raise click.UsageError(f"{option} is given {len(values)} times, as {listed}; give it once.", ctx)

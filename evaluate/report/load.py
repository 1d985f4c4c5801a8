"""The report.json of an earlier bench, read back."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.report.schema import REPORT_SCHEMA, Report
from prgkit.storage.atomic import read_json


def report_file(path: Path) -> Path:
    """Return where a report is: a bench's folder stands for the report.json in it."""
    return path / "report.json" if path.is_dir() else path


def read_report(path: Path) -> Report:
    """Read the report.json of a bench; its folder does as well.

    Raises:
        BenchError: there is none, it is damaged, or it is of another schema.
    """
    path = report_file(path)
    fix = "name the report.json that prgkit bench wrote"
    try:
        content = read_json(path, fix=fix)
    except PrgkitError as error:
        raise BenchError(error.what, where=error.where, fix=fix) from error
    if not isinstance(content, dict) or not str(content.get("schema", "")).startswith("prgkit.report/"):
        raise BenchError(f"{path.name} is not the report of a bench", where=path, fix=fix)
    if content["schema"] != REPORT_SCHEMA:
        raise BenchError(
            f"{path.name} has schema {content['schema']!r}, not {REPORT_SCHEMA!r}",
            where=path,
            fix="measure again: prgkit bench",
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        what, place = error.errors()[0]["msg"], ".".join(map(str, error.errors()[0]["loc"]))
        raise BenchError(
            f"{path.name} is the report of a bench with parts missing or changed: {place}: {what}", where=path, fix=fix
        ) from error

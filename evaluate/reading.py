"""The report.json of an earlier bench, read back."""

from __future__ import annotations

from pathlib import Path

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.wording import Report
from prgkit.files import read_json

SCHEMA = "prgkit.report/1"
KEYS = {"schema", "created", "machine", "run", "evaluation", "teacher", "rows"}


def read_report(path: Path) -> Report:
    """Read the report.json of a bench; its folder does as well.

    Raises:
        BenchError: there is none, it is damaged, or it is of another schema.
    """
    path = path / "report.json" if path.is_dir() else path
    fix = "name the report.json that prgkit bench wrote"
    try:
        report: Report = read_json(path, fix=fix)
    except PrgkitError as error:
        raise BenchError(error.what, where=error.where, fix=fix) from error
    if not isinstance(report, dict) or not report.keys() >= KEYS:
        raise BenchError(f"{path.name} is not the report of a bench", where=path, fix=fix)
    if report["schema"] != SCHEMA:
        raise BenchError(
            f"{path.name} has schema {report['schema']!r}, not {SCHEMA!r}",
            where=path,
            fix="measure again: prgkit bench",
        )
    return report

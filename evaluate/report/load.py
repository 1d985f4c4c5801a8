"""The report.json of an earlier bench, read back."""

from __future__ import annotations

from pathlib import Path

from prgkit.errors import BenchError, PrgkitError
from prgkit.evaluate.report.formatting import Report
from prgkit.storage.atomic import read_json

SCHEMA = "prgkit.report/1"
KEYS = {"schema", "created", "machine", "run", "evaluation", "teacher", "rows"}
ROW_KEYS = {
    *("artifact", "backend", "device", "precision", "threads", "status", "reason", "size_mib", "latency"),
    *("throughput", "top1", "agreement_teacher", "agreement_fp32"),
}


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
    whole = [isinstance(report[key], dict) for key in ("machine", "run", "evaluation", "teacher")]
    rows = report["rows"] if isinstance(report["rows"], list) else [None]
    if not all([*whole, *(isinstance(row, dict) and row.keys() >= ROW_KEYS for row in rows)]):
        raise BenchError(f"{path.name} is the report of a bench with parts missing", where=path, fix=fix)
    return report

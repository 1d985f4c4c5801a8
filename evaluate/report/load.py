"""The report.json of an earlier bench, read back."""

from __future__ import annotations

from pathlib import Path

from prgkit.errors import BenchError
from prgkit.evaluate.report.schema import REPORT_SCHEMA, Report
from prgkit.storage.documents import read_document


def report_file(path: Path) -> Path:
    """Return where a report is: a bench's folder stands for the report.json in it."""
    return path / "report.json" if path.is_dir() else path


def read_report(path: Path) -> Report:
    """Read the report.json of a bench; its folder does as well.

    Raises:
        BenchError: there is none, it is damaged, or it is of another schema.
    """
    fix = "name the report.json that prgkit bench wrote, or measure again: prgkit bench"
    what = "the report of a bench"
    return read_document(report_file(path), Report, REPORT_SCHEMA, what=what, fix=fix, error=BenchError, sealed=False)

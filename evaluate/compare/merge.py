"""Several reports become one comparison: of devices, of students, or of a device before and after. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import prgkit
from prgkit.errors import BenchError
from prgkit.evaluate.compare.devices import devices_document
from prgkit.evaluate.compare.schema import ComparedReport, ComparedRow, DeviceComparison
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.html import page
from prgkit.evaluate.report.markdown import markdown
from prgkit.evaluate.report.regression import machine_name
from prgkit.evaluate.report.schema import Report, read_report, report_file
from prgkit.storage.atomic import write_json, write_text


def merge(paths: Sequence[Path], *, out: Path, command: str) -> DeviceComparison:
    """Lay reports, or those in folders, side by side in their order; write comparison.json, .md and .html into ``out``.

    Raises:
        BenchError: a report cannot be read, is given twice, or nothing in any of them was measured.
    """
    reports = [read_report(path) for path in paths]
    for path, count in Counter(report_file(path).resolve() for path in paths).items():
        if count > 1:
            raise BenchError("a report is given twice", where=path, fix="name each report once")
    names = names_of(reports)
    rows = [
        ComparedRow(
            **dict(row),
            report=index,
            best=formatting.best_throughput(row),
            refused=formatting.refused(report.int8, row),
        )
        for index, report in enumerate(reports)
        for row in report.rows
    ]
    if not any(row.status == "measured" for row in rows):
        raise BenchError("nothing was measured in any of these reports", fix="measure some: prgkit bench")
    comparison = DeviceComparison(
        prgkit=prgkit.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        reports=[
            ComparedReport(
                name=name,
                file=str(path),
                created=report.created,
                run=report.run,
                evaluation=report.evaluation,
                teacher=report.teacher,
                machine=machine_name(report.machine),
                system=report.machine.os,
                versions=report.machine.versions,
                notes=report.notes,
            )
            for name, path, report in zip(names, paths, reports, strict=True)
        ],
        rows=rows,
        notes=cautions(reports),
    )
    document = devices_document(comparison)
    write_text(out / "comparison.md", markdown(document))
    write_text(out / "comparison.html", page(document))
    write_json(out / "comparison.json", comparison.model_dump(mode="json"))
    return comparison


def names_of(reports: Sequence[Report]) -> list[str]:
    """Return a name for each report that no other has: its machine, where needed with the run, time or a number."""
    names = [machine_name(report.machine) for report in reports]
    runs = [str(report.run.name) for report in reports]
    times = [report.created[:16].replace("T", " ") for report in reports]
    numbers = [f"report {number}" for number in range(1, len(reports) + 1)]
    for more in (runs, times, numbers):
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        for name, members in groups.items():
            if len({more[index] for index in members}) > 1:
                for index in members:
                    names[index] = f"{name}, {more[index]}"
    return names


def cautions(reports: Sequence[Report]) -> list[str]:
    """Return what must be known before figures of different reports are compared."""
    first, sentences = reports[0], []
    if any(report.evaluation.digest != first.evaluation.digest for report in reports):
        sentences.append("Accuracy and agreement were not measured on the same images everywhere.")
    if any(report.teacher != first.teacher for report in reports):
        sentences.append("The teacher is not the same everywhere: agreement is with different answers.")
    rows = [row for report in reports for row in report.rows]
    if any(row.device == "cpu" for row in rows) and len({row.threads for row in rows if row.threads}) > 1:
        sentences.append("The processors were not measured with the same number of threads; each row says its own.")
    return sentences

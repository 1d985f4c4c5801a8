"""A comparison of several benches as a report: every artifact on every device, with its plots and its sources."""

from __future__ import annotations

from collections.abc import Mapping

from prgkit.evaluate.compare.schema import ComparedReport, ComparedRow, DeviceComparison
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import NONE, interval, mib, model_name, ms, percent
from prgkit.evaluate.report.latency_sections import accuracy_against_latency
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.charts import Bar, latency_bars
from prgkit.evaluate.report.schema import measured_latency
from prgkit.evaluate.report.sections import Cell, Column, Document, Section, TableRow, lines, table_row
from prgkit.evaluate.report.terminal import Table, table

ABOUT = (
    "Figures are those of the reports; nothing was measured for this page. Latency is the median of single calls at "
    "batch 1, with its 95 % interval; throughput is that of the best batch size. Latencies of different machines "
    "compare what a user of each would see, not the processors alone."
)


def devices_document(comparison: DeviceComparison) -> Document:
    """Return the comparison as a report."""
    reports = comparison.reports
    named = [(row_name(comparison, row), row, row.report) for row in measured(comparison)]
    legend = tuple((svg.colour(index), report.name) for index, report in enumerate(reports))
    bars = latency_bars(latency_groups(comparison))
    return Document(
        title=headline(comparison),
        origin=f"prgkit bench --merge · {comparison.created[:16].replace('T', ' ')}",
        sections=lines(
            [Section("Before you compare", notes=tuple(comparison.notes)) if comparison.notes else None],
            [artifacts(comparison)],
            [
                Section("Latency", "Bars begin at 0: twice as long is twice as slow.", plots=(bars,), page_only=True),
                accuracy_against_latency(named, legend=legend),
            ],
            *([source(report, dot=svg.colour(index))] for index, report in enumerate(reports)),
            [Section("Command", commands=(comparison.command,))],
        ),
        about=ABOUT,
    )


def headline(comparison: DeviceComparison) -> str:
    """Return the one sentence of a comparison: what is fastest, and where; of INT8 only what was kept there."""
    students = list(dict.fromkeys(model_name(report.run.student) for report in comparison.reports))
    fastest = min(measured(comparison), key=lambda row: (row.refused, measured_latency(row).p50_ms))
    return (
        f"{' and '.join(students)} in {len(comparison.reports)} benches: fastest is {row_name(comparison, fastest)} at "
        f"{ms(measured_latency(fastest).p50_ms)} ms on {comparison.reports[fastest.report].name}"
    )


def measured(comparison: DeviceComparison) -> list[ComparedRow]:
    """Return the rows that have a latency and no failure."""
    return [row for row in comparison.rows if row.status == "measured"]


def row_name(comparison: DeviceComparison, row: ComparedRow) -> str:
    """Return an artifact's name, with its threads where not all rows ran with as many."""
    differ = len({other.threads for other in comparison.rows if other.threads}) > 1
    return ", ".join(filter(None, [formatting.row_name(row), formatting.threads_of(row) if differ else ""]))


def artifacts(comparison: DeviceComparison) -> Section:
    """Return a row for each artifact on each device, in the order of the reports; top-1 where any has labels."""
    labelled = any(row.top1 is not None for row in comparison.rows)
    columns = (
        Column("Artifact", short="artifact", left=True),
        Column("Latency p50", "ms", short="p50 ms"),
        Column("Best rate", "img/s", short="images/s"),
        *([Column("Top-1", short="top-1")] if labelled else []),
        Column("Same as teacher", short="= teacher"),
        Column("Size", "MiB", short="MiB"),
    )
    rows = tuple(artifact(comparison, compared, labelled=labelled) for compared in comparison.rows)
    return Section("Every artifact on every device", columns=columns, rows=rows, group="device")


def devices_table(comparison: DeviceComparison) -> Table:
    """Return the comparison for the terminal."""
    return table(artifacts(comparison), title=headline(comparison), notes=comparison.notes)


def artifact(comparison: DeviceComparison, compared: ComparedRow, *, labelled: bool) -> TableRow:
    """Return an artifact's figures on a device, or why there are none."""
    device = comparison.reports[compared.report].name
    name = Cell(row_name(comparison, compared), dot=svg.colour(compared.report))
    size = mib(compared.size_mib)
    if compared.status != "measured":
        reason = Cell(compared.reason or "", chip=formatting.missing_chip(compared), span=4 if labelled else 3)
        return table_row(name, reason, size, group=device, muted=True)
    latency, best = measured_latency(compared), compared.best
    return table_row(
        name,
        Cell(ms(latency.p50_ms), formatting.interval_ms(latency.p50_interval_ms)),
        Cell(formatting.rate(best.images_per_s), f"batch {best.batch}") if best else NONE,
        *([Cell(percent(compared.top1), interval(compared.top1_interval))] if labelled else []),
        Cell(percent(compared.agreement_teacher), interval(compared.agreement_teacher_interval)),
        size,
        group=device,
    )


def latency_groups(comparison: DeviceComparison) -> Mapping[str, list[Bar]]:
    """Return the bars of each artifact; PyTorch's would only make the others short, so it has some only if alone."""
    groups: dict[str, list[Bar]] = {}
    rows = measured(comparison)
    for row in [row for row in rows if row.backend != "torch"] or rows:
        latency = measured_latency(row)
        bar = Bar(comparison.reports[row.report].name, latency.p50_ms, latency.p50_interval_ms, row.report)
        groups.setdefault(row_name(comparison, row), []).append(bar)
    return groups


def source(report: ComparedReport, *, dot: str) -> Section:
    """Return where a device's figures come from, and what its report said of them."""
    facts = [
        ("Run", f"{report.run.name}, {model_name(report.run.student)} from {report.run.teacher}"),
        ("Measured", report.created[:16].replace("T", " ")),
        ("Evaluated on", formatting.evaluated_on(report.evaluation)),
        ("Machine", report.machine),
        ("System", report.system),
        ("Runtimes", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Report", report.file),
    ]
    shown = tuple((name, value) for name, value in facts if value)
    return Section(report.name, facts=shown, notes=tuple(report.notes), dot=dot)

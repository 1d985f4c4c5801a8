"""The tables of the terminal: a report's rows, how they stand to a baseline, and how devices compare."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prgkit.evaluate.report import formatting, regression, sections, soak_section
from prgkit.evaluate.report.schema import BaselineComparison, Report, measured_latency


def report_table(report: Report) -> Table:
    """Return the rows as a table for the terminal."""
    labelled = report.evaluation.labelled
    said = [*sections.sweep_said(report), *sections.paced_said(report), *soak_section.soak_said(report)]
    said += [*formatting.audit_summary(report), *report.notes]
    result = plain_table(formatting.headline(report), said)
    result.add_column("artifact", no_wrap=True)
    for name in [
        "p50 ms",
        "p99 ms",
        "img/s",
        *(["top-1 %"] if labelled else []),
        "teacher %",
        "fp32 %",
        "MiB",
    ]:
        result.add_column(name, justify="right")
    for row in report.rows:
        if row.status != "measured":
            # Text, not a string: a reason may hold brackets that rich would read as markup.
            result.add_row(
                Text(formatting.row_name(row), style="dim"),
                Text("failed" if row.status == "failed" else "not run", style="yellow"),
            )
            continue
        best = formatting.best_throughput(row)
        result.add_row(
            Text(formatting.row_name(row)),
            formatting.ms(measured_latency(row).p50_ms),
            formatting.ms(measured_latency(row).p99_ms),
            formatting.rate(best.images_per_s if best else None),
            *([share(row.top1)] if labelled else []),
            share(row.agreement_teacher),
            share(row.agreement_fp32),
            formatting.mib(row.size_mib),
        )
    return result


def share(value: float | None) -> str:
    """Return a percentage for a column that names the unit."""
    return formatting.percent(value).removesuffix(" %")


def baseline_table(found: BaselineComparison) -> Table:
    """Return a report held against its baseline, a line for each figure that was compared."""
    result = plain_table(regression.about(found), regression.notes(found))
    for index, name in enumerate(regression.HEADER):
        result.add_column(name, justify="right" if 2 <= index <= 4 else "left", no_wrap=index == 0)
    for line in regression.cells(found):
        result.add_row(*map(Text, line[:-1]), Text(line[-1], style=STYLES.get(line[-1], "")))
    return result


STYLES = {"worse": "red", "better": "green"}


def plain_table(title: str, notes: Sequence[str]) -> Table:
    """Return a table without columns; Text, not strings: names may hold brackets that rich would read as markup."""
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text("\n".join(notes)) if notes else None,
        caption_justify="left",
    )

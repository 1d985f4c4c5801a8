"""What a comparison of several reports says: the lines of its table, Markdown, and a page with its plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from pydantic import Field

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import NONE
from prgkit.evaluate.report.html import cell, document, grid, heading, section, words
from prgkit.evaluate.report.plots import figures, svg
from prgkit.evaluate.report.plots.charts import Bar, latency_bars
from prgkit.evaluate.report.schema import (
    EvaluationImages,
    Model,
    Row,
    RunFacts,
    TeacherScores,
    Throughput,
    measured_latency,
)
from prgkit.evaluate.report.write import cell as text_cell
from prgkit.evaluate.report.write import grid as text_grid

SCHEMA: Literal["prgkit.comparison/2"] = "prgkit.comparison/2"
HOW = (
    "Figures are those of the reports; nothing was measured for this page. Latency is the median of single calls at "
    "batch 1, with its 95 % interval; throughput is that of the best batch size. Latencies of different machines "
    "compare what a user of each would see, not the processors alone."
)


class ComparedReport(Model):
    """One of the reports that are compared."""

    name: str = Field(description="What tells it apart from the others.")
    file: str
    created: str
    run: RunFacts
    evaluation: EvaluationImages
    teacher: TeacherScores
    machine: str
    system: str
    versions: dict[str, str]
    notes: list[str]


class ComparedRow(Row):
    """A row of one of the reports."""

    report: int = Field(description="The index of its report.")
    best: Throughput | None = Field(description="The batch size that moves the most images.")
    refused: bool = Field(description="Of INT8: not used on its machine.")


class Comparison(Model):
    """comparison.json: the rows of several reports side by side."""

    schema_version: Literal["prgkit.comparison/2"] = Field(SCHEMA, alias="schema")
    prgkit: str
    created: str
    command: str
    reports: list[ComparedReport]
    rows: list[ComparedRow]
    notes: list[str]


def headline(found: Comparison) -> str:
    """Return the one sentence of a comparison: what is fastest, and where; of INT8 only what was kept there."""
    students = list(dict.fromkeys(formatting.model_name(one.run.student) for one in found.reports))
    fastest = min(measured(found), key=lambda row: (row.refused, measured_latency(row).p50_ms))
    return (
        f"{' and '.join(students)} in {len(found.reports)} benches: fastest is {row_name(found, fastest)} at "
        f"{formatting.ms(measured_latency(fastest).p50_ms)} ms on {found.reports[fastest.report].name}"
    )


def measured(found: Comparison) -> list[ComparedRow]:
    """Return the rows that have a latency and no failure."""
    return [row for row in found.rows if row.status == "measured"]


def row_name(found: Comparison, row: ComparedRow) -> str:
    """Return an artifact's name, with its threads where not all rows ran with as many."""
    differ = len({other.threads for other in found.rows if other.threads}) > 1
    return ", ".join(filter(None, [formatting.row_name(row), formatting.threads_of(row) if differ else ""]))


def header(found: Comparison) -> list[str]:
    """Return the columns: top-1 where any report has labels, and agreement with the teacher."""
    labelled = any(row.top1 is not None for row in found.rows)
    return ["device", "artifact", "p50 ms", "images/s", *(["top-1"] if labelled else []), "= teacher", "MiB"]


def line(found: Comparison, row: ComparedRow) -> list[str]:
    """Return the cells of a row, the device first."""
    start = [found.reports[row.report].name, row_name(found, row)]
    columns = header(found)
    if row.status != "measured":
        return [*start, "failed" if row.status == "failed" else "not run", *[""] * (len(columns) - 4), size(row)]
    return [
        *start,
        formatting.ms(measured_latency(row).p50_ms),
        formatting.rate(row.best.images_per_s) if row.best else NONE,
        *([formatting.percent(row.top1)] if "top-1" in columns else []),
        formatting.percent(row.agreement_teacher),
        size(row),
    ]


def size(row: Row) -> str:
    """Return a file's size."""
    return formatting.mib(row.size_mib)


def markdown(found: Comparison) -> str:
    """Return the comparison as Markdown."""
    sources = [
        [one.name, one.run.name, one.created[:10], formatting.evaluated_on(one.evaluation), one.file]
        for one in found.reports
    ]
    parts = [
        f"# {text_cell(headline(found))}",
        text_grid(header(found), [line(found, row) for row in found.rows], names=2),
        *(["\n".join(f"- {text_cell(note)}" for note in found.notes)] if found.notes else []),
        "## Reports",
        text_grid(["device", "run", "measured", "on", "file"], sources, names=5),
        HOW,
    ]
    return "\n\n".join(parts) + "\n"


def comparison_page(found: Comparison) -> str:
    """Return the comparison as one self-contained page; everything that came from outside is escaped."""
    title = headline(found)
    made = f"prgkit bench --merge · {found.created[:16].replace('T', ' ')}"
    notes = "".join(f"<li>{words(note)}</li>" for note in found.notes)
    parts = [
        f'<header><p class="eyebrow">{escape(made)}</p><h1>{words(title)}</h1></header>',
        "<main>",
        f'<section><h2>Before you compare</h2><ul class="notes">{notes}</ul></section>' if notes else "",
        table(found),
        charts(found),
        sources(found),
        "</main>",
        f"<footer><p>{escape(HOW)}</p></footer>",
    ]
    return document(title, parts)


TITLES = {
    "p50 ms": ("Latency p50", "ms"),
    "images/s": ("Best rate", "img/s"),
    "top-1": ("Top-1", ""),
    "= teacher": ("Same as teacher", ""),
    "MiB": ("Size", "MiB"),
}


def table(found: Comparison) -> str:
    """Return a row for each artifact on each device, in the order of the reports."""
    columns = header(found)[2:]
    lines = []
    for row in found.rows:
        name, artifact, *figures = line(found, row)
        dot = f'<span class="dot" style="background: {svg.colour(row.report)}"></span>'
        title = f'<th scope="row">{dot}{escape(artifact)}<small>{escape(name)}</small></th>'
        if row.status != "measured":
            chip = f'<span class="chip{" bad" if row.status == "failed" else ""}">{escape(figures[0])}</span>'
            why = f'<td class="reason" colspan="{len(columns) - 1}">{chip} {escape(row.reason or "")}</td>'
            lines.append(f"<tr>{title}{why}{cell('Size MiB', figures[-1], '')}</tr>")
            continue
        intervals = {
            "p50 ms": formatting.interval_ms(measured_latency(row).p50_interval_ms),
            "images/s": f"batch {row.best.batch}" if row.best else "",
            "top-1": formatting.interval(row.top1_interval),
            "= teacher": formatting.interval(row.agreement_teacher_interval),
        }
        data = "".join(
            cell(" ".join(TITLES[column]).strip(), value, intervals.get(column, ""))
            for column, value in zip(columns, figures, strict=True)
        )
        lines.append(f"<tr>{title}{data}</tr>")
    head = heading("Artifact") + "".join(heading(*TITLES[column]) for column in columns)
    return section("Every artifact on every device", "", grid(head, lines, kind="stacked"))


def charts(found: Comparison) -> str:
    """Return the latencies as bars, and the quality against them."""
    rows = measured(found)
    drawn = [
        section("Latency", "Bars begin at 0: twice as long is twice as slow.", latency_bars(latency_groups(found)))
    ]
    labelled = all(row.top1 is not None for row in rows)
    name = "Top-1 accuracy, %" if labelled else "Same answer as the teacher, %"
    points = [
        figures.Point(
            label=row_name(found, row),
            latency_ms=measured_latency(row).p50_ms,
            latency_interval_ms=measured_latency(row).p50_interval_ms,
            score=score,
            score_interval=interval,
            colour=row.report,
        )
        for row in rows
        for score, interval in [formatting.score(row, labelled=labelled)]
        if score is not None
    ]
    if points:
        title = "Accuracy against latency" if labelled else "Fidelity against latency"
        drawn.append(section(title, figures.FRONT, legend(found) + figures.accuracy_latency(points, score_name=name)))
    return f'<div class="pair">{"".join(drawn)}</div>'


def latency_groups(found: Comparison) -> dict[str, list[Bar]]:
    """Return the bars of each artifact; PyTorch's would only make the others short, so it has some only if alone."""
    groups: dict[str, list[Bar]] = {}
    rows = measured(found)
    for row in [row for row in rows if row.backend != "torch"] or rows:
        latency = measured_latency(row)
        bar = Bar(found.reports[row.report].name, latency.p50_ms, latency.p50_interval_ms, row.report)
        groups.setdefault(row_name(found, row), []).append(bar)
    return groups


def legend(found: Comparison) -> str:
    """Return the colour of each device."""
    entries = [
        f'<span class="dot" style="background: {svg.colour(index)}"></span>{escape(one.name)}'
        for index, one in enumerate(found.reports)
    ]
    return f'<p class="about">{"<br>".join(entries)}</p>'


def sources(found: Comparison) -> str:
    """Return where the figures come from: each report with its machine, and what it said of itself."""
    parts = [source(one, colour=index) for index, one in enumerate(found.reports)]
    command = "".join(f"<span>{escape(word)}</span> " for word in found.command.split(" "))
    return f"{''.join(parts)}<section><h2>Command</h2><pre>{command}</pre></section>"


def source(one: ComparedReport, *, colour: int) -> str:
    """Return one report's facts."""
    pairs: Sequence[tuple[str, str]] = [
        ("Run", f"{one.run.name}, {formatting.model_name(one.run.student)} from {one.run.teacher}"),
        ("Measured", one.created[:16].replace("T", " ")),
        ("Evaluated on", formatting.evaluated_on(one.evaluation)),
        ("Machine", one.machine),
        ("System", one.system),
        ("Runtimes", ", ".join(f"{name} {version}" for name, version in one.versions.items())),
        ("Report", one.file),
    ]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value)
    notes = "".join(f"<li>{words(note)}</li>" for note in one.notes)
    dot = f'<span class="dot" style="background: {svg.colour(colour)}"></span>'
    said = f'<ul class="notes">{notes}</ul>' if notes else ""
    return f'<section><h2>{dot}{escape(one.name)}</h2><dl class="facts">{facts}</dl>{said}</section>'

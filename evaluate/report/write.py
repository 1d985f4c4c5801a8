"""Write what a bench found: report.json for programs, report.md for a pull request, report.html for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prgkit.evaluate.report import class_section, formatting, regression, sections, soak_section
from prgkit.evaluate.report.examples import Picture
from prgkit.evaluate.report.formatting import NONE
from prgkit.evaluate.report.html_report import page
from prgkit.evaluate.report.schema import Report, Row, Samples, measured_latency
from prgkit.storage.atomic import write_json, write_text


def write_report(folder: Path, report: Report, *, samples: Samples, pictures: Sequence[Picture]) -> None:
    """Write report.json, report.md, report.html and samples.json into ``folder``; each appears whole or not at all."""
    # One line a row: ten thousand samples on a line each would be unreadable too, and three times the size.
    write_text(folder / "samples.json", samples.model_dump_json() + "\n")
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", page(report, samples=samples, pictures=pictures))
    write_json(folder / "report.json", report.model_dump(mode="json"))


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    machine = [f"- {name}: {cell(value)}" for name, value in formatting.machine_facts(report)]
    labelled = report.evaluation.labelled
    comparison = [(who, top1, top5, same) for who, top1, top5, same in formatting.teacher_and_student(report)]
    parts = [
        f"# {cell(formatting.headline(report))}",
        f"Run `{plain(report.run.name)}`, {cell(formatting.evaluated_on(report.evaluation))}. "
        f"Made by prgkit {cell(report.prgkit)}, {cell(report.created)}.",
        grid(HEADER, [markdown_row(row) for row in report.rows]),
        *throughput(report),
        *by_scope(report),
        *threads(report),
        *at_a_rate(report),
        *soaked(report),
        *([grid(["", "top-1", "top-5", "agrees with the teacher"], comparison)] if labelled else []),
        *by_class(report),
        *audit(report),
        *against(report),
        *(["## Notes", "\n".join(f"- {cell(note)}" for note in report.notes)] if report.notes else []),
        "## Machine",
        "\n".join(machine),
        "## Commands",
        "\n".join(["```", *formatting.commands(report), "```"]),
        formatting.HOW,
    ]
    return "\n\n".join(parts) + "\n"


HEADER = [
    "artifact",
    "size MiB",
    "p50 ms",
    "95 %",
    "p90",
    "p99",
    "images/s",
    "top-1",
    "= teacher",
    "= FP32",
    "load ms",
    "memory MiB",
]


def markdown_row(row: Row) -> list[str]:
    """Return the cells of an artifact's line."""
    start = [formatting.row_name(row), formatting.mib(row.size_mib)]
    if row.status != "measured":
        return [*start, formatting.why_missing(row)] + [""] * (len(HEADER) - 3)
    latency, best = measured_latency(row), formatting.best_throughput(row)
    return [
        *start,
        formatting.ms(latency.p50_ms),
        formatting.interval_ms(latency.p50_interval_ms),
        formatting.ms(latency.p90_ms),
        formatting.ms(latency.p99_ms),
        formatting.rate(best.images_per_s) if best else NONE,
        formatting.percent(row.top1),
        formatting.percent(row.agreement_teacher),
        formatting.percent(row.agreement_fp32),
        formatting.ms(row.load_ms),
        formatting.mib(row.peak_memory_mib),
    ]


def throughput(report: Report) -> list[str]:
    """Return the table of the batch sweep, if there was one."""
    sizes = formatting.batches(report)
    if not sizes:
        return []
    lines = []
    for row in formatting.measured(report):
        rates = {entry.batch: entry.images_per_s for entry in row.throughput}
        lines.append([formatting.row_name(row), *(formatting.rate(rates.get(size)) for size in sizes)])
    return [grid(["images/s", *(f"batch {size}" for size in sizes)], lines)]


def by_scope(report: Report) -> list[str]:
    """Return the table of the scopes, where they were measured."""
    lines = sections.scope_lines(report)
    return [grid(sections.scope_header(report), lines), sections.scope_about(report)] if lines else []


def at_a_rate(report: Report) -> list[str]:
    """Return the table of the frames that came at a rate, where any did."""
    lines = sections.paced_lines(report)
    return [grid(sections.PACED_HEADER, lines), sections.paced_about(report)] if lines else []


def soaked(report: Report) -> list[str]:
    """Return the first and the last minute of the soak, if there was one."""
    if not report.soak:
        return []
    lines = soak_section.soak_lines(report)
    return [*([grid(soak_section.HEADER, lines)] if lines else []), cell(soak_section.soak_about(report))]


def threads(report: Report) -> list[str]:
    """Return the table of the thread sweep, if there was one."""
    lines = sections.sweep_lines(report)
    return [grid(sections.sweep_header(report), lines), sections.SWEEP_HOW] if lines else []


def by_class(report: Report) -> list[str]:
    """Return the classes that the student is worst and best at, and its most frequent mistakes."""
    found = report.per_class
    if not found or not class_section.worst_first(found):
        return []
    worst, best = class_section.shown(found)
    between = [["…", *[""] * (len(class_section.class_header(found)) - 1)]] if best else []
    lines = (
        [class_section.class_line(found, one) for one in worst]
        + between
        + [class_section.class_line(found, one) for one in best]
    )
    pairs = class_section.pair_lines(found)
    return [
        "## Class by class",
        cell(class_section.class_about(found)),
        grid(class_section.class_header(found), lines),
        *([grid(class_section.pair_header(found), pairs, names=2)] if pairs else []),
    ]


def audit(report: Report) -> list[str]:
    """Return the table of what was ticked, if anything was."""
    lines = formatting.audit_lines(report)
    if not lines:
        return []
    return ["## Audit", cell(formatting.audit_about(report)), grid(["", "right", "95 %", "images"], lines)]


def against(report: Report) -> list[str]:
    """Return what the report is against its baseline, if it was given one."""
    found = report.baseline
    if not found:
        return []
    said = [f"- {cell(note)}" for note in regression.notes(found)]
    lines = regression.cells(found)
    return [
        "## Against the baseline",
        cell(regression.about(found)),
        grid(regression.HEADER, lines, names=2),
        *(["\n".join(said)] if said else []),
    ]


def grid(header: Sequence[str], lines: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """Return a Markdown table: the first columns, of names, to the left, figures to the right."""
    rule = [*["---"] * names, *["--:"] * (len(header) - names)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in [header, rule, *lines])


def cell(value: str) -> str:
    """Return text that stays text in Markdown."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def plain(value: str) -> str:
    """Return text for between backticks."""
    return str(value).replace("`", "'").replace("\n", " ")

"""report.html: one self-contained page that an engineer can send on, drawn without a script and without the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prgkit.evaluate.report import formatting, regression, sections
from prgkit.evaluate.report.class_section import classes_section
from prgkit.evaluate.report.examples import Picture, gallery
from prgkit.evaluate.report.formatting import NONE
from prgkit.evaluate.report.html import cell, document, grid, heading, section, words
from prgkit.evaluate.report.plots import figures, svg
from prgkit.evaluate.report.schema import Report, Row, RowSamples, Samples, measured_latency
from prgkit.evaluate.report.soak_section import soak_section
from prgkit.training.statistics import summarise
from prgkit.training.statistics_schema import Statistics

MOST_PICTURES = 48


def page(report: Report, *, samples: Samples, pictures: Sequence[Picture]) -> str:
    """Return the whole page; everything that came from outside is escaped."""
    title = formatting.headline(report)
    parts = [
        head(report, title),
        "<main>",
        tiles(report),
        against(report),
        artifacts(report),
        charts(report, samples),
        beside(comparison(report), throughput(report)),
        circumstantial(report),
        soak_section(report, samples),
        classes_section(report),
        audit(report),
        trust(report),
        training(report),
        *(section(title, about, body) for title, about, body in gallery(pictures[:MOST_PICTURES])),
        circumstances(report),
        "</main>",
        f"<footer><p>{escape(formatting.HOW)}</p></footer>",
    ]
    return document(title, parts)


def head(report: Report, title: str) -> str:
    """Return the headline with the facts that qualify it."""
    run, row = report.run, formatting.lead_row(report.rows, report.int8)
    eyebrow = f"prgkit bench · run {run.name} · {report.created[:16].replace('T', ' ')}"
    figures = ""
    if row is not None:
        latency = measured_latency(row)
        figures = (
            f" The latency is the median of {latency.samples:,} runs of <b>{escape(formatting.row_name(row))}</b> "
            f"at batch 1, 95 % interval {formatting.interval_ms(latency.p50_interval_ms)} ms"
            f"{'; <b>it was unstable</b>, see the notes.' if formatting.unstable(latency) else '.'}"
        )
    labels = "with a few labels" if run.uses_labels else "without labels"
    lead = (
        f"Distilled from <b>{escape(run.teacher)}</b> {labels} (objective {escape(str(run.objective))}, "
        f"{run.classes} classes, {formatting.counted(run.epochs, 'epoch')}) and measured on "
        f"{escape(formatting.evaluated_on(report.evaluation))}.{figures}"
    )
    return f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{words(title)}</h1><p class="lead">{lead}</p></header>'


def tiles(report: Report) -> str:
    """Return the figures that answer most questions."""
    row = formatting.lead_row(report.rows, report.int8)
    if row is None:
        return ""
    latency, best, teacher = measured_latency(row), formatting.best_throughput(row), report.teacher.top1
    shown = []
    if row.top1 is not None:
        more = f"teacher {formatting.percent(teacher)}" if teacher is not None else ""
        shown.append(("Top-1 accuracy", formatting.percent(row.top1), more))
    if row.agreement_teacher is not None:
        bounds = formatting.interval(row.agreement_teacher_interval)
        shown.append(("Same answer as teacher", formatting.percent(row.agreement_teacher), f"{bounds} (95 %)"))
    tail = "p90 " + formatting.ms(latency.p90_ms) + (f", p99 {formatting.ms(latency.p99_ms)}" if latency.p99_ms else "")
    shown.append(("Latency, median", f"{formatting.ms(latency.p50_ms)} ms", tail))
    if best:
        shown.append(("Throughput", f"{formatting.rate(best.images_per_s)} img/s", f"at batch {best.batch}"))
    if row.size_mib is not None:
        shown.append(("Model file", f"{formatting.mib(row.size_mib)} MiB", row.artifact))
    return f'<div class="tiles">{"".join(tile(*one) for one in shown)}</div>'


def tile(name: str, value: str, more: str) -> str:
    """Return one figure with its name and what qualifies it."""
    number, _, unit = value.partition(" ")
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(number)} <small>{escape(unit)}</small></div>'
        f'<div class="more">{words(more)}</div></div>'
    )


COLUMNS = [
    ("Size", "MiB"),
    ("Latency p50", "ms"),
    ("p90", "ms"),
    ("p99", "ms"),
    ("Best rate", "img/s"),
    ("Top-1", ""),
    ("Same as teacher", ""),
    ("Same as FP32", ""),
    ("Load", "ms"),
    ("Peak memory", "MiB"),
]


def artifacts(report: Report) -> str:
    """Return the table of rows; on a narrow screen each row becomes a block."""
    labelled = report.evaluation.labelled
    columns = [column for column in COLUMNS if labelled or column[0] != "Top-1"]
    header = heading("Artifact") + "".join(heading(name, unit) for name, unit in columns)
    ranks = {id(row): index for index, row in enumerate(formatting.measured(report))}
    lead = formatting.lead_row(report.rows, report.int8)
    lines = [artifact_line(row, columns, rank=ranks.get(id(row)), lead=row is lead) for row in report.rows]
    about = (
        "The same file gives the accuracy and the latency of its row. Small figures are 95 % intervals; "
        "the marked row is the one that the headline speaks of."
    )
    return section("Artifacts", about, grid(header, lines, kind="stacked"))


def artifact_line(row: Row, columns: Sequence[tuple[str, str]], *, rank: int | None, lead: bool) -> str:
    """Return one row of the table, or its reason where it was not measured."""
    ink = "" if rank is None else f' style="background: {svg.colour(rank)}"'
    facts = [row.backend, row.device, formatting.threads_of(row), row.precision]
    under = " · ".join(str(fact) for fact in facts if fact)
    dot = f'<span class="dot"{ink}></span>'
    noisy = rank is not None and formatting.unstable(measured_latency(row))
    said = ' <span class="chip warn">unstable</span>' if noisy else ""
    name = f'<th scope="row">{dot}{escape(formatting.row_name(row))}{said}<small>{escape(under)}</small></th>'
    if rank is None:
        failed = row.status == "failed"
        chip = f'<span class="chip{" bad" if failed else ""}">{"failed" if failed else "never executed here"}</span>'
        size = f'<td data-name="Size">{formatting.mib(row.size_mib)}</td>'
        said = f"{chip} {escape(row.reason or '')}"
        return f'<tr>{name}{size}<td class="reason" colspan="{len(columns) - 1}">{said}</td></tr>'
    latency, best = measured_latency(row), formatting.best_throughput(row)
    cells = {
        "Size": (formatting.mib(row.size_mib), ""),
        "Latency p50": (formatting.ms(latency.p50_ms), formatting.interval_ms(latency.p50_interval_ms)),
        "p90": (formatting.ms(latency.p90_ms), ""),
        "p99": (formatting.ms(latency.p99_ms), ""),
        "Best rate": (formatting.rate(best.images_per_s), f"batch {best.batch}") if best else (NONE, ""),
        "Top-1": (formatting.percent(row.top1), formatting.interval(row.top1_interval)),
        "Same as teacher": (
            formatting.percent(row.agreement_teacher),
            formatting.interval(row.agreement_teacher_interval),
        ),
        "Same as FP32": (formatting.percent(row.agreement_fp32), ""),
        "Load": (formatting.ms(row.load_ms), ""),
        "Peak memory": (formatting.mib(row.peak_memory_mib), ""),
    }
    data = "".join(cell(f"{column} {unit}".strip(), *cells[column]) for column, unit in columns)
    return f"<tr{' class=lead-row' if lead else ''}>{name}{data}</tr>"


def charts(report: Report, samples: Samples) -> str:
    """Return the plot of accuracy against latency and the distributions of latency."""
    rows = formatting.measured(report)
    if not rows:
        return ""
    labelled = all(row.top1 is not None for row in rows)
    name = "Top-1 accuracy, %" if labelled else "Same answer as the teacher, %"
    points = [
        figures.Point(
            label=formatting.row_name(row),
            latency_ms=measured_latency(row).p50_ms,
            latency_interval_ms=measured_latency(row).p50_interval_ms,
            score=score,
            score_interval=interval,
            colour=index,
        )
        for index, row in enumerate(rows)
        for score, interval in [formatting.score(row, labelled=labelled)]
        if score is not None
    ]
    teacher = report.teacher.top1 if labelled else None
    drawn = []
    if points:
        picture = figures.accuracy_latency(
            points, score_name=name, reference=("teacher", teacher) if teacher is not None else None
        )
        drawn.append(
            section("Accuracy against latency" if labelled else "Fidelity against latency", figures.FRONT, picture)
        )
    series = latencies_ms(rows, samples.rows)
    if series:
        drawn.append(section("Latency of every run", "", figures.latency_distribution(series)))
    return f'<div class="pair">{"".join(drawn)}</div>'


def latencies_ms(rows: Sequence[Row], samples: Sequence[RowSamples]) -> dict[str, list[float]]:
    """Return each measured row's samples in ms, in the order of the rows, so that the colours match."""
    kept = {formatting.row_key(one): one.rounds_ns for one in samples}
    series = {}
    for row in rows:
        values = [value / 1e6 for round_ in kept.get(formatting.row_key(row), []) for value in round_]
        if values:
            series[formatting.row_name(row)] = values
    return series


def throughput(report: Report) -> str:
    """Return the table of the batch sweep."""
    sizes, rows = formatting.batches(report), formatting.measured(report)
    if not sizes:
        return ""
    lines = []
    for rank, row in enumerate(rows):
        rates = {entry.batch: entry.images_per_s for entry in row.throughput}
        best = max(rates.values(), default=None)
        figures = [formatting.rate(rates.get(size)) for size in sizes]
        data = "".join(
            f'<td data-name="batch {size}">{f"<b>{figure}</b>" if rates.get(size) == best else figure}</td>'
            for size, figure in zip(sizes, figures, strict=True)
        )
        dot = f'<span class="dot" style="background: {svg.colour(rank)}"></span>'
        lines.append(f'<tr><th scope="row">{dot}{escape(formatting.row_name(row))}</th>{data}</tr>')
    header = heading("Artifact") + "".join(heading(f"batch {size}") for size in sizes)
    kind = "stacked wrapped" if len(sizes) > 3 else "wrapped"
    return section("Throughput", "Images per second, in runs of their own.", grid(header, lines, kind=kind))


def circumstantial(report: Report) -> str:
    """Return the latencies under other circumstances, two beside each other."""
    found = [part for part in (by_scope(report), threads(report), at_a_rate(report)) if part]
    return "".join([beside(*found[:2]), *found[2:]])


def beside(*sections: str) -> str:
    """Return two sections beside each other on a wide screen; one that is empty leaves its place to the other."""
    found = [one for one in sections if one]
    return f'<div class="pair">{"".join(found)}</div>' if len(found) > 1 else "".join(found)


def by_scope(report: Report) -> str:
    """Return the table of the scopes, where they were measured."""
    lines = sections.scope_lines(report)
    if not lines:
        return ""
    table = figures_table("Artifact", sections.scope_header(report)[1:], lines, unit="ms")
    return section("What preprocessing and decoding add", sections.scope_about(report), table)


def threads(report: Report) -> str:
    """Return the table of the thread sweep, if there was one."""
    lines = sections.sweep_lines(report)
    if not lines:
        return ""
    return section(
        "Threads",
        sections.SWEEP_HOW,
        figures_table("Artifact", sections.sweep_header(report)[1:], lines, unit="ms"),
    )


def at_a_rate(report: Report) -> str:
    """Return the table of the frames that came at a rate, where any did."""
    lines = sections.paced_lines(report)
    if not lines:
        return ""
    return section(
        "At a camera's rate",
        sections.paced_about(report),
        figures_table("Artifact", sections.PACED_HEADER[1:], lines),
    )


def comparison(report: Report) -> str:
    """Return the teacher beside the student; without labels the artifacts' table has said it all."""
    if not report.evaluation.labelled:
        return ""
    more = ", and it or its teacher from a few labels" if report.run.uses_labels else " alone"
    about = f"On {formatting.evaluated_on(report.evaluation)}. The student learned from the teacher's answers{more}."
    table = figures_table("Model", ("Top-1", "Top-5", "Same answer"), formatting.teacher_and_student(report))
    return section("Teacher and student", about, table)


def audit(report: Report) -> str:
    """Return how right teacher and student are on the images that somebody ticked, where somebody did."""
    lines = formatting.audit_lines(report)
    if not lines:
        return ""
    table = figures_table("Model", ("Right", "95 % interval", "Images"), lines)
    return section("Audit", formatting.audit_about(report), table)


def figures_table(first: str, names: Sequence[str], lines: Sequence[Sequence[str]], *, unit: str = "") -> str:
    """Return a table of figures with a name a row; on a narrow screen a row of many or long figures is a block."""
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(cell(column, figure, "") for column, figure in zip(names, figures, strict=True))
        + "</tr>"
        for name, *figures in lines
    ]
    wide = len(names) > 3 or max(len("".join(figures)) for _, *figures in lines) > 26
    header = heading(first) + "".join(heading(name, unit) for name in names)
    return grid(header, rows, kind="stacked wrapped" if wide else "wrapped")


def against(report: Report) -> str:
    """Return the report held against its baseline, where it was given one: what became worse, and what did not."""
    found = report.baseline
    if not found:
        return ""
    kinds = {"worse": " bad", "better": " good"}
    lines = [
        f'<tr><th scope="row">{escape(name)}<small>{escape(what)}</small></th>'
        f"{cell('Before', before, '')}{cell('Now', now, '')}{cell('Change', change, '')}"
        f'<td data-name="Verdict"><span class="chip{kinds.get(verdict, "")}">{escape(verdict)}</span></td></tr>'
        for name, what, before, now, change, verdict in regression.cells(found)
    ]
    header = "".join(map(heading, ("Artifact", "Before", "Now", "Change", "")))
    notes = "".join(f"<li>{escape(note)}</li>" for note in regression.notes(found))
    said = f'<ul class="notes">{notes}</ul>' if notes else ""
    table = grid(header, lines, kind="stacked wrapped")
    return section("Against the baseline", f"{regression.about(found)} {regression.HOW}", table + said)


def trust(report: Report) -> str:
    """Return how far the teacher's pseudo-labels could be trusted before training, where the run is at hand."""
    found = report.pseudo_labels
    if not found:
        return ""
    drawn = [
        figures.histogram(
            found["confidence"]["histogram"], name="probability of the teacher's answer", title="Confidence"
        ),
        figures.class_sizes(found["balance"]["counts"], uniform=found["balance"]["uniform"]),
    ]
    lines = summarise(Statistics.model_validate(found))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(line)}</dd>" for name, line in lines)
    about = f"Of the {found['images']:,} unlabelled images, known before the first epoch. No label is involved."
    plotted = f'<div class="plots">{"".join(f"<div>{one}</div>" for one in drawn)}</div>'
    return section("The teacher's answers", about, f'{plotted}<dl class="facts">{facts}</dl>')


def training(report: Report) -> str:
    """Return the training curves, where the run is at hand and had more than one epoch."""
    drawn = figures.training_curves(report.training)
    if not drawn:
        return ""
    about = "Agreement is with the teacher, on held-out images; no label is involved."
    return section("Training", about, f'<div class="plots">{"".join(f"<div>{one}</div>" for one in drawn)}</div>')


def circumstances(report: Report) -> str:
    """Return the machine, the notes and every command."""
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in formatting.machine_facts(report)
    )
    notes = "".join(f"<li>{words(note)}</li>" for note in report.notes)
    said = f'<h2>Notes</h2><ul class="notes">{notes}</ul><h3>Commands</h3>' if notes else "<h2>Commands</h2>"
    # Each word whole: a line may end between two options, not within one.
    lines = [
        " ".join(f"<span>{escape(word)}</span>" for word in line.split(" ")) for line in formatting.commands(report)
    ]
    commands = "\n".join(lines)
    return (
        f'<div class="pair"><section><h2>Machine</h2><dl class="facts">{facts}</dl></section>'
        f"<section>{said}<pre>{commands}</pre></section></div>"
    )

"""The report of a bench from top to bottom: its headline, its first figures, and the order of its sections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from prgkit.evaluate.report import formatting, latency_sections, quality_sections, regression
from prgkit.evaluate.report.examples import Picture, galleries
from prgkit.evaluate.report.formatting import NONE, counted, evaluated_on, interval, mib, model_name, ms, percent
from prgkit.evaluate.report.html import page
from prgkit.evaluate.report.latency_sections import soak
from prgkit.evaluate.report.markdown import markdown
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.samples import Samples
from prgkit.evaluate.report.schema import Report, Row, measured_latency
from prgkit.evaluate.report.sections import Cell, Chip, Column, Document, Section, TableRow, Tile, lines, table_row
from prgkit.evaluate.report.terminal import Table, table
from prgkit.metrics import wilson
from prgkit.storage.atomic import write_json, write_text

ABOUT = (
    "Latency is the wall-clock time of one call at batch 1, from pixels to logits in host memory (stage: io), timed in "
    "a process of its own after warming up. Artifacts take turns over several rounds; every run counts, none is "
    "trimmed. The interval of the median is a 95 % one over rounds, by Student's t; p99 needs 1,000 runs. Intervals of "
    "shares are Wilson's, 95 %. Load time excludes the import of the runtime; peak memory is how far a process grows "
    "from before that import to the end of its first batch-1 runs. All samples are in samples.json."
)


def write_report(folder: Path, report: Report, *, samples: Samples, pictures: Sequence[Picture]) -> None:
    """Write report.json, report.md, report.html and samples.json into ``folder``; each appears whole or not at all."""
    document = bench_document(report, samples, pictures)
    # One line a row: ten thousand samples on a line each would be unreadable too, and three times the size.
    write_text(folder / "samples.json", samples.model_dump_json() + "\n")
    write_text(folder / "report.md", markdown(document))
    write_text(folder / "report.html", page(document))
    write_json(folder / "report.json", report.model_dump(mode="json"))


def report_table(report: Report) -> Table:
    """Return the artifacts for the terminal, with what else was measured in sentences."""
    sections = (
        latency_sections.thread_sweep(report),
        latency_sections.fixed_rate(report),
        soak(report),
        quality_sections.audit(report),
    )
    sentences = chain.from_iterable(section.summary for section in sections if section is not None)
    return table(artifacts(report), title=headline(report), notes=[*sentences, *report.notes])


def bench_document(report: Report, samples: Samples, pictures: Sequence[Picture]) -> Document:
    """Return the whole report, plots and example images included."""
    named = [(formatting.row_name(row), row, rank) for rank, row in enumerate(formatting.measured(report))]
    parts = (latency_sections.latency_stages, latency_sections.thread_sweep, latency_sections.fixed_rate)
    circumstances = [section for part in parts if (section := part(report)) is not None]
    return Document(
        title=headline(report),
        origin=f"prgkit {report.prgkit} bench · run {report.run.name} · {report.created[:16].replace('T', ' ')}",
        lead=lead(report),
        tiles=tiles(report),
        sections=lines(
            [regression.against_baseline(report)],
            [artifacts(report)],
            [
                latency_sections.accuracy_against_latency(named, teacher_top1=report.teacher.top1),
                latency_sections.every_run(report, samples),
            ],
            [quality_sections.teacher_and_student(report), latency_sections.throughput(report)],
            circumstances[:2],
            circumstances[2:],
            [soak(report, samples)],
            [quality_sections.class_by_class(report), quality_sections.mistakes(report)],
            [quality_sections.audit(report)],
            [quality_sections.pseudo_labels(report)],
            [quality_sections.corrections(report)],
            [quality_sections.training(report)],
            *([gallery] for gallery in galleries(pictures)),
            [
                Section("Notes", notes=tuple(report.notes)) if report.notes else None,
                Section("Machine", facts=tuple(machine_facts(report))),
            ],
            [Section("Commands", commands=(*report.made_by, report.command))],
        ),
        about=ABOUT,
    )


def headline(report: Report) -> str:
    """Return the one sentence of the report: how much of the teacher the student keeps, and how fast."""
    row, student = formatting.lead_row(report.rows, report.int8), model_name(report.run.student)
    if row is None:
        return f"{student}: nothing could be measured on this machine"
    speed = f"{ms(measured_latency(row).p50_ms)} ms an image on {place(report, row)}"
    if doubt := teacher_doubt(report):
        return (
            f"{student} at {speed}: its teacher's answers look like chance, so keeping to them means nothing ({doubt})"
        )
    return f"{student} {quality_kept(report, row)} at {speed}"


def teacher_doubt(report: Report) -> str:
    """Return why the teacher looks no better than chance, or nothing; where there are labels, they decide."""
    images, top1 = report.evaluation.images, report.teacher.top1
    if top1 is None:
        return next(iter(report.pseudo_labels.doubts if report.pseudo_labels else ()), "")
    chance = 100 / report.run.classes
    if wilson(round(images * top1 / 100), images)[0] > chance:
        return ""
    return f"right on {percent(top1)} of {counted(images, 'labelled image')}, where chance gives {percent(chance)}"


def quality_kept(report: Report, row: Row) -> str:
    """Return what the student keeps of its teacher, as a verb and its object."""
    corrected = report.pseudo_labels is not None and report.pseudo_labels.correction is not None
    teacher, top1 = report.teacher.top1_uniform_prompts if corrected else report.teacher.top1, row.top1
    if teacher and top1 is not None:
        ratio = 100 * top1 / teacher
        if ratio > 100:
            verb = "beats" if row.lead_bound is not None and row.lead_bound > 0 else "matches"
            figures = f"{percent(top1)} against its teacher's {percent(teacher)}"
            figures += f", {percent(report.teacher.top1)} corrected" if corrected else ""
            return f"{verb} its teacher ({figures}{'' if report.run.uses_labels else ', without a label'})"
        return f"keeps {percent(ratio)} of its teacher's accuracy"
    if row.agreement_teacher is not None:
        return f"gives its teacher's answer on {percent(row.agreement_teacher)} of the images"
    return "runs"


def place(report: Report, row: Row) -> str:
    """Return what a row ran on: ``2 threads of AMD EPYC``, or the GPU's name; and what ran it, as row_name does."""
    machine, threads, runtime = report.machine, formatting.threads_of(row), formatting.RUNTIMES.get(row.backend)
    if row.device != "cpu" and machine.gpus:
        processor = machine.gpus[0].name
    else:
        processor = f"{threads} of {machine.cpu}" if threads else machine.cpu
    return processor + (f", with {runtime}" if runtime else "")


def lead(report: Report) -> tuple[str, ...]:
    """Return the facts that qualify the headline; every second part is bold."""
    run, row = report.run, formatting.lead_row(report.rows, report.int8)
    labels = "with a few labels" if run.uses_labels else "without labels"
    began = f"; begun with {run.origin}" if run.origin else ""
    facts = (
        f" {labels} (objective {run.objective}, {run.classes} classes, {counted(run.epochs, 'epoch')}{began}) "
        f"and measured on {evaluated_on(report.evaluation)}."
    )
    if row is None:
        return "Distilled from ", run.teacher, facts
    latency = measured_latency(row)
    runs = f" The latency is the median of {latency.samples:,} runs of "
    bounds = f" at batch 1, 95 % interval {formatting.interval_ms(latency.p50_interval_ms)} ms"
    start = ("Distilled from ", run.teacher, facts + runs, formatting.row_name(row))
    if formatting.unstable(latency):
        return *start, f"{bounds}; ", "it was unstable", ", see the notes."
    return *start, f"{bounds}."


def tiles(report: Report) -> tuple[Tile, ...]:
    """Return the figures that answer most questions."""
    row = formatting.lead_row(report.rows, report.int8)
    if row is None:
        return ()
    latency, best, teacher = measured_latency(row), formatting.best_throughput(row), report.teacher.top1
    tail = f"p90 {ms(latency.p90_ms)}" + (f", p99 {ms(latency.p99_ms)}" if latency.p99_ms else "")
    bounds = f"{interval(row.agreement_teacher_interval)} (95 %)"
    shown = [
        ("Top-1 accuracy", row.top1, percent(row.top1), f"teacher {percent(teacher)}" if teacher is not None else ""),
        ("Same answer as teacher", row.agreement_teacher, percent(row.agreement_teacher), bounds),
        ("Latency, median", latency, f"{ms(latency.p50_ms)} ms", tail),
        *(
            [("Throughput", best, f"{formatting.rate(best.images_per_s)} img/s", f"at batch {best.batch}")]
            if best
            else ()
        ),
        ("Model file", row.size_mib, f"{mib(row.size_mib)} MiB", row.artifact),
    ]
    return tuple(
        Tile(name, figure.partition(" ")[0], figure.partition(" ")[2], more)
        for name, value, figure, more in shown
        if value is not None
    )


def artifacts(report: Report) -> Section:
    """Return the table of all rows: what each takes, how right and how faithful it is."""
    labelled = report.evaluation.labelled
    columns = (
        Column("Artifact", short="artifact", left=True),
        Column("Size", "MiB", short="MiB"),
        Column("Latency p50", "ms", short="p50 ms", small="95 %"),
        Column("p90", "ms", short="p90", terminal=False),
        Column("p99", "ms", short="p99"),
        Column("Best rate", "img/s", short="img/s"),
        *([Column("Top-1", short="top-1")] if labelled else []),
        Column("Same as teacher", short="= teacher"),
        Column("Same as FP32", short="= FP32"),
        Column("Load", "ms", short="load ms", terminal=False),
        Column("Peak memory", "MiB", short="memory MiB", terminal=False),
    )
    ranks = {id(row): rank for rank, row in enumerate(formatting.measured(report))}
    lead = formatting.lead_row(report.rows, report.int8)
    return Section(
        "Artifacts",
        "The same file gives the accuracy and the latency of its row. Intervals are 95 % ones"
        + (f"; the headline speaks of {formatting.row_name(lead)}." if lead else "."),
        columns,
        tuple(
            measured_artifact(row, ranks[id(row)], labelled=labelled, lead=row is lead)
            if id(row) in ranks
            else missing_artifact(row, len(columns))
            for row in report.rows
        ),
    )


def measured_artifact(row: Row, rank: int, *, labelled: bool, lead: bool) -> TableRow:
    """Return the figures of an artifact that was measured."""
    latency, best = measured_latency(row), formatting.best_throughput(row)
    unstable = Chip("unstable", "warn") if formatting.unstable(latency) else None
    return table_row(
        Cell(formatting.row_name(row), circumstances_of(row), unstable, svg.colour(rank)),
        mib(row.size_mib),
        Cell(ms(latency.p50_ms), formatting.interval_ms(latency.p50_interval_ms)),
        ms(latency.p90_ms),
        ms(latency.p99_ms),
        Cell(formatting.rate(best.images_per_s), f"batch {best.batch}") if best else NONE,
        *([Cell(percent(row.top1), interval(row.top1_interval))] if labelled else []),
        Cell(percent(row.agreement_teacher), interval(row.agreement_teacher_interval)),
        percent(row.agreement_fp32),
        ms(row.load_ms),
        mib(row.peak_memory_mib),
        lead=lead,
    )


def missing_artifact(row: Row, columns: int) -> TableRow:
    """Return an artifact without figures, and why it has none."""
    name = Cell(formatting.row_name(row), circumstances_of(row), dot="var(--rule)")
    reason = Cell(row.reason or "", chip=formatting.missing_chip(row), span=columns - 2)
    return table_row(name, mib(row.size_mib), reason, muted=True)


def circumstances_of(row: Row) -> str:
    """Return what ran an artifact, and how."""
    return " · ".join(filter(None, (row.backend, row.device, formatting.threads_of(row), row.precision)))


def machine_facts(report: Report) -> list[tuple[str, str]]:
    """Return the machine as pairs of a name and a value, leaving out what it did not say."""
    machine = report.machine
    clocks, temperatures = machine.clocks_mhz, machine.temperatures_c
    if machine.clocks_locked is None:
        rule = "not readable here"
    else:
        locked = "locked" if machine.clocks_locked else "unlocked"
        rule = f"{locked}, {interval(machine.clock_range_mhz, digits=0)} MHz"
    pairs = [
        ("Processor", f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores usable"),
        *[("GPU", f"{gpu.name}, driver {gpu.driver}") for gpu in machine.gpus],
        ("Memory", f"{machine.memory_gib} GiB" if machine.memory_gib else ""),
        ("System", f"{machine.os}, {machine.architecture}{', virtual machine' if machine.virtual else ''}"),
        ("Clocks", rule + (f"; {min(clocks)}–{max(clocks)} MHz seen" if clocks else "")),
        ("Governor", machine.governor or ""),
        ("Power mode", machine.power_mode or ""),
        ("Temperature", f"{min(temperatures)}–{max(temperatures)} °C" if temperatures else ""),
        ("Busy before", f"{machine.busy_cores} cores" if machine.busy_cores is not None else ""),
        ("Load average before", " ".join(map(str, machine.load_average or ()))),
        ("Python", machine.python),
        ("Runtimes", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
    ]
    return [(name, value) for name, value in pairs if value]

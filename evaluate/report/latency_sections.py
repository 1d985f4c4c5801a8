"""The report's sections on speed: latency with accuracy, throughput, stages, threads, and frames at a fixed rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import NONE, P99_SAMPLES, counted, ms, row_name
from prgkit.evaluate.report.plots import charts, figures, svg
from prgkit.evaluate.report.samples import Samples, SoakWindow
from prgkit.evaluate.report.schema import (
    STAGES,
    Report,
    Row,
    Soak,
    SoakResult,
    SoakSpan,
    Stage,
    ThreadSweepRow,
    measured_latency,
)
from prgkit.evaluate.report.sections import Cell, Column, Section, TableRow, table_row

STAGE_NAMES: dict[Stage, str] = {"compute": "compute", "io": "io", "pipeline": "pipeline", "end_to_end": "end-to-end"}


MINUTE_S = 60.0
SLOWER, UNSTABLE = 1.05, 1.1
Shown = Literal["p50_ms", "p90_ms", "p99_ms", "clock_mhz", "temperature_c", "power_w"]

SOAK_COLUMNS = (
    Column("", left=True),
    *(Column(name) for name in ("p50 ms", "p99 ms", "slowest ms", "clock MHz", "°C", "W")),
)


def accuracy_against_latency(
    named: Sequence[tuple[str, Row, int]],
    *,
    teacher_top1: float | None = None,
    legend: tuple[tuple[str, str], ...] = (),
) -> Section | None:
    """Return the plot of measured rows, each with its name and the number of its colour; None without a score."""
    labelled = all(row.top1 is not None for _, row, _ in named)
    points = [
        figures.Point(name, latency.p50_ms, latency.p50_interval_ms, score, interval, colour)
        for name, row, colour in named
        for latency, (score, interval) in [(measured_latency(row), formatting.score(row, labelled=labelled))]
        if score is not None
    ]
    if not points:
        return None
    plot = figures.accuracy_latency(
        points,
        score_name="Top-1 accuracy, %" if labelled else "Same answer as the teacher, %",
        reference=("teacher", teacher_top1) if labelled and teacher_top1 is not None else None,
    )
    title = f"{'Accuracy' if labelled else 'Fidelity'} against latency"
    return Section(title, figures.FRONT, plots=(plot,), legend=legend, page_only=True)


def every_run(report: Report, samples: Samples) -> Section | None:
    """Return the distribution of each measured row's latency, where there are samples."""
    series = latencies_ms(formatting.measured(report), samples)
    if not series:
        return None
    return Section("Latency of every run", plots=(figures.latency_distribution(series),), page_only=True)


def latencies_ms(rows: Sequence[Row], samples: Samples) -> dict[str, list[float]]:
    """Return each measured row's samples in ms, in the order of the rows, so that the colours match."""
    rounds_ns = {formatting.row_key(taken): taken.rounds_ns for taken in samples.rows}
    series = {
        row_name(row): [value / 1e6 for runs_ns in rounds_ns.get(formatting.row_key(row), []) for value in runs_ns]
        for row in rows
    }
    return {name: values for name, values in series.items() if values}


def throughput(report: Report) -> Section | None:
    """Return the table of the batch sweep, if there was one."""
    sizes = sorted({entry.batch for row in formatting.measured(report) for entry in row.throughput})
    if not sizes:
        return None
    rows = []
    for rank, measured in enumerate(formatting.measured(report)):
        rates = {entry.batch: entry.images_per_s for entry in measured.throughput}
        best = max(rates.values(), default=None)
        cells = [Cell(formatting.rate(rates.get(size)), strong=size in rates and rates[size] == best) for size in sizes]
        rows.append(table_row(Cell(row_name(measured), dot=svg.colour(rank)), *cells))
    columns = Column("Artifact", short="images/s", left=True), *(Column(f"batch {size}") for size in sizes)
    return Section("Throughput", "Images per second, in runs of their own.", columns, tuple(rows))


def latency_stages(report: Report) -> Section | None:
    """Return each measured row's medians by where a latency is counted from, where they were measured."""
    rows = [measured for measured in formatting.measured(report) if measured.latency_stages]
    images = report.stage_images
    if not rows or images is None:
        return None
    stages = [stage for stage in STAGES if stage != "compute" or any(stage in row.latency_stages for row in rows)]
    sizes = list(dict.fromkeys("×".join(map(str, size)) for size in (images.smallest, images.largest)))
    compute = "compute, the GPU's own time by CUDA events; " if "compute" in stages else ""
    return Section(
        "What preprocessing and decoding add",
        f"Median latency at batch 1 by where it is counted from: {compute}io, from prepared pixels; pipeline, from "
        "a decoded picture, so with resizing and cropping; end-to-end, from the PNG file in memory, so with "
        f"decoding as well. In turns, in one process, with Pillow, on the bundle's "
        f"{images.images} golden pictures ({' to '.join(sizes)} px).",
        (
            Column("Artifact", short="p50 ms", left=True),
            *(Column(STAGE_NAMES[stage], "ms", short=STAGE_NAMES[stage]) for stage in stages),
        ),
        tuple(
            table_row(row_name(measured), *(ms(median_ms(measured, stage)) for stage in stages)) for measured in rows
        ),
    )


def median_ms(measured: Row, stage: Stage) -> float | None:
    """Return the median latency of a stage, where that was measured."""
    latency = measured.latency_stages.get(stage)
    return None if latency is None else latency.p50_ms


def thread_sweep(report: Report) -> Section | None:
    """Return each artifact's medians by the number of threads, with the gain over the least; None without a sweep."""
    sweep = report.thread_sweep
    if sweep is None:
        return None
    names = [counted(count, "thread") for count in sweep.counts]
    medians = {row_name(swept): sweep_cells(swept, sweep.counts) for swept in sweep.rows}
    return Section(
        "Threads",
        "Latency at batch 1 by the number of CPU threads, in a session of its own in which all take turns; in "
        "brackets, how many times faster than with the fewest threads.",
        (Column("Artifact", short="p50 ms", left=True), *(Column(name, "ms", short=name) for name in names)),
        tuple(table_row(artifact, *cells) for artifact, cells in medians.items()),
        summary=tuple(
            f"{artifact}, p50 ms: {', '.join(f'{name} {cell}' for name, cell in zip(names, cells, strict=True))}."
            for artifact, cells in medians.items()
        ),
    )


def sweep_cells(swept: ThreadSweepRow, counts: Sequence[int]) -> list[str]:
    """Return an artifact's median for each number of threads, with the gain over the least number."""
    base, cells = swept.latency.get(min(counts)), []
    for count in counts:
        latency = swept.latency.get(count)
        if latency is None:
            cells.append("failed")
        elif latency is base or base is None:
            cells.append(ms(latency.p50_ms))
        else:
            cells.append(f"{ms(latency.p50_ms)} ({base.p50_ms / latency.p50_ms:.2f}×)")
    return cells


def fixed_rate(report: Report) -> Section | None:
    """Return the times of frames that came at a fixed rate, where any did."""
    paced = report.fixed_rate
    if paced is None or not paced.rows:
        return None
    rows, summary = [], []
    for artifact in paced.rows:
        name, times = row_name(artifact), artifact.times
        if times is None:
            rows.append(table_row(name, "failed", *[NONE] * 4))
            summary.append(f"{name} at {paced.fps:g} frames/s: failed.")
            continue
        p50, p99, slowest, run_p50 = map(ms, (times.p50_ms, times.p99_ms, times.max_ms, times.run_p50_ms))
        late = f"{times.late:,} of {times.frames:,}"
        rows.append(table_row(name, p50, p99, slowest, run_p50, late))
        summary.append(f"{name} at {paced.fps:g} frames/s: p50 {p50} ms, slowest {slowest} ms, late {late}.")
    return Section(
        "At a camera's rate",
        f"{paced.fps:g} frames a second, each timed from when it was due, so with waiting for the one before; late "
        f"after {ms(paced.deadline_ms)} ms. Clocks drop between frames, so a run may take longer here "
        f"than in the tight loop that gives the artifacts' latency. p99 needs {P99_SAMPLES:,} frames.",
        (
            Column("Artifact", short="frames", left=True),
            *(Column(name, "ms") for name in ("p50", "p99", "slowest", "run p50")),
            Column("late"),
        ),
        tuple(rows),
        summary=tuple(summary),
    )


def soak(report: Report, samples: Samples | None = None) -> Section | None:
    """Return the soak, with charts where there are samples; None without one."""
    if report.soak is None:
        return None
    result, sentence = report.soak.result, soak_sentence(report.soak)
    return Section(
        "Soak",
        soak_about(report.soak, sentence),
        SOAK_COLUMNS,
        (soak_row("first", result, result.first), soak_row("last", result, result.last)) if result else (),
        plots=soak_plots(samples.soak.windows) if samples and result else (),
        summary=(sentence,),
    )


def span_name(result: SoakResult) -> str:
    """Return how long the compared beginning and end are: ``minute``, or ``20 s``."""
    return "minute" if result.compared_s == MINUTE_S else f"{result.compared_s:.3g} s"


def soak_row(which: str, result: SoakResult, span: SoakSpan) -> TableRow:
    """Return the first or the last minute as a line of the table."""
    shown = ((span.clock_mhz, 0), (span.temperature_c, 0), (span.power_w, 1))
    sensors = (NONE if value is None else f"{value:,.{digits}f}" for value, digits in shown)
    return table_row(f"{which} {span_name(result)}", ms(span.p50_ms), ms(span.p99_ms), ms(span.max_ms), *sensors)


def soak_sentence(soak: Soak) -> str:
    """Return how a soak went, in a sentence."""
    rate = "back to back" if soak.fps is None else f"at {soak.fps:g} frames/s"
    start = f"Soak, {row_name(soak)}, {soak.minutes:g} min {rate}: "
    failed = "" if soak.failed is None else f"failed: {soak.failed}"
    result = soak.result
    if result is None:
        return f"{start}{failed}."
    low, high = result.ratio_interval
    parts = [
        start + (f"{failed}; until then {result.verdict}" if failed else result.verdict),
        f"the last {span_name(result)} took {result.ratio:.2f} times the first ({low:.2f}–{high:.2f})",
        *changes(result),
    ]
    if result.verdict == "unstable":
        parts.append(f"medians of its windows from {ms(result.fastest_p50_ms)} to {ms(result.slowest_p50_ms)} ms")
    if result.late is not None:
        parts.append(f"{result.late:,} of {result.runs:,} frames late")
    return ", ".join(parts) + "."


def changes(result: SoakResult) -> list[str]:
    """Return what changed from first to last, in words, as far as the device shows it."""
    first, last = result.first, result.last
    parts = [f"p50 {ms(first.p50_ms)} → {ms(last.p50_ms)} ms"]
    for before, after, unit, digits in (
        (first.clock_mhz, last.clock_mhz, "MHz", 0),
        (first.temperature_c, last.temperature_c, "°C", 0),
        (first.power_w, last.power_w, "W", 1),
    ):
        if before is not None and after is not None:
            parts.append(f"{before:,.{digits}f} → {after:,.{digits}f} {unit}")
    return [*parts, *([f"the device said: {', '.join(result.throttling)}"] if result.throttling else [])]


def soak_about(soak: Soak, sentence: str) -> str:
    """Return how a soak went, and what its figures are figures of."""
    result, energy, unseen = soak.result, "", ""
    if result is not None:
        last = result.last
        shown = {"its clock": last.clock_mhz, "its temperature": last.temperature_c, "its power": last.power_w}
        if names := ", ".join(name for name, value in shown.items() if value is None):
            unseen = f" This device does not show {names}."
        if result.energy_mj is not None:
            energy = f" {result.energy_mj:.3g} mJ an image ({result.power_source})."
    return (
        f"{sentence.removeprefix('Soak, ')}{energy} It began right after the other measurements, on a "
        f"device as warm as they left it. Slower means that the whole 95 % interval lies above {SLOWER:g}, throttled "
        f"that the device shows why; unstable, that two windows of {soak.window_s:g} s had medians over "
        f"{UNSTABLE:g} times apart.{unseen}"
    )


def soak_plots(windows: Sequence[SoakWindow]) -> tuple[Markup, ...]:
    """Draw the latency over time and, where the device shows it, its temperature."""
    if not windows:
        return ()
    tail: Shown = "p99_ms" if len(over_time(windows, "p99_ms")) == len(windows) else "p90_ms"
    latency = {"p50": over_time(windows, "p50_ms"), tail.removesuffix("_ms"): over_time(windows, tail)}
    temperature = over_time(windows, "temperature_c")
    plots = [
        charts.over_time(
            latency, x_name="minutes", y_name="latency, ms", title="Latency during the soak", from_zero=True
        )
    ]
    if len(temperature) > 1:
        title = "Temperature during the soak"
        plots.append(charts.over_time({"": temperature}, x_name="minutes", y_name="temperature, °C", title=title))
    return tuple(plots)


def over_time(windows: Sequence[SoakWindow], key: Shown) -> list[tuple[float, float]]:
    """Return (minutes, value) at the middle of each window that knows the value."""
    values = ((window, getattr(window, key)) for window in windows)
    return [((window.start_s + window.seconds / 2) / 60, value) for window, value in values if value is not None]


def known(windows: Sequence[SoakWindow], key: Shown) -> list[float]:
    """Return a figure of the windows, of those in which the device shows it."""
    return [value for _, value in over_time(windows, key)]

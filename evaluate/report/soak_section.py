"""The report's section on a soak: in a sentence, in a table, and as charts over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from prgkit.evaluate.report.formatting import NONE, ms, row_name
from prgkit.evaluate.report.plots import charts
from prgkit.evaluate.report.samples import Samples, SoakWindow
from prgkit.evaluate.report.schema import Report, Soak, SoakResult, SoakSpan
from prgkit.evaluate.report.sections import Column, Section, TableRow, table_row

MINUTE_S = 60.0
SLOWER, UNSTABLE = 1.05, 1.1
COLUMNS = (
    Column("", left=True),
    *(Column(name) for name in ("p50 ms", "p99 ms", "slowest ms", "clock MHz", "°C", "W")),
)

Shown = Literal["p50_ms", "p90_ms", "p99_ms", "clock_mhz", "temperature_c", "power_w"]


def soak(report: Report, samples: Samples | None = None) -> Section | None:
    """Return the soak, with charts where there are samples; None without one."""
    if report.soak is None:
        return None
    result, sentence = report.soak.result, soak_sentence(report.soak)
    return Section(
        "Soak",
        soak_about(report.soak, sentence),
        COLUMNS,
        tuple(soak_row(f"{name} {span_name(result)}", span) for name, span in spans(result)) if result else (),
        plots=soak_plots(samples.soak.windows) if samples and result else (),
        summary=(sentence,),
    )


def spans(result: SoakResult) -> list[tuple[str, SoakSpan]]:
    """Return what is compared, with its names."""
    return [("first", result.first), ("last", result.last)]


def span_name(result: SoakResult) -> str:
    """Return how long the compared beginning and end are: ``minute``, or ``20 s``."""
    return "minute" if result.compared_s == MINUTE_S else f"{result.compared_s:.3g} s"


def soak_row(name: str, span: SoakSpan) -> TableRow:
    """Return the first or the last minute as a line of the table."""
    shown = ((span.clock_mhz, 0), (span.temperature_c, 0), (span.power_w, 1))
    sensors = (NONE if value is None else f"{value:,.{digits}f}" for value, digits in shown)
    return table_row(name, ms(span.p50_ms), ms(span.p99_ms), ms(span.max_ms), *sensors)


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

"""How a soak is told: in a sentence, in a table, and as a chart over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prgkit.evaluate.report import formatting, html
from prgkit.evaluate.report.formatting import NONE
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.figures import spread_out
from prgkit.evaluate.report.plots.svg import FONT, WIDTH, Axis
from prgkit.evaluate.report.schema import Report, Samples, SoakResult, SoakWindow

HEADER = ["", "p50 ms", "p99 ms", "slowest ms", "clock MHz", "°C", "W"]


MINUTE_S = 60.0

SLOWER, UNSTABLE = 1.05, 1.1

Shown = Literal["p50_ms", "p90_ms", "p99_ms", "clock_mhz", "temperature_c", "power_w"]


def soak_said(report: Report) -> list[str]:
    """Return the soak in a sentence, for the terminal; nothing without one."""
    found = report.soak
    if not found:
        return []
    rate = "back to back" if found.fps is None else f"at {found.fps:g} frames/s"
    start = f"Soak, {formatting.row_name(found)}, {found.minutes:g} min {rate}: "
    failed = "" if found.failed is None else f"failed: {found.failed}"
    result = found.result
    if result is None:
        return [f"{start}{failed}."]
    low, high = result.ratio_interval
    said = [
        start + (f"{failed}; until then {result.verdict}" if failed else result.verdict),
        f"the last {span(result)} took {result.ratio:.2f} times the first ({low:.2f}–{high:.2f})",
        *changes(result),
    ]
    if result.verdict == "unstable":
        fastest, slowest = formatting.ms(result.fastest_p50_ms), formatting.ms(result.slowest_p50_ms)
        said.append(f"medians of its windows from {fastest} to {slowest} ms")
    if result.late is not None:
        said.append(f"{result.late:,} of {result.runs:,} frames late")
    return [", ".join(said) + "."]


def span(found: SoakResult) -> str:
    """Return how long the compared beginning and end are: ``minute``, or ``20 s``."""
    return "minute" if found.compared_s == MINUTE_S else f"{found.compared_s:.3g} s"


def changes(found: SoakResult) -> list[str]:
    """Return what changed from first to last, in words, as far as the device shows it."""
    first, last = found.first, found.last
    said = [f"p50 {formatting.ms(first.p50_ms)} → {formatting.ms(last.p50_ms)} ms"]
    for before, after, unit, digits in (
        (first.clock_mhz, last.clock_mhz, "MHz", 0),
        (first.temperature_c, last.temperature_c, "°C", 0),
        (first.power_w, last.power_w, "W", 1),
    ):
        if before is not None and after is not None:
            said.append(f"{before:,.{digits}f} → {after:,.{digits}f} {unit}")
    return [*said, *([f"the device said: {', '.join(found.throttling)}"] if found.throttling else [])]


def soak_lines(report: Report) -> list[list[str]]:
    """Return the first and the last minute as lines of a table; none without a soak."""
    found = report.soak.result if report.soak else None
    if found is None:
        return []
    lines = []
    for name, one in (("first", found.first), ("last", found.last)):
        figures = [formatting.ms(value) for value in (one.p50_ms, one.p99_ms, one.max_ms)]
        shown = [one.clock_mhz, one.temperature_c, one.power_w]
        others = [
            NONE if value is None else f"{value:,.{digits}f}" for value, digits in zip(shown, (0, 0, 1), strict=True)
        ]
        lines.append([f"{name} {span(found)}", *figures, *others])
    return lines


def soak_about(report: Report) -> str:
    """Return what the figures are figures of."""
    found = report.soak
    assert found is not None
    result, unseen, energy = found.result, list[str](), ""
    if result is not None:
        last = result.last
        shown = {"its clock": last.clock_mhz, "its temperature": last.temperature_c, "its power": last.power_w}
        unseen = [name for name, value in shown.items() if value is None]
    if result is not None and result.energy_mj is not None:
        energy = f" {result.energy_mj:.3g} mJ an image ({result.power_source})."
    return (
        f"{soak_said(report)[0].removeprefix('Soak, ')}{energy} It began right after the other measurements, on a "
        f"device as warm as they left it. Slower means that the whole 95 % interval lies above {SLOWER:g}, throttled "
        f"that the device shows why; unstable, that two windows of {found.window_s:g} s had medians over "
        f"{UNSTABLE:g} times apart." + (f" This device does not show {', '.join(unseen)}." if unseen else "")
    )


def soak_section(report: Report, samples: Samples) -> str:
    """Return the soak as a part of the page: in words, as a chart over time, and as a table; nothing without one."""
    lines = soak_lines(report)
    if not lines:
        return html.section("Soak", soak_about(report), "") if report.soak else ""
    rows = [
        f'<tr><th scope="row">{name}</th>'
        + "".join(html.cell(column, figure, "") for column, figure in zip(HEADER[1:], figures, strict=True))
        + "</tr>"
        for name, *figures in lines
    ]
    table = html.grid("".join(map(html.heading, HEADER)), rows, kind="stacked")
    drawn = "".join(f"<div>{one}</div>" for one in charts(samples.soak.windows))
    return html.section("Soak", soak_about(report), f'<div class="plots">{drawn}</div>{table}')


def charts(windows: Sequence[SoakWindow]) -> list[str]:
    """Draw the latency over time and, where the device shows it, its temperature."""
    if not windows:
        return []
    tail = "p99" if len(known(windows, "p99_ms")) == len(windows) else "p90"
    latency = {tail: over_time(windows, "p99_ms" if tail == "p99" else "p90_ms"), "p50": over_time(windows, "p50_ms")}
    drawn = [chart("latency, ms", latency, "Latency during the soak")]
    warmth = over_time(windows, "temperature_c")
    if len(warmth) > 1:
        drawn.append(chart("temperature, °C", {"": warmth}, "Temperature during the soak"))
    return drawn


def over_time(windows: Sequence[SoakWindow], key: Shown) -> list[tuple[float, float]]:
    """Return (minutes, value) at the middle of each window that knows the value."""
    return [
        ((window.start_s + window.seconds / 2) / 60, value)
        for window in windows
        if (value := getattr(window, key)) is not None
    ]


def chart(name: str, lines: dict[str, list[tuple[float, float]]], title: str) -> str:
    """Draw lines over minutes, each named at its end, on an axis from zero for a latency."""
    left, right, top, bottom = 48.0, WIDTH - 44.0, 30.0, 180.0
    values = [value for points in lines.values() for _, value in points]
    minutes = [minute for points in lines.values() for minute, _ in points]
    low = 0.0 if len(lines) > 1 else min(values) - 2
    x = Axis(0.0, max(minutes), left, right)
    y = Axis(low, 1.06 * max(values) if len(lines) > 1 else max(values) + 2, bottom, top)
    drawn = [svg.text(0, 14, name, muted=True), *svg.vertical_axis(y, left, right=right)]
    drawn += svg.horizontal_axis(x, bottom, "minutes", top=top)
    ends = spread_out([y.at(points[-1][1]) for points in lines.values()], gap=FONT + 2, low=top, high=bottom)
    for index, ((label, points), end) in enumerate(zip(lines.items(), ends, strict=True)):
        ink = svg.colour(len(lines) - 1 - index)
        drawn.append(svg.polyline([(x.at(at), y.at(value)) for at, value in points], stroke=ink, width=1.6))
        if label:
            drawn.append(svg.circle(right + 9, end, radius=3.5, fill=ink))
            drawn.append(svg.text(right + 17, end + FONT * 0.35, label))
    said = ", ".join(f"{label} {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines.items())
    return svg.drawing(bottom + 46, drawn, title=title, description=said)


def known(windows: Sequence[SoakWindow], key: Shown) -> list[float]:
    """Return what the windows know of something that a device may keep to itself."""
    return [value for window in windows if (value := getattr(window, key)) is not None]

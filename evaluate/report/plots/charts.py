"""Charts: latencies as bars, shares of classes as marks, lines over time, counts, and a sweep as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from prgkit.evaluate.report.formatting import ms
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.svg import FONT, WIDTH, Axis
from prgkit.evaluate.report.schema import ClassShare

BAR, LINE, GAP = 11.0, 36.0, 30.0  # pixels: a bar, a bar with its name above it, the title of a group


@dataclass(frozen=True)
class Bar:
    """One bar: a median latency in ms with its interval."""

    label: str
    latency_ms: float
    interval_ms: tuple[float, float]
    colour: int


def latency_bars(groups: Mapping[str, Sequence[Bar]]) -> Markup:
    """Draw a bar for each latency, in titled groups, on one axis that begins at 0: lengths are proportions."""
    left, right, top = 6.0, WIDTH - 8.0, 4.0
    bottom = top + sum(GAP + LINE * len(bars) for bars in groups.values())
    longest = max(max(bar.latency_ms, bar.interval_ms[1]) for bars in groups.values() for bar in bars)
    x = Axis(0, 1.02 * longest, left, right)
    parts = svg.horizontal_axis(x, bottom, "latency, ms (median, batch 1)", top=top)
    floor = top
    for title, bars in groups.items():
        floor += GAP
        parts.append(svg.text(left, floor - 8, title, bold=True))
        for bar in bars:
            parts += draw_bar(bar, x, floor)
            floor += LINE
    description = "; ".join(
        f"{title}: " + ", ".join(f"{bar.label} {ms(bar.latency_ms)} ms" for bar in bars)
        for title, bars in groups.items()
    )
    return svg.drawing(bottom, parts, title="Latency by artifact and device", description=description)


def draw_bar(bar: Bar, x: Axis, above: float) -> list[str]:
    """Return a bar below its name and its figure, with its interval as a whisker."""
    ink, up = svg.colour(bar.colour), above + FONT + 6
    low, high = (x.at(value) for value in bar.interval_ms)
    middle, end = up + BAR / 2, x.at(bar.latency_ms)
    value = f"{ms(bar.latency_ms)} ms"
    return [
        svg.text(
            x.start_px, above + FONT, svg.shortened(bar.label, x.end_px - x.start_px - svg.text_width(value) - 12)
        ),
        svg.text(x.end_px, above + FONT, value, anchor="end", bold=True),
        svg.rect(x.start_px, up, max(1.0, end - x.start_px), BAR, fill=ink, extra='rx="2"'),
        svg.line(low, middle, high, middle, stroke="var(--card, #ffffff)", width=5),
        svg.line(low, middle, high, middle, width=1.5),
        *(svg.line(side, middle - 4, side, middle + 4, width=1.5) for side in (low, high) if high - low > 6),
    ]


ROW, NAME = 25.0, 138.0  # pixels: a class, the room for its name


def class_shares(groups: Sequence[Sequence[ClassShare]], *, left_out: int) -> Markup:
    """Draw a line for each class on an axis from 0 to 100 %, in groups with the number of classes left out between."""
    left, right, top = NAME + 10, WIDTH - 44.0, 30.0
    bottom = top + ROW * (sum(map(len, groups)) + len(groups) - 1) + 4
    x = Axis(0, 100, left, right)
    parts = svg.horizontal_axis(x, bottom, "share, %; line: 95 % interval", top=top)
    parts += class_key(x, teacher=any(share.teacher is not None for group in groups for share in group))
    middle = top
    for index, group in enumerate(groups):
        if index:
            middle += ROW
            parts.append(svg.text(0, middle - 8, f"… {left_out:,} more …", muted=True))
        for share in group:
            middle += ROW
            parts += draw_share(share, x, middle - ROW / 2 + 2)
    description = ", ".join(f"{share.name} {share.student:.0f} %" for group in groups for share in group)
    return svg.drawing(bottom, parts, title="Share by class", description=description)


def class_key(x: Axis, *, teacher: bool) -> list[str]:
    """Return what the marks mean, above the chart."""
    parts = [svg.circle(x.start_px + 6, 10, radius=5, fill=svg.colour(0)), svg.text(x.start_px + 17, 14.5, "student")]
    if teacher:
        parts += [diamond(x.start_px + 86, 10), svg.text(x.start_px + 97, 14.5, "teacher")]
    return [*parts, svg.text(WIDTH, 14.5, "images", anchor="end", muted=True)]


def draw_share(share: ClassShare, x: Axis, middle: float) -> list[str]:
    """Return a class's name, marks, interval and number of images."""
    assert share.student is not None  # it has images
    assert share.student_interval is not None
    low, high = (x.at(value) for value in share.student_interval)
    ink, text_at = svg.colour(0), middle + FONT * 0.35
    title = f"{share.name}: student {share.student:.1f} %"
    title += "" if share.teacher is None else f", teacher {share.teacher:.1f} %"
    return [
        svg.text(0, text_at, svg.shortened(share.name, NAME)),
        svg.line(low, middle, high, middle, stroke=ink, width=5, extra='opacity="0.4" stroke-linecap="round"'),
        *([] if share.teacher is None else [diamond(x.at(share.teacher), middle)]),
        svg.circle(x.at(share.student), middle, radius=5, fill=ink, title=title),
        svg.text(WIDTH, text_at, f"{share.images:,}", anchor="end", muted=True),
    ]


def diamond(x: float, y: float) -> str:
    """Return the teacher's mark: another shape, since not everybody tells colours apart."""
    return svg.path(
        f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z", fill="none", extra=f'stroke="{svg.colour(1)}" stroke-width="2"'
    )


Line = Sequence[tuple[float, float]]  # (x, y), from left to right


def over_time(lines: Mapping[str, Line], *, x_name: str, y_name: str, title: str, from_zero: bool = False) -> Markup:
    """Draw lines over epochs or minutes; where there are several, each is named at its end.

    ``from_zero`` is of the vertical axis; minutes begin at 0, epochs where the lines do, and have whole numbers.
    """
    lines = {label: points for label, points in lines.items() if points}
    named = len(lines) > 1
    room = max(svg.text_width(label) for label in lines) + 12 if named else 0
    times = [time for points in lines.values() for time, _ in points]
    values = [value for points in lines.values() for _, value in points]
    spread = max(values) - min(values) or abs(max(values)) or 1.0
    low = 0.0 if from_zero or 0 <= min(values) < 0.5 * max(values) else min(values) - 0.06 * spread
    epochs = x_name == "epoch"
    x = Axis(min(times) if epochs else 0.0, max(times), 48.0, WIDTH - 14.0 - room)
    y = Axis(low, max(values) + 0.06 * spread, 200.0, 30.0)
    parts = svg.axes(x, y, x_name, y_name, x_ticks=[tick for tick in x.ticks(6) if not epochs or tick == int(tick)])
    lasts = [y.at(points[-1][1]) for points in lines.values()]
    ends = svg.spread_out(lasts, gap=FONT + 3, low=y.end_px, high=y.start_px)
    drawn = list(enumerate(zip(lines.items(), lasts, ends, strict=True)))
    for index, ((label, points), last, end) in reversed(drawn):  # so the first line lies above the others
        ink = svg.colour(index)
        parts.append(svg.polyline([(x.at(time), y.at(value)) for time, value in points], stroke=ink))
        parts.append(
            svg.circle(x.at(points[-1][0]), last, radius=3.5, fill=ink, title=f"{label} {points[-1][1]:.4g}".strip())
        )
        if named:
            parts.append(svg.circle(x.end_px + 12, end, radius=3.5, fill=ink))
            parts.append(svg.text(x.end_px + 20, end + FONT * 0.35, label))
    ranges = ", ".join(f"{label} {points[0][1]:.3g} to {points[-1][1]:.3g}".strip() for label, points in lines.items())
    return svg.drawing(y.start_px, parts, title=title, description=ranges)


def histogram(counts: Sequence[int], *, name: str, title: str) -> Markup:
    """Draw counts in equal bins of [0, 1] as bars."""
    x, y = Axis(0, 1, 50.0, WIDTH - 12.0), Axis(0, max([*counts, 1]), 150.0, 12.0)
    width = (x.end_px - x.start_px) / len(counts)
    bars = [
        svg.rect(
            x.start_px + place * width + 0.5,
            y.at(count),
            width - 1,
            y.start_px - y.at(count),
            fill=svg.colour(0),
            extra='opacity="0.8"',
        )
        for place, count in enumerate(counts)
        if count
    ]
    parts = [*svg.axes(x, y, name), *bars]
    return svg.drawing(y.start_px, parts, title=title, description=f"{sum(counts):,} images in {len(counts)} bins")


def class_sizes(counts: Sequence[int], *, uniform: float) -> Markup:
    """Draw images per class from the fullest to the emptiest, against an even share."""
    ordered = sorted(counts, reverse=True)
    x = Axis(0, len(ordered), 50.0, WIDTH - 12.0)
    y = Axis(0, max([*ordered, uniform, 1]), 150.0, 12.0)
    edge = " ".join(
        f"L{x.at(place):.1f} {y.at(n):.1f}L{x.at(place + 1):.1f} {y.at(n):.1f}" for place, n in enumerate(ordered)
    )
    outline = f"M{x.start_px:.1f} {y.start_px:.1f}{edge}L{x.end_px:.1f} {y.start_px:.1f}Z"
    level = y.at(uniform)
    parts = [
        *svg.axes(x, y, "classes, the fullest first"),
        svg.path(outline, fill=svg.colour(0), extra='opacity="0.8"'),
        svg.line(x.start_px, level, x.end_px, level, extra='stroke-dasharray="4 3" opacity="0.8"'),
        svg.text(x.end_px, level - 6, f"even: {uniform:,.0f}", anchor="end", muted=True),
    ]
    description = "pseudo-labels of the unlabelled images"
    return svg.drawing(y.start_px, parts, title="Images per class", description=description)


def heat_map(values: Mapping[tuple[str, str], float], across: str, down: str) -> Markup:
    """Draw percentages by (row, column), the values of two parameters; the higher the darker."""
    columns, rows = (list(dict.fromkeys(pair[place] for pair in values)) for place in (1, 0))
    low, high = min(values.values()), max(values.values())
    left, top, height = 92.0, 44.0, 34.0
    width = (WIDTH - left) / len(columns)
    parts = [svg.text(left, 14, f"{across} →", muted=True), svg.text(0, 34, f"{down} ↓", muted=True)]
    parts += [svg.text(left + (i + 0.5) * width, 34, column, anchor="middle") for i, column in enumerate(columns)]
    parts += [svg.text(left - 10, top + (i + 0.5) * height + 5, row, anchor="end") for i, row in enumerate(rows)]
    for (row, column), value in values.items():
        share = (value - low) / (high - low) if high > low else 0.5
        x, y = left + columns.index(column) * width, top + rows.index(row) * height
        shade = f'rx="3" fill-opacity="{0.08 + 0.5 * share:.2f}"'
        parts.append(svg.rect(x + 1, y + 1, width - 2, height - 2, fill=svg.colour(0), extra=shade))
        parts.append(svg.text(x + width / 2, y + height / 2 + 5, f"{value:.1f}", anchor="middle", bold=value == high))
    cells = "; ".join(f"{down} {row}, {across} {column}: {value:.1f}" for (row, column), value in values.items())
    bottom = top + len(rows) * height
    return svg.drawing(bottom, parts, title=f"{across} and {down}", description=cells, below=4)

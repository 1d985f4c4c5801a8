"""Charts of a line an item, as inline SVG: latencies of devices as bars, shares of classes as marks with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.figures import milliseconds
from prgkit.evaluate.report.plots.svg import FONT, WIDTH, Axis

BAR, LINE, GAP = 11.0, 36.0, 30.0  # pixels: a bar, a bar with its name above it, the title of a group


@dataclass(frozen=True)
class Bar:
    """One bar: a median latency in ms with its interval."""

    label: str
    latency_ms: float
    interval_ms: tuple[float, float]
    colour: int


def latency_bars(groups: Mapping[str, Sequence[Bar]]) -> str:
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
    said = "; ".join(
        f"{title}: " + ", ".join(f"{bar.label} {milliseconds(bar.latency_ms)} ms" for bar in bars)
        for title, bars in groups.items()
    )
    return svg.drawing(bottom + 46, parts, title="Latency by artifact and device", description=said)


def draw_bar(bar: Bar, x: Axis, above: float) -> list[str]:
    """Return a bar below its name and its figure, with its interval as a whisker."""
    ink, up = svg.colour(bar.colour), above + FONT + 6
    low, high = (x.at(value) for value in bar.interval_ms)
    middle, end = up + BAR / 2, x.at(bar.latency_ms)
    value = f"{milliseconds(bar.latency_ms)} ms"
    return [
        svg.text(x.start_px, above + FONT, shortened(bar.label, x.end_px - x.start_px - svg.text_width(value) - 12)),
        svg.text(x.end_px, above + FONT, value, anchor="end", bold=True),
        f'<rect x="{x.start_px:.1f}" y="{up:.1f}" width="{max(1.0, end - x.start_px):.1f}" height="{BAR:g}" rx="2" '
        f'fill="{ink}"/>',
        svg.line(low, middle, high, middle, stroke="var(--card, #ffffff)", width=5),
        svg.line(low, middle, high, middle, width=1.5),
        *(svg.line(side, middle - 4, side, middle + 4, width=1.5) for side in (low, high) if high - low > 6),
    ]


def shortened(label: str, width: float) -> str:
    """Return as much of a label as fits into a width in pixels."""
    if svg.text_width(label) <= width:
        return label
    kept = label
    while kept and svg.text_width(kept + "…") > width:
        kept = kept[:-1]
    return kept.rstrip(" ,") + "…"


@dataclass(frozen=True)
class Share:
    """One class: the student's share in percent with its interval, and the teacher's where it has one."""

    label: str
    images: int
    student: float
    interval: tuple[float, float]
    teacher: float | None


ROW, NAME = 25.0, 138.0  # pixels: a class, the room for its name


def class_shares(groups: Sequence[Sequence[Share]], *, left_out: int) -> str:
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
    said = ", ".join(f"{share.label} {share.student:.0f} %" for group in groups for share in group)
    return svg.drawing(bottom + 46, parts, title="Share by class", description=said)


def class_key(x: Axis, *, teacher: bool) -> list[str]:
    """Return what the marks mean, above the chart."""
    parts = [svg.circle(x.start_px + 6, 10, radius=5, fill=svg.colour(0)), svg.text(x.start_px + 17, 14.5, "student")]
    if teacher:
        parts += [diamond(x.start_px + 86, 10), svg.text(x.start_px + 97, 14.5, "teacher")]
    return [*parts, svg.text(WIDTH, 14.5, "images", anchor="end", muted=True)]


def draw_share(share: Share, x: Axis, middle: float) -> list[str]:
    """Return a class's name, marks, interval and number of images."""
    low, high = (x.at(value) for value in share.interval)
    ink, text_at = svg.colour(0), middle + FONT * 0.35
    said = f"{share.label}: student {share.student:.1f} %"
    said += "" if share.teacher is None else f", teacher {share.teacher:.1f} %"
    return [
        svg.text(0, text_at, shortened(share.label, NAME)),
        svg.line(low, middle, high, middle, stroke=ink, width=5, extra='opacity="0.4" stroke-linecap="round"'),
        *([] if share.teacher is None else [diamond(x.at(share.teacher), middle)]),
        svg.circle(x.at(share.student), middle, radius=5, fill=ink, title=said),
        svg.text(WIDTH, text_at, f"{share.images:,}", anchor="end", muted=True),
    ]


def diamond(x: float, y: float) -> str:
    """Return the teacher's mark: another shape, since not everybody tells colours apart."""
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z" fill="none" stroke="{svg.colour(1)}" stroke-width="2"/>'

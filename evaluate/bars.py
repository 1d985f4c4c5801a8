"""A bar chart as inline SVG: latencies in groups, each with its interval, so that devices compare at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prgkit.evaluate import svg
from prgkit.evaluate.plots import milliseconds
from prgkit.evaluate.svg import FONT, WIDTH, Axis

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
        f'fill="{ink}" opacity="0.8"/>',
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

"""The parts that plots are drawn from: axes with round ticks, text, shapes for light and dark; all of it escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

FONT = 13
# Every plot is drawn this wide and scaled to its column, so its letters stay readable on a phone.
WIDTH = 440
COLOURS = (  # as many as there are files in a bundle with every format
    *("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2"),
    *("#a16207", "#64748b", "#be185d", "#4d7c0f", "#7c2d12", "#1f2937"),
)


@dataclass(frozen=True)
class Axis:
    """A range of values laid on a range of pixels, evenly or by its logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start_px + share * (self.end_px - self.start_px)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about ``count`` round values within the range."""
        return log_ticks(self.low, self.high, count) if self.log else nice_ticks(self.low, self.high, count)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten within a range, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values for a logarithmic axis: 1, 2 and 5 of each decade, fewer over many, finer within one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [round(factor * 10.0**decade, 12) for decade in decades for factor in factors]
        inside = [value for value in values if low * 0.9999 <= value <= high * 1.0001]
        if len(inside) <= count + 1:
            break
    return inside if len(inside) >= 3 else nice_ticks(low, high, count)


def tick_text(value: float) -> str:
    """Return a tick's value without trailing zeros, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def colour(index: int) -> str:
    """Return the colour of the ``index``-th series; the page's style may replace it by its variable."""
    number = index % len(COLOURS)
    return f"var(--series-{number + 1}, {COLOURS[number]})"


def text(x: float, y: float, content: str, *, anchor: str = "start", muted: bool = False, bold: bool = False) -> str:
    """Return a piece of text."""
    extra = (' opacity="0.68"' if muted else "") + (' font-weight="600"' if bold else "")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{FONT}" fill="currentColor"{extra}>'
        f"{escape(content)}</text>"
    )


def line(
    x1: float, y1: float, x2: float, y2: float, *, stroke: str = "currentColor", width: float = 1, extra: str = ""
) -> str:
    """Return a straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width:g}"'
        f"{' ' + extra if extra else ''}/>"
    )


def polyline(points: Sequence[tuple[float, float]], *, stroke: str, width: float = 2, extra: str = "") -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}" '
        f'stroke-linejoin="round" stroke-linecap="round"{" " + extra if extra else ""}/>'
    )


def circle(x: float, y: float, *, radius: float, fill: str, title: str = "") -> str:
    """Return a dot, with words for the pointer and the screen reader."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}">{inside}</circle>'


def rect(x: float, y: float, width: float, height: float, *, fill: str, extra: str = "") -> str:
    """Return a filled rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"'
        f"{' ' + extra if extra else ''}/>"
    )


def path(steps: str, *, fill: str, extra: str = "") -> str:
    """Return a filled shape."""
    return f'<path d="{steps}" fill="{fill}"{" " + extra if extra else ""}/>'


def axes(x: Axis, y: Axis, x_name: str, y_name: str = "", *, x_ticks: Sequence[float] | None = None) -> list[str]:
    """Return both axes of a plot, with the vertical one's name above it."""
    parts = horizontal_axis(x, y.start_px, x_name, top=y.end_px, ticks=x_ticks)
    for value in y.ticks():
        level = y.at(value)
        parts.append(line(x.start_px, level, x.end_px, level, extra='opacity="0.12"'))
        parts.append(text(x.start_px - 8, level + FONT * 0.35, tick_text(value), anchor="end", muted=True))
    return [*parts, *([text(0, 14, y_name, muted=True)] if y_name else [])]


def horizontal_axis(axis: Axis, y: float, name: str, *, top: float, ticks: Sequence[float] | None = None) -> list[str]:
    """Return the grid, ticks and name of an axis at the bottom of a plot whose upper edge is ``top``."""
    parts = []
    for value in axis.ticks() if ticks is None else ticks:
        x = axis.at(value)
        parts.append(line(x, top, x, y, extra='opacity="0.12"'))
        parts.append(text(x, y + 18, tick_text(value), anchor="middle", muted=True))
    parts.append(line(axis.start_px, y, axis.end_px, y, extra='opacity="0.45"'))
    return [*parts, text((axis.start_px + axis.end_px) / 2, y + 38, name, anchor="middle", muted=True)]


def drawing(bottom: float, parts: Sequence[str], *, title: str, description: str, below: float = 46) -> Markup:
    """Return the whole SVG, as wide as what holds it, with its words for those who do not see it.

    ``bottom`` is where the horizontal axis lies, and ``below`` the room that its ticks and its name take.
    """
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + below:.0f}" width="100%" role="img" '
        'font-family="inherit" style="font-variant-numeric: tabular-nums">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def text_width(content: str) -> float:
    """Return how many pixels a text takes in a wide font (DejaVu Sans); SVG cannot measure without a browser."""
    return (
        sum(0.36 if c in "ijltf.,:;|'- " else 0.95 if c in "mwMW%@" else 0.7 if c.isupper() else 0.62 for c in content)
        * FONT
    )


def shortened(label: str, width: float) -> str:
    """Return as much of a label as fits into a width in pixels."""
    if text_width(label) <= width:
        return label
    while label and text_width(label + "…") > width:
        label = label[:-1]
    return label.rstrip(" ,") + "…"


def spread_out(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return the places moved apart to at least ``gap``, in their order, within the range where it has room."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + gap)
    limit = high
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved

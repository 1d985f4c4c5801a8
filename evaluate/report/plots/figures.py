"""The plots of a bench: accuracy against latency, and every run's latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from prgkit.evaluate.report.formatting import ms
from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.svg import FONT, WIDTH, Axis

Box = tuple[float, float, float, float]  # left, top, right, bottom
FRONT = "Up and to the left is better. In bold: the Pareto front, the best to be had at each latency."


@dataclass(frozen=True)
class Point:
    """One artifact in the plot of accuracy against latency."""

    label: str
    latency_ms: float
    latency_interval_ms: tuple[float, float]
    score: float
    score_interval: tuple[float, float] | None
    colour: int


def accuracy_latency(points: Sequence[Point], *, score_name: str, reference: tuple[str, float] | None = None) -> Markup:
    """Draw each artifact's score (up is better) over its latency (left is better), with the Pareto front.

    ``reference`` is a name and a score to draw a level line at, such as the teacher's.
    """
    x, y = accuracy_axes(points, [reference[1]] if reference else [])
    parts, taken = svg.axes(x, y, "latency, ms (median, batch 1)", score_name), list[Box]()
    if reference:
        level, taken = level_line(*reference, x, y)
        parts += level
    front = pareto(points)
    parts += front_line(front, x, y)
    for point in points:
        parts += draw_point(point, x, y)
    parts += draw_labels(points, front, x, y, taken)
    names = ", ".join(f"{point.label}: {point.score:.1f} at {ms(point.latency_ms)} ms" for point in points)
    return svg.drawing(y.start_px, parts, title=f"{score_name} against latency", description=names)


def accuracy_axes(points: Sequence[Point], levels: Sequence[float]) -> tuple[Axis, Axis]:
    """Return the axes of latency and of score, with room for labels."""
    latencies = [value for point in points for value in (point.latency_ms, *point.latency_interval_ms)]
    scores = [value for point in points for value in (point.score, *(point.score_interval or ()))] + [*levels]
    margin = max(0.12 * (max(scores) - min(scores)), 0.5)
    bottom = 292.0 + 16 * max(0, len(points) - 5)  # many labels need room
    return (
        latency_axis(latencies, 48.0, WIDTH - 14.0, margin=0.18),
        Axis(max(0.0, min(scores) - margin), min(100.4, max(scores) + margin), bottom, 34.0),
    )


def level_line(name: str, score: float, x: Axis, y: Axis) -> tuple[list[str], list[Box]]:
    """Return a named line at a score, and the boxes that it takes."""
    level, right, label = y.at(score), x.end_px, f"{name} {score:.1f}"
    above = level - 7 if level - 7 - FONT > y.end_px - 8 else level + FONT + 4
    parts = [
        svg.line(x.start_px, level, right, level, width=1.5, extra='stroke-dasharray="5 4" opacity="0.6"'),
        svg.text(right, above, label, anchor="end", muted=True),
    ]
    named = (right - svg.text_width(label), above - FONT, right, above + 3)
    return parts, [named, (x.start_px, level - 2, right, level + 2)]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both latency and score, from the fastest to the best."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def front_line(front: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    """Return the stairs of a front of several points."""
    if len(front) < 2:
        return []
    corners = [(x.at(front[0].latency_ms), y.at(front[0].score))]
    for point in front[1:]:
        corners += [(x.at(point.latency_ms), corners[-1][1]), (x.at(point.latency_ms), y.at(point.score))]
    return [svg.polyline(corners, stroke="currentColor", width=1.2, extra='opacity="0.4"')]


def draw_point(point: Point, x: Axis, y: Axis) -> list[str]:
    """Return a dot with its two intervals as whiskers."""
    across, up, ink = x.at(point.latency_ms), y.at(point.score), svg.colour(point.colour)
    low, high = (x.at(value) for value in point.latency_interval_ms)
    parts = [svg.line(low, up, high, up, stroke=ink, width=2)]
    parts += [svg.line(end, up - 4, end, up + 4, stroke=ink, width=2) for end in (low, high) if high - low > 8]
    if point.score_interval:
        ends = [y.at(value) for value in point.score_interval]
        parts.append(svg.line(across, ends[0], across, ends[1], stroke=ink, width=2, extra='opacity="0.45"'))
    title = f"{point.label}: {point.score:.1f} at {ms(point.latency_ms)} ms"
    return [*parts, svg.circle(across, up, radius=5.5, fill=ink, title=title)]


def draw_labels(points: Sequence[Point], front: Sequence[Point], x: Axis, y: Axis, taken: Sequence[Box]) -> list[str]:
    """Return the names of the points, those of the front first; where there is no room its dot's title names one."""
    taken, whiskers = [*taken], []
    for point in points:
        across, up = x.at(point.latency_ms), y.at(point.score)
        low, high = (x.at(value) for value in point.latency_interval_ms)
        taken += [(across - 7, up - 7, across + 7, up + 7), (low - 4, up - 4, high + 4, up + 4)]
        if point.score_interval:
            lower, upper = (y.at(value) for value in point.score_interval)
            whiskers.append((across - 2, upper, across + 2, lower))
    parts = []
    frame = (x.start_px, y.end_px - 8, x.end_px, y.start_px)
    for point in sorted(points, key=lambda point: point not in front):
        start = x.at(point.latency_ms), y.at(point.score)
        place = place_label(point.label, start, taken, whiskers, frame)
        if place is None:
            continue
        across, up, anchor = place
        middle = up - FONT * 0.35
        if abs(middle - start[1]) > FONT:
            edge = across - 3 if anchor == "start" else across + 3
            parts.append(svg.line(*start, edge, middle, extra='opacity="0.45"'))
        parts.append(svg.text(across, up, point.label, anchor=anchor, bold=point in front))
    return parts


def place_label(
    label: str, start: tuple[float, float], taken: list[Box], whiskers: Sequence[Box], frame: Box
) -> tuple[float, float, str] | None:
    """Return where a point's label covers nothing, or at most a whisker, and note it as taken; None if nowhere."""
    across, up = start
    width = 1.12 * svg.text_width(label)  # in bold
    offers = []
    for distance in range(0, 145, 18):
        for sign in (-1, 1):
            offers.append((across + 11, up + FONT * 0.35 + sign * distance, "start"))
            offers.append((across - 11, up + FONT * 0.35 + sign * distance, "end"))
    near = [offer for offer in offers if abs(offer[1] - up) < 3 * FONT]
    for some, avoided in ((near, [*taken, *whiskers]), (offers, taken)):
        for offer in some:
            left = offer[0] if offer[2] == "start" else offer[0] - width
            box = (left, offer[1] - FONT, left + width, offer[1] + 3)
            inside = box[0] >= frame[0] and box[2] <= frame[2] and box[1] >= frame[1] and box[3] <= frame[3]
            if inside and not any(overlap(box, other) for other in avoided):
                taken.append(box)
                return offer
    return None


def overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def latency_distribution(series: Mapping[str, Sequence[float]]) -> Markup:
    """Draw every run's latency in ms: one histogram an artifact on a shared logarithmic axis, its tail whole."""
    top, lane = 10.0, min(120.0, max(64.0, 272.0 / len(series)))
    bottom = top + lane * len(series)
    ends = [value for samples in series.values() for value in (min(samples), max(samples))]
    x = latency_axis(ends, 6.0, WIDTH - 8.0, margin=0.03)
    parts = svg.horizontal_axis(x, bottom, "latency of one run, ms (bar height: square root of the count)", top=top)
    for index, (name, samples) in enumerate(series.items()):
        parts += draw_lane(name, np.asarray(samples), x, floor=top + lane * (index + 1), lane=lane, colour=index)
    names = ", ".join(f"{name}: median {ms(float(np.median(values)))} ms" for name, values in series.items())
    return svg.drawing(bottom, parts, title="Distribution of latency", description=names)


def draw_lane(name: str, samples: NDArray[np.float64], x: Axis, *, floor: float, lane: float, colour: int) -> list[str]:
    """Return one artifact's histogram, its percentiles and its slowest run."""
    ink, tall = svg.colour(colour), lane - 36
    edges = np.geomspace(x.low, x.high, 118)
    counts, _ = np.histogram(samples, bins=edges)
    # One run in thousands must still show: the tail is what a deadline meets.
    heights = np.where(counts > 0, np.maximum(1.5, tall * np.sqrt(counts / counts.max())), 0.0)
    bars = "".join(
        f"M{x.at(a):.1f} {floor:.1f}V{floor - height:.1f}H{x.at(b):.1f}V{floor:.1f}Z"
        for a, b, height in zip(edges[:-1], edges[1:], heights, strict=True)
        if height
    )
    parts = [svg.path(bars, fill=ink), svg.line(x.start_px, floor, x.end_px, floor, extra='opacity="0.3"')]
    marks = dict(zip(("p50", "p90", "p99"), np.percentile(samples, [50, 90, 99]).tolist(), strict=True))
    if len(samples) < 1000:
        del marks["p99"]
    dashes = 'stroke-dasharray="2 2" opacity="0.8"'
    for value in marks.values():
        parts.append(svg.line(x.at(value), floor - tall - 4, x.at(value), floor, width=1.2, extra=dashes))
    slowest = float(samples.max())
    title = f"slowest run {ms(slowest)} ms"
    parts.append(svg.circle(x.at(slowest), floor - 3.5, radius=3.5, fill=ink, title=title))
    words = [f"{mark} {ms(value)}" for mark, value in (marks | {"slowest": slowest}).items()]
    # The name is bold; a long one leaves room for the median, perhaps for the slowest and p99.
    while len(words) > 1 and 1.12 * svg.text_width(name) + svg.text_width(" · ".join(words)) > WIDTH - 30:
        del words[1]
    return [
        *parts,
        svg.text(x.start_px, floor - lane + 22, name, bold=True),
        svg.text(x.end_px, floor - lane + 22, " · ".join(words), anchor="end", muted=True),
    ]


def latency_axis(values: Sequence[float], left: float, right: float, *, margin: float) -> Axis:
    """Return a logarithmic axis that holds the values with some room at both ends."""
    low, high = max(min(values), 1e-4), max(max(values), 1e-4)
    room = max((high / low) ** margin, 1.06)
    return Axis(low / room, high * room, left, right, log=True)

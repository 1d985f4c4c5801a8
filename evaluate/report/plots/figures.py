"""The report's plots as inline SVG: accuracy against latency, the distribution of latency, training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prgkit.evaluate.report.plots import svg
from prgkit.evaluate.report.plots.svg import FONT, WIDTH, Axis

Box = tuple[float, float, float, float]  # left, top, right, bottom
FRONT = "Up and to the left is better. In bold: the Pareto front, the best to be had at each latency."
# What an epoch's record holds besides the terms of the loss.
NOT_A_TERM = {"epoch", "step", "seconds", "learning_rate", "images_per_s", "loss", "agreement"}


@dataclass(frozen=True)
class Point:
    """One artifact in the plot of accuracy against latency."""

    label: str
    latency_ms: float
    latency_interval_ms: tuple[float, float]
    score: float
    score_interval: tuple[float, float] | None
    colour: int


def accuracy_latency(points: Sequence[Point], *, score_name: str, reference: tuple[str, float] | None = None) -> str:
    """Draw each artifact's score (up is better) over its latency (left is better), with the Pareto front.

    Args:
        points: the measured artifacts.
        score_name: what the vertical axis shows, with its unit.
        reference: a name and a score to draw a level line at, such as the teacher's.
    """
    left, right, top = 48.0, WIDTH - 14.0, 34.0
    bottom = 292.0 + 16 * max(0, len(points) - 5)  # many labels need room
    x = latency_axis(
        [value for point in points for value in (point.latency_ms, *point.latency_interval_ms)],
        left,
        right,
        margin=0.18,
    )
    scores = [value for point in points for value in (point.score, *(point.score_interval or ()))]
    scores += [reference[1]] if reference else []
    margin = max(0.12 * (max(scores) - min(scores)), 0.5)
    y = Axis(max(0.0, min(scores) - margin), min(100.4, max(scores) + margin), bottom, top)
    parts = [
        *svg.vertical_axis(y, left, right=right),
        *svg.horizontal_axis(x, bottom, "latency, ms (median, batch 1)", top=top),
    ]
    parts.append(svg.text(0, 14, score_name, muted=True))
    taken: list[Box] = []
    if reference:
        level = y.at(reference[1])
        parts.append(svg.line(left, level, right, level, width=1.5, extra='stroke-dasharray="5 4" opacity="0.6"'))
        name = f"{reference[0]} {reference[1]:.1f}"
        above = level - 7 if level - 7 - FONT > top - 8 else level + FONT + 4
        parts.append(svg.text(right, above, name, anchor="end", muted=True))
        taken += [(right - svg.text_width(name), above - FONT, right, above + 3), (left, level - 2, right, level + 2)]
    front = pareto(points)
    if len(front) > 1:
        corners = [(x.at(front[0].latency_ms), y.at(front[0].score))]
        for point in front[1:]:
            corners += [(x.at(point.latency_ms), corners[-1][1]), (x.at(point.latency_ms), y.at(point.score))]
        parts.append(svg.polyline(corners, stroke="currentColor", width=1.2, extra='opacity="0.4"'))
    taken += [(x.at(p.latency_ms) - 7, y.at(p.score) - 7, x.at(p.latency_ms) + 7, y.at(p.score) + 7) for p in points]
    whiskers: list[Box] = []
    for point in points:
        parts += draw_point(point, x, y)
        low, high = (x.at(value) for value in point.latency_interval_ms)
        taken.append((low - 4, y.at(point.score) - 4, high + 4, y.at(point.score) + 4))
        if point.score_interval:
            bottom_end, top_end = (y.at(value) for value in point.score_interval)
            whiskers.append((x.at(point.latency_ms) - 2, top_end, x.at(point.latency_ms) + 2, bottom_end))
    for point in sorted(points, key=lambda point: point not in front):
        place = place_label(point, x, y, taken, whiskers, (left, top - 8, right, bottom))
        if place is None:  # its colour is in the table, its name in its dot's title
            continue
        across, up, anchor = place
        start, middle = (x.at(point.latency_ms), y.at(point.score)), up - FONT * 0.35
        if abs(middle - start[1]) > FONT:
            edge = across - 3 if anchor == "start" else across + 3
            parts.append(svg.line(*start, edge, middle, extra='opacity="0.45"'))
        parts.append(svg.text(across, up, point.label, anchor=anchor, bold=point in front))
    names = ", ".join(f"{point.label}: {point.score:.1f} at {milliseconds(point.latency_ms)} ms" for point in points)
    return svg.drawing(bottom + 46, parts, title=f"{score_name} against latency", description=names)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both latency and score, from the fastest to the best."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def draw_point(point: Point, x: Axis, y: Axis) -> list[str]:
    """Return a dot with its two intervals as whiskers."""
    across, up, ink = x.at(point.latency_ms), y.at(point.score), svg.colour(point.colour)
    low, high = (x.at(value) for value in point.latency_interval_ms)
    parts = [svg.line(low, up, high, up, stroke=ink, width=2)]
    parts += [svg.line(end, up - 4, end, up + 4, stroke=ink, width=2) for end in (low, high) if high - low > 8]
    if point.score_interval:
        ends = [y.at(value) for value in point.score_interval]
        parts.append(svg.line(across, ends[0], across, ends[1], stroke=ink, width=2, extra='opacity="0.45"'))
    said = f"{point.label}: {point.score:.1f} at {milliseconds(point.latency_ms)} ms"
    return [*parts, svg.circle(across, up, radius=5.5, fill=ink, title=said)]


def place_label(
    point: Point, x: Axis, y: Axis, taken: list[Box], whiskers: Sequence[Box], frame: Box
) -> tuple[float, float, str] | None:
    """Return where a point's label covers nothing, or at most a whisker, and note it as taken; None if nowhere."""
    across, up = x.at(point.latency_ms), y.at(point.score)
    width = 1.12 * svg.text_width(point.label)  # in bold
    offers = []
    for distance in range(0, 145, 18):
        for sign in (-1, 1):
            offers.append((across + 11, up + FONT * 0.35 + sign * distance, "start"))
            offers.append((across - 11, up + FONT * 0.35 + sign * distance, "end"))
    near = [offer for offer in offers if abs(offer[1] - up) < 3 * FONT]
    for some, avoided in ((near, [*taken, *whiskers]), (offers, taken)):
        for offer in some:
            start = offer[0] if offer[2] == "start" else offer[0] - width
            box = (start, offer[1] - FONT, start + width, offer[1] + 3)
            inside = box[0] >= frame[0] and box[2] <= frame[2] and box[1] >= frame[1] and box[3] <= frame[3]
            if inside and not any(overlap(box, other) for other in avoided):
                taken.append(box)
                return offer
    return None


def overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def latency_distribution(series: Mapping[str, Sequence[float]]) -> str:
    """Draw every run's latency in ms: one histogram an artifact on a shared logarithmic axis, its tail whole."""
    left, right, top, lane = 6.0, WIDTH - 8.0, 10.0, min(120.0, max(64.0, 272.0 / len(series)))
    bottom = top + lane * len(series)
    x = latency_axis(
        [value for samples in series.values() for value in (min(samples), max(samples))], left, right, margin=0.03
    )
    parts = svg.horizontal_axis(x, bottom, "latency of one run, ms (bar height: square root of the count)", top=top)
    edges = np.geomspace(x.low, x.high, 118)
    for index, (name, samples) in enumerate(series.items()):
        parts += draw_lane(name, np.asarray(samples), x, edges, floor=top + lane * (index + 1), lane=lane, colour=index)
    names = ", ".join(f"{name}: median {milliseconds(float(np.median(values)))} ms" for name, values in series.items())
    return svg.drawing(bottom + 46, parts, title="Distribution of latency", description=names)


def draw_lane(name: str, samples: Any, x: Axis, edges: Any, *, floor: float, lane: float, colour: int) -> list[str]:
    """Return one artifact's histogram, its percentiles and its slowest run."""
    ink, tall = svg.colour(colour), lane - 36
    counts, _ = np.histogram(samples, bins=edges)
    # One run in thousands must still show: the tail is what a deadline meets.
    heights = np.where(counts > 0, np.maximum(1.5, tall * np.sqrt(counts / counts.max())), 0.0)
    bars = "".join(
        f"M{x.at(a):.1f} {floor:.1f}V{floor - height:.1f}H{x.at(b):.1f}V{floor:.1f}Z"
        for a, b, height in zip(edges[:-1], edges[1:], heights, strict=True)
        if height
    )
    parts = [
        f'<path d="{bars}" fill="{ink}"/>',
        svg.line(x.start_px, floor, x.end_px, floor, extra='opacity="0.3"'),
    ]
    p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    marks = [
        ("p50", p50),
        ("p90", p90),
        *([("p99", p99)] if len(samples) >= 1000 else []),
        ("slowest", float(samples.max())),
    ]
    for _, value in marks[:-1]:
        parts.append(
            svg.line(
                x.at(value),
                floor - tall - 4,
                x.at(value),
                floor,
                width=1.2,
                extra='stroke-dasharray="2 2" opacity="0.8"',
            )
        )
    parts.append(
        svg.circle(
            x.at(marks[-1][1]), floor - 3.5, radius=3.5, fill=ink, title=f"slowest run {milliseconds(marks[-1][1])} ms"
        )
    )
    told = [f"{mark} {milliseconds(value)}" for mark, value in marks]
    while len(told) > 1 and 1.12 * svg.text_width(name) + svg.text_width(" · ".join(told)) > WIDTH - 30:  # it is bold
        del told[1]  # a long name leaves room for the median, perhaps for the slowest and p99
    return [
        *parts,
        svg.text(x.start_px, floor - lane + 22, name, bold=True),
        svg.text(x.end_px, floor - lane + 22, " · ".join(told), anchor="end", muted=True),
    ]


def histogram(counts: Sequence[int], *, name: str, title: str) -> str:
    """Draw counts in equal bins of [0, 1] as bars."""
    left, right, top, floor = 50.0, WIDTH - 12.0, 12.0, 150.0
    x, y = Axis(0, 1, left, right), Axis(0, max([*counts, 1]), floor, top)
    width = (right - left) / len(counts)
    bars = [
        f'<rect x="{left + place * width + 0.5:.1f}" y="{y.at(count):.1f}" width="{width - 1:.1f}" '
        f'height="{floor - y.at(count):.1f}" fill="{svg.colour(0)}" opacity="0.8"/>'
        for place, count in enumerate(counts)
        if count
    ]
    parts = [*svg.vertical_axis(y, left, right=right), *svg.horizontal_axis(x, floor, name, top=top), *bars]
    return svg.drawing(floor + 46, parts, title=title, description=f"{sum(counts):,} images in {len(counts)} bins")


def class_sizes(counts: Sequence[int], *, uniform: float) -> str:
    """Draw images per class from the fullest to the emptiest, against an even share."""
    left, right, top, floor = 50.0, WIDTH - 12.0, 12.0, 150.0
    ordered = sorted(counts, reverse=True)
    x = Axis(0, len(ordered), left, right)
    y = Axis(0, max([*ordered, uniform, 1]), floor, top)
    edge = " ".join(
        f"L{x.at(place):.1f} {y.at(n):.1f}L{x.at(place + 1):.1f} {y.at(n):.1f}" for place, n in enumerate(ordered)
    )
    area = f'<path d="M{left:.1f} {floor:.1f}{edge}L{right:.1f} {floor:.1f}Z" fill="{svg.colour(0)}" opacity="0.8"/>'
    even = svg.line(left, y.at(uniform), right, y.at(uniform), extra='stroke-dasharray="4 3" opacity="0.8"')
    said = svg.text(right, y.at(uniform) - 6, f"even: {uniform:,.0f}", anchor="end", muted=True)
    name = "classes, the fullest first"
    parts = [*svg.vertical_axis(y, left, right=right), *svg.horizontal_axis(x, floor, name, top=top), area, even, said]
    return svg.drawing(
        floor + 46, parts, title="Images per class", description="pseudo-labels of the unlabelled images"
    )


def training_curves(training: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw two panels over the epochs: the loss with its terms, and the agreement with the teacher."""
    terms = (
        [key for key in training[0] if key not in NOT_A_TERM and isinstance(training[0][key], (int, float))]
        if training
        else []
    )
    shown = ["loss", *terms] if len(terms) > 1 else ["loss"]
    losses = {name: curve(training, name) for name in shown}
    panels = [
        ("Loss", "Loss by epoch", losses),
        ("Agreement, %", "Agreement by epoch", {"agreement": curve(training, "agreement")}),
    ]
    return [
        panel(name, title, lines) for name, title, lines in panels if any(len(points) > 1 for points in lines.values())
    ]


def curve(training: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (epoch, value) pairs of the records that have a finite value."""
    pairs = [(record["epoch"], record.get(key)) for record in training]
    return [
        (float(epoch), float(value))
        for epoch, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def panel(name: str, title: str, lines: Mapping[str, list[tuple[float, float]]]) -> str:
    """Draw lines over the epochs, each named at its end."""
    lines = {label: points for label, points in lines.items() if points}
    named = len(lines) > 1
    right = WIDTH - 14.0 - (max(svg.text_width(label) for label in lines) + 12 if named else 0)
    left, top, bottom = 48.0, 30.0, 236.0
    values = [value for points in lines.values() for _, value in points]
    epochs = [epoch for points in lines.values() for epoch, _ in points]
    spread = max(values) - min(values) or abs(max(values)) or 1.0
    low = 0.0 if 0 <= min(values) < 0.5 * max(values) else min(values) - 0.06 * spread
    y = Axis(low, max(values) + 0.06 * spread, bottom, top)
    x = Axis(min(epochs), max(epochs), left, right)
    parts = [svg.text(0, 14, name, muted=True), *svg.vertical_axis(y, left, right=right)]
    whole = [tick for tick in x.ticks(6) if tick == int(tick)]
    for tick in whole:
        parts.append(svg.text(x.at(tick), bottom + 18, svg.tick_text(tick), anchor="middle", muted=True))
    parts += [svg.line(left, bottom, right, bottom, extra='opacity="0.45"')]
    parts.append(svg.text((left + right) / 2, bottom + 38, "epoch", anchor="middle", muted=True))
    ends = spread_out([y.at(points[-1][1]) for points in lines.values()], gap=FONT + 3, low=top, high=bottom)
    for index, ((label, points), end) in enumerate(zip(lines.items(), ends, strict=True)):
        ink = svg.colour(index)
        parts.append(svg.polyline([(x.at(epoch), y.at(value)) for epoch, value in points], stroke=ink))
        parts.append(
            svg.circle(
                x.at(points[-1][0]), y.at(points[-1][1]), radius=3.5, fill=ink, title=f"{label} {points[-1][1]:.4g}"
            )
        )
        if named:
            parts.append(svg.circle(right + 12, end, radius=3.5, fill=ink))
            parts.append(svg.text(right + 20, end + FONT * 0.35, label))
    last = ", ".join(f"{label}: {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines.items())
    return svg.drawing(bottom + 46, parts, title=title, description=last)


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


def latency_axis(values: Sequence[float], left: float, right: float, *, margin: float) -> Axis:
    """Return a logarithmic axis that holds the values with some room at both ends."""
    low, high = max(min(values), 1e-4), max(max(values), 1e-4)
    room = max((high / low) ** margin, 1.06)
    return Axis(low / room, high * room, left, right, log=True)


def milliseconds(value: float) -> str:
    """Return a latency with three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"

"""Comparisons as tables of the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from prgkit.evaluate.compare import aggregate, devices, ranking
from prgkit.evaluate.report.terminal import plain_table


def comparison_table(found: devices.Comparison) -> Table:
    """Return the artifacts of several reports; a device is named where its lines begin."""
    result = plain_table(devices.headline(found), found.notes)
    for index, name in enumerate(devices.header(found)):
        result.add_column(name, justify="right" if index >= 2 else "left", no_wrap=index == 1)
    before = None
    for row in found.rows:
        device, *cells = devices.line(found, row)
        style = "" if row.status == "measured" else "dim"
        result.add_row(Text(device if row.report != before else ""), *(Text(cell, style=style) for cell in cells))
        before = row.report
    return result


def standings_table(found: dict[str, Any]) -> Table:
    """Return a comparison of objectives and students; a student is named where its lines begin."""
    result = plain_table(aggregate.headline(found), [aggregate.about(found)])
    for index, name in enumerate(aggregate.header(found)):
        result.add_column(name, justify="left" if index < 2 else "right")
    before = None
    for student, *cells in aggregate.lines(found):
        result.add_row(Text(student if student != before else ""), *map(Text, cells))
        before = student
    return result


def ranking_table(found: dict[str, Any]) -> Table:
    """Return untrained students in the order of their score."""
    result = plain_table(ranking.headline(found), ranking.about(found))
    for index, name in enumerate(ranking.header(found)):
        result.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in ranking.lines(found):
        result.add_row(*map(Text, line))
    return result

"""What a bench says in the terminal besides its rows: how it stands to its baseline, and how devices compare."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prgkit.evaluate import baseline, comparison


def baseline_table(found: baseline.Found) -> Table:
    """Return a report held against its baseline, a line for each figure that was compared."""
    result = plain_table(baseline.about(found), baseline.notes(found))
    for index, name in enumerate(baseline.HEADER):
        result.add_column(name, justify="right" if 2 <= index <= 4 else "left", no_wrap=index == 0)
    for line in baseline.cells(found):
        result.add_row(*map(Text, line[:-1]), Text(line[-1], style=STYLES.get(line[-1], "")))
    return result


STYLES = {"worse": "red", "better": "green"}


def comparison_table(found: comparison.Comparison) -> Table:
    """Return the artifacts of several reports; a device is named where its lines begin."""
    result = plain_table(comparison.headline(found), found["notes"])
    for index, name in enumerate(comparison.header(found)):
        result.add_column(name, justify="right" if index >= 2 else "left", no_wrap=index == 1)
    before = None
    for row in found["rows"]:
        device, *cells = comparison.line(found, row)
        style = "" if row["status"] == "measured" else "dim"
        result.add_row(Text(device if row["report"] != before else ""), *(Text(cell, style=style) for cell in cells))
        before = row["report"]
    return result


def plain_table(title: str, notes: Sequence[str]) -> Table:
    """Return a table without columns; Text, not strings: names may hold brackets that rich would read as markup."""
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text("\n".join(notes)) if notes else None,
        caption_justify="left",
    )

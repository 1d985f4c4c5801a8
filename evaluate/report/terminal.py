"""A section of a report as a table of the terminal, its sentences below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table as Table  # for those who name what `table` returns
from rich.text import Text

from prgkit.evaluate.report.sections import Cell, Section, TableRow

WHOLE_LETTERS = 40  # a name up to this long is not broken over lines
STYLES = {"bad": "red", "good": "green", "warn": "yellow", "": ""}


def table(section: Section, *, title: str, notes: Sequence[str]) -> Table:
    """Return a section's table, its smaller figures left out; a group is named where its lines begin.

    All is Text, not strings: names may hold brackets that rich would read as markup.
    """
    result = Table(
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
    if section.group:
        result.add_column(section.group)
    for index, column in enumerate(section.columns):
        if column.terminal:
            longest = max((len(row.cells[0].text) for row in section.rows), default=0)
            whole = index == 0 and longest <= WHOLE_LETTERS
            result.add_column(column.heading, justify="left" if column.left else "right", no_wrap=whole)
    group = ""
    for row in section.rows:
        texts = terminal_cells(section, row)
        if section.group:
            texts.insert(0, Text(row.group if row.group != group else ""))
            group = row.group
        result.add_row(*texts)
    return result


def terminal_cells(section: Section, row: TableRow) -> list[Text]:
    """Return a row's cells for those columns that the terminal shows."""
    texts, at = [], 0
    for cell in row.cells:
        shown = sum(column.terminal for column in section.columns[at : at + cell.span])
        if shown:
            texts += [terminal_text(cell, named=at == 0, muted=row.muted), *[Text("")] * (shown - 1)]
        at += cell.span
    return texts


def terminal_text(cell: Cell, *, named: bool, muted: bool) -> Text:
    """Return a cell's text; a verdict stands for its reasons, which the notes tell."""
    style = "dim" if muted else ""
    if cell.chip is None or named:
        return Text(cell.text, style=style)
    return Text(cell.chip.brief or cell.chip.text, style=STYLES[cell.chip.kind] or style)

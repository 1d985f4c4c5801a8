"""What a report shows, as data: html.py, markdown.py and terminal.py draw it, and know no section by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Chip:
    """A word on a coloured ground: a verdict."""

    text: str
    kind: Literal["", "good", "warn", "bad"] = ""
    brief: str = ""  # what the terminal shows in its place


@dataclass(frozen=True)
class Cell:
    """A figure of a table, with what qualifies it."""

    text: str
    small: str = ""  # the smaller figure under it, such as its interval
    chip: Chip | None = None
    dot: str = ""  # the colour of a dot before it, as CSS names it
    strong: bool = False
    span: int = 1  # how many columns it takes


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    unit: str = ""
    short: str | None = None  # what stands for name and unit in Markdown and in the terminal
    small: str = ""  # Markdown gives the smaller figures a column of this name; without one it leaves them out
    left: bool = False  # of words, not of figures
    terminal: bool = True

    @property
    def full_name(self) -> str:
        """Its name and unit; without the unit where all of the table's figures have the same."""
        return self.name if self.short == self.name else f"{self.name} {self.unit}".strip()

    @property
    def heading(self) -> str:
        """Its name in Markdown and in the terminal."""
        return self.full_name if self.short is None else self.short


@dataclass(frozen=True)
class TableRow:
    """A line of a table; its first cell names it."""

    cells: tuple[Cell, ...]
    group: str = ""  # what several lines have in common: a device, a student
    lead: bool = False  # the line that the headline speaks of
    muted: bool = False


@dataclass(frozen=True)
class Answer:
    """A class name with those who gave it."""

    name: str
    givers: tuple[str, ...]
    wrong: bool


@dataclass(frozen=True)
class Example:
    """An image with the answers given to it."""

    source: str  # the image as a data URI
    pixelated: bool  # whether it is shown pixel by pixel
    description: str
    verdict: Chip
    answers: tuple[Answer, ...]
    heat_map: str = ""  # what spoke for the student's answer, as a data URI


@dataclass(frozen=True)
class Section:
    """A part of a report: a title, a sentence, and any of a table, plots, facts, notes, commands and pictures."""

    title: str
    about: str = ""
    columns: tuple[Column, ...] = ()
    rows: tuple[TableRow, ...] = ()
    group: str = ""  # what the rows' groups are
    ends: tuple[int, int] | None = None  # how many rows Markdown shows from the top and from the bottom; None: all
    folded: str = ""  # the page shows the table under this title, when it is clicked
    plots: tuple[Markup, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (colour, name)
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    dot: str = ""  # the colour of a dot before the title
    summary: tuple[str, ...] = ()  # the section in sentences, for the terminal
    page_only: bool = False  # left out of Markdown


@dataclass(frozen=True)
class Tile:
    """A figure that answers what most readers ask first."""

    name: str
    figure: str
    unit: str
    more: str


@dataclass(frozen=True)
class Document:
    """A whole report; on a wide page the sections of one line stand beside each other."""

    title: str
    sections: tuple[tuple[Section, ...], ...]
    origin: str = ""  # what made it, and when
    lead: tuple[str, ...] = ()  # a sentence in parts, every second of them in bold
    tiles: tuple[Tile, ...] = ()
    about: str = ""  # how its figures came to be


def table_row(*cells: Cell | str, group: str = "", lead: bool = False, muted: bool = False) -> TableRow:
    """Return a line of a table; a string is a cell that is nothing but text."""
    ready = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)
    return TableRow(ready, group, lead, muted)


def lines(*groups: Sequence[Section | None]) -> tuple[tuple[Section, ...], ...]:
    """Return a document's sections without those that have nothing to show."""
    shown = (tuple(section for section in group if section is not None) for group in groups)
    return tuple(group for group in shown if group)

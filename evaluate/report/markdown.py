"""A report as Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from prgkit.evaluate.report.sections import Cell, Document, Section


def markdown(document: Document) -> str:
    """Return a document as Markdown; what came from outside stays text in it."""
    lead = [f"**{plain(part)}**" if index % 2 else plain(part) for index, part in enumerate(document.lead)]
    sections = chain.from_iterable(document.sections)
    parts = [
        f"# {plain(document.title)}",
        "".join(lead),
        plain(document.origin),
        *chain.from_iterable(section_parts(section) for section in sections if not section.page_only),
        document.about,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def section_parts(section: Section) -> list[str]:
    """Return a section's paragraphs."""
    return [
        f"## {plain(section.title)}",
        plain(section.about),
        table(section),
        "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in section.facts),
        "\n".join(f"- {plain(note)}" for note in section.notes),
        "\n".join(["```", *section.commands, "```"]) if section.commands else "",
    ]


def table(section: Section) -> str:
    """Return a section's table, figures to the right; nothing where it has none."""
    if not section.rows:
        return ""
    header, rules = table_header(section)
    rows = shortened(table_rows(section), section.ends)
    return "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in [header, rules, *rows])


def table_header(section: Section) -> tuple[list[str], list[str]]:
    """Return a table's headings and what aligns them; smaller figures that are named have columns of their own."""
    header, rules = ([section.group], ["---"]) if section.group else ([], [])
    for column in section.columns:
        names = [column.heading, column.small] if column.small else [column.heading]
        header += names
        rules += ["---" if column.left else "--:"] * len(names)
    return header, rules


def table_rows(section: Section) -> list[list[str]]:
    """Return a table's cells as text."""
    rows = []
    for line in section.rows:
        texts, columns = [line.group] if section.group else [], iter(section.columns)
        for index, cell in enumerate(line.cells):
            spanned = [next(columns) for _ in range(cell.span)]
            texts.append(cell_text(cell, names_row=index == 0))
            room = sum(1 + bool(column.small) for column in spanned) - 1
            texts += [cell.small, *[""] * room][:room] if cell.span == 1 else [""] * room
        rows.append(texts)
    return rows


def cell_text(cell: Cell, *, names_row: bool) -> str:
    """Return a cell's text after its chip; what a chip adds to a row's name is in the notes."""
    return ": ".join(filter(None, [cell.chip.text if cell.chip and not names_row else "", cell.text]))


def shortened(rows: list[list[str]], ends: tuple[int, int] | None) -> Sequence[Sequence[str]]:
    """Return the rows from the top and from the bottom, with a line for those between; all where that is all."""
    if ends is None or len(rows) <= sum(ends):
        return rows
    first, last = ends
    return [*rows[:first], ["…", *[""] * (len(rows[0]) - 1)], *rows[len(rows) - last :]]


def plain(text: str) -> str:
    """Return text that stays text in Markdown."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")

"""Delimited text as people and spreadsheets write it: rows of cells, whatever stands between them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Literal

Row = tuple[int, list[str]]  # the line it ends on, from 1, and its cells without the white space around them

DELIMITERS = "\t;,|"
LARGEST_TABLE_BYTES = 256 << 20  # some ten million rows
SAMPLE = 1 << 16  # characters from which the delimiter is judged


Way = Callable[[], list[Row]]  # gives the rows that are not blank, or csv.Error


def ways(text: str) -> tuple[list[Way], list[Way]]:
    """Return the ways to read a text: by the delimiters that occur, the most even first, and at white space.

    At white space it has two columns, which the last one of a line parts, or the first. Excel's ``sep=;`` in the first
    line leaves one way.
    """
    if stated := re.match(r"sep=(.)\r?\n", text):
        return [partial(rows, text[stated.end() :], stated[1], above=1)], []
    sample = text[: text.rfind("\n", 0, SAMPLE) + 1 or None] if len(text) > SAMPLE else text
    even = {delimiter: evenness(sample, delimiter, csv.QUOTE_MINIMAL) for delimiter in DELIMITERS}
    if not any(even.values()):  # a quote that does not close may hide them
        even = {delimiter: evenness(sample, delimiter, csv.QUOTE_NONE) for delimiter in DELIMITERS}
    likely = sorted(filter(even.get, DELIMITERS), key=even.__getitem__, reverse=True)
    return [partial(rows, text, mark) for mark in likely], [
        partial(pairs, text, split) for split in (str.rsplit, str.split)
    ]


def rows(text: str, delimiter: str, *, above: int = 0) -> list[Row]:
    """Return the rows that are not blank; quoted cells may hold delimiters and line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    stripped = ((reader.line_num + above, [cell.strip() for cell in row]) for row in reader)
    return [(line, cells) for line, cells in stripped if any(cells)]


def pairs(text: str, split: Callable[..., list[str]]) -> list[Row]:
    """Return the two halves of each line that is not blank."""
    lines = enumerate(re.split("\r\n|\r|\n", text), 1)
    return [(number, split(line.strip(), None, 1)) for number, line in lines if line.strip()]


def evenness(text: str, delimiter: str, quoting: Literal[0, 3]) -> float:
    """Return the share of the rows that have the width, two or more, that most of those have."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        widths = [len(row) for row in reader if any(row)]
    except csv.Error:
        return 0.0
    frequencies = Counter(width for width in widths if width > 1)
    return max(frequencies.values(), default=0) / max(1, len(widths))


def column_word(title: str) -> str:
    """Return a column's title in small letters and digits alone, as titles are compared."""
    return "".join(letter for letter in title.casefold() if letter.isalnum())

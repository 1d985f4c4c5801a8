"""The teacher's answers as a CSV to tick: written for a spreadsheet, and read back from whatever one made of it."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from prgkit.config.delimited import LARGEST_TABLE_BYTES, ways
from prgkit.data.labels import hint, lookup
from prgkit.errors import ImagesError
from prgkit.storage.atomic import read_text, write_bytes
from prgkit.storage.documents import read_document
from prgkit.storage.run import Run

COLUMNS = ("number", "file", "key", "teacher", "confidence", "right", "class")
NEEDED = ("number", "key", "teacher", "right")
YES = frozenset({"y", "yes", "x", "1", "true", "right"})
NO = frozenset({"n", "no", "0", "false", "wrong"})
KEY = re.compile(r"[0-9a-f]{32}")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that starts so, and a file may be named anything


@dataclass(frozen=True)
class Tick:
    """An image with the teacher's answer, and what a person said of it."""

    number: int  # on the sheet, from 1
    file: str
    key: str  # of the image's content
    teacher: str  # a class name
    confidence: str  # percent, as it is shown
    right: bool | None = None  # None: not ticked
    named: str | None = None  # what it is, where the teacher is wrong and the person knows

    @property
    def truth(self) -> str | None:
        """The class the image is of, where that is known."""
        return self.teacher if self.right else self.named


def write_ticks(path: Path, ticks: Iterable[Tick]) -> None:
    """Write ``ticks`` as CSV, with the byte order mark without which Excel garbles every letter that is not ASCII."""
    text = "".join([",".join(COLUMNS) + "\r\n", *(csv_row(tick) + answer_cells(tick) for tick in ticks)])
    write_bytes(path, codecs.BOM_UTF8 + text.encode())


def csv_row(tick: Tick) -> str:
    """Return the cells that nobody edits: number, file, key, teacher, confidence."""
    return cells(str(tick.number), tick.file, tick.key, tick.teacher, tick.confidence)


def answer_cells(tick: Tick) -> str:
    """Return the cells that are ticked, with the end of the line."""
    right = "" if tick.right is None else "y" if tick.right else "n"
    return f",{right},{cells(tick.named or '')}\r\n"


def cells(*values: str) -> str:
    """Return values as CSV; one that a spreadsheet would run as a formula starts with an apostrophe."""
    line = io.StringIO()
    guarded = [f"'{value}" if value.startswith(FORMULA) else value for value in values]
    csv.writer(line).writerow(guarded)  # what it is to end a line with is what it quotes in a cell
    return "" if values == ("",) else line.getvalue().removesuffix("\r\n")


def read_ticks(path: Path, classes: Sequence[str]) -> list[Tick]:
    """Read a ticked CSV: comma, semicolon or tab, any line ends, columns in any order and more of them than needed.

    ``right`` takes y, yes, x, 1, true or right, and n, no, 0, false or wrong, in any case. A ``class`` in a row that is
    not ticked ticks it: the teacher is right if it is the teacher's answer, else wrong.

    Raises:
        ImagesError: the file is no such table, or a row has something that cannot stand there; names line and value.
    """
    rows = read_table(path)
    texts = {row[column] for _, row in rows for column in ("teacher", "class") if row[column]}
    class_of = {text: classes[index] for text, index in lookup(texts, classes).items() if isinstance(text, str)}
    ticks: dict[str, Tick] = {}
    for line, row in rows:
        tick = read_row(row, class_of, classes, where=f"{path}, line {line}")
        if (other := ticks.get(tick.key)) is not None:
            what = f"image {tick.number} is the same as image {other.number}: both have the key {tick.key}"
            raise ImagesError(what, where=f"{path}, line {line}", fix="keep one of the two rows")
        ticks[tick.key] = tick
    return list(ticks.values())


def read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return line number and cells by column name of every row that is not empty."""
    try:
        by_delimiter, at_spaces = ways(read_text(path, most_bytes=LARGEST_TABLE_BYTES))
        rows = [*by_delimiter, *at_spaces][0]()
    except ValueError as error:
        fix = 'save it from the sheet, or from a spreadsheet as "CSV UTF-8"'
        raise ImagesError(f"the ticks in {path.name} cannot be read: {error}", where=path, fix=fix) from error
    except csv.Error as error:
        raise ImagesError(f"{path.name} is no CSV: {error}", where=path, fix="prgkit audit writes a new one") from error
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if missing := [column for column in NEEDED if column not in header]:
        fix = f"its first line is to be {','.join(COLUMNS)}, as prgkit audit writes it"
        raise ImagesError(f"{path.name} has no column {', '.join(missing)}", where=path, fix=fix)
    blank = dict.fromkeys(COLUMNS, "")
    return [(line, {**blank, **dict(zip(header, map(without_guard, row), strict=False))}) for line, row in rows[1:]]


def without_guard(cell: str) -> str:
    """Take away the apostrophe that kept a spreadsheet from running the cell."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def read_row(row: Mapping[str, str], class_of: Mapping[str, str], classes: Sequence[str], *, where: str) -> Tick:
    """Return one row as a tick, or say what in it cannot stand there."""

    def refuse(what: str, fix: str) -> ImagesError:
        return ImagesError(what, where=where, fix=fix)

    number, key, verdict = row["number"], row["key"].lower(), row["right"].lower()
    if not (number.isascii() and number.isdecimal()):
        raise refuse(f"number is {number!r}", "write the image's number on the sheet")
    if not KEY.fullmatch(key):
        fix = "take the column from the file that prgkit audit wrote; a spreadsheet must treat it as text"
        raise refuse(f"key is {row['key']!r}, not 32 hex digits", fix)
    if verdict and verdict not in YES | NO:
        fix = "write y (or yes, x, 1, true, right), n (or no, 0, false, wrong), or nothing"
        raise refuse(f"right is {row['right']!r}, neither yes nor no", fix)
    for column in ("teacher", "class"):
        if (row[column] or column == "teacher") and row[column] not in class_of:
            known = classes if len(classes) <= 10 else [*classes[:3], "..."]
            fix = (
                "these ticks are of a run with other classes"
                if column == "teacher"
                else "write a class name, or nothing"
            )
            what = f"{column} is {row[column]!r}, which is no class{hint(row[column], classes)}"
            raise refuse(what, f"{fix}; the classes are {', '.join(known)}")
    teacher, named = class_of[row["teacher"]], class_of.get(row["class"])
    right = verdict in YES if verdict else None if named is None else named == teacher
    if named is not None and right != (named == teacher):
        word = "right" if right else "wrong"
        what = f"right is {row['right']!r} and class {named!r}: the teacher's {teacher!r} cannot be {word} then"
        raise refuse(what, "change one of the two")
    tick = Tick(int(number), row["file"], key, teacher, row["confidence"], right)
    return tick if right else replace(tick, named=named)


def ticked(ticks: Iterable[Tick]) -> list[Tick]:
    """Return those on which somebody said something."""
    return [tick for tick in ticks if tick.right is not None]


def carried(rows: Iterable[Tick], earlier: Iterable[Tick]) -> list[Tick]:
    """Return ``rows`` with what ``earlier`` ticks say of the same images, where that holds for the answers now."""
    known = {tick.key: tick for tick in ticked(earlier)}
    carried_rows = []
    for row in rows:
        old = known.get(row.key)
        if old is not None and old.truth is not None:
            right = old.truth == row.teacher
            row = replace(row, right=right, named=None if right else old.truth)
        elif old is not None and old.teacher == row.teacher:
            row = replace(row, right=old.right)
        carried_rows.append(row)
    return carried_rows


def set_aside(path: Path) -> Path:
    """Copy a file that is about to be replaced: to ``ticks-1.csv``, ``ticks-2.csv``, ..., which is returned."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    write_bytes(aside, path.read_bytes())
    return aside


def audited_keys(run: Run) -> frozenset[str]:
    """Return the content keys of the images on a run's sheet; none where there is no sheet."""
    sample = AuditSample.of(run)
    return frozenset(image.key for image in sample.images) if sample else frozenset()


def bring_ticks(source: Path, target: Path, classes: Sequence[str]) -> None:
    """Copy ticks to where they travel; ticks that are only there are kept, under another name if need be."""
    if not source.exists() or (target.exists() and target.read_bytes() == source.read_bytes()):
        return
    if target.exists():
        ours, theirs = ticks_in(source, classes), ticks_in(target, classes)
        if ours is not None and not ours and theirs:
            return  # ticked there and not here
        if ours is None or theirs is None or not theirs <= ours:
            set_aside(target)
    write_bytes(target, source.read_bytes())


def ticks_in(path: Path, classes: Sequence[str]) -> set[Tick] | None:
    """Return what was ticked in a file, or None where it cannot be read; whoever uses the ticks will say why."""
    try:
        return set(ticked(read_ticks(path, classes)))
    except ImagesError:
        return None


class AuditSample(BaseModel, frozen=True):
    """Which images are on a run's sheet: its sample.json."""

    schema_version: Literal["prgkit.audit/1"] = Field("prgkit.audit/1", alias="schema")
    made_from: str  # a fingerprint of the images and the teacher's answers
    drawn_from: int
    images: tuple[Tick, ...]

    @classmethod
    def of(cls, run: Run) -> AuditSample | None:
        """Return which images are on a run's sheet; None where there is no sheet.

        Raises:
            ImagesError: the file that says it is damaged, or of another version.
        """
        if not run.sample_file.exists():
            return None
        fix = f"move {run.ticks_file.parent} elsewhere, and draw anew: prgkit audit"
        what = "the sample of an audit"
        return read_document(run.sample_file, cls, "prgkit.audit/1", what=what, fix=fix, error=ImagesError)

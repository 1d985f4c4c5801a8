"""A table of labels, as people and tools export it: its columns are found by what is in them, or it is refused."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prgkit.config.delimited import LARGEST_TABLE_BYTES, Row, Way, ways
from prgkit.data.decode import image_suffixes
from prgkit.data.labels import NUMBER, as_numbers, by_name, first_of
from prgkit.data.path_match import Match, Paths
from prgkit.data.sources import Source
from prgkit.errors import ImagesError, nearest, some
from prgkit.progress import silent
from prgkit.storage.atomic import as_on_disk, read_text

if TYPE_CHECKING:
    from prgkit.config.recipe import LabelFormat

# What a column is called, in small letters and digits alone; the second are words that others use for other things.
FILE_WORDS = frozenset({
    "file", "files", "filename", "filenames", "filepath", "filepaths", "image", "images", "imagefile",
    "imagefilename", "imagename", "imagepath", "imageid", "img", "imgname", "imgpath", "imgid", "path", "paths",
    "relativepath", "relpath", "picture", "photo", "fname",
})  # fmt: skip
WEAK_FILE_WORDS = frozenset({"id", "ids", "name", "key", "uri", "sample"})
LABEL_WORDS = frozenset({
    "label", "labels", "labelname", "labelid", "class", "classes", "classname", "classlabel", "classid",
    "classindex", "classidx", "category", "categories", "categoryname", "categoryid", "target", "targets",
    "species", "breed", "variety", "truth", "groundtruth", "gt", "tag", "tags", "y",
})  # fmt: skip
MARKED = frozenset({"1", "1.0", "true"})
UNMARKED = frozenset({"0", "0.0", "false", ""})
GIVE_ROWS = "give a CSV file of file,label rows"
# How strongly a column says that it holds the labels.
SAID, NAMES, NUMBERS, WORDS, ANY = 4, 3, 2, 1, 0


class Entry(NamedTuple):
    """A row that names an image."""

    image: int  # its index
    line: int
    cells: Sequence[str]


class Reading(NamedTuple):
    """One way to read the labels."""

    title: str
    labels: Sequence[str]  # [entries]
    meaning: Sequence[object]  # [entries], the class index, or the label itself where it is no class's name
    strength: int
    counted: Sequence[int | None] | None = (
        None  # [entries], the classes of labels that are numbers such as classes have
    )
    from_marks: bool = False


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table that name images of a source; which column holds the labels is known with the class names."""

    path: Path
    header: Sequence[str]  # empty where there is none
    file_column: int
    entries: Sequence[Entry]
    strangers: Sequence[Row]  # rows that name no image here
    elsewhere: str  # a file whose folder is none of this source's, while it has the name of an image; empty: none
    asked: int | None  # the label column, where the recipe names it

    def labels(self, class_names: Sequence[str], *, note: Callable[[str], None] = silent) -> dict[int, str]:
        """Return the label of each image that has one, and say how the table is read.

        Raises:
            ImagesError: it is not certain which column holds them, or an image has two.
        """
        reading = self._column(self.asked) if self.asked is not None else self._likeliest(class_names)
        found = self._by_image(reading.labels)
        if len(self.contents) > 1 and self.asked is None:
            note(f"{self.path.name}: images by {self.title(self.file_column)}, labels by {reading.title}")
        if self.elsewhere:
            note(f"{self.path.name}: {self.elsewhere!r} is taken for an image here, whose folder has another name")
        if self.strangers:
            line, cells = self.strangers[0]
            count = "1 row names" if len(self.strangers) == 1 else f"{len(self.strangers):,} rows name"
            note(f"{count} no image here, e.g. {cell_of(cells, self.file_column)!r} ({self.path.name}, line {line})")
        return found

    @cached_property
    def plain_labels(self) -> dict[int, str]:
        """The labels as far as they are known without the class names: of the only column, or of the one that says so.

        Raises:
            ImagesError: an image has two.
        """
        said = [column for column in self.contents if self._is_said(column)]
        only = next((found for found in (said, list(self.contents)) if len(found) == 1), [])
        column = self.asked if self.asked is not None else next(iter(only), None)
        return {} if column is None else self._by_image(self._column(column).labels)

    @cached_property
    def contents(self) -> dict[int, frozenset[str]]:
        """The distinct cells of every column that could hold labels, small letters throughout where they are marks."""
        width = max(len(entry.cells) for entry in self.entries)
        columns = [column for column in range(width) if column != self.file_column]
        found = {column: frozenset(cell_of(entry.cells, column) for entry in self.entries) for column in columns}
        return {column: cells for column, cells in found.items() if cells != {""}}

    def title(self, column: int) -> str:
        """Return what people call a column: its name, else its number."""
        name = cell_of(self.header, column)
        return f"column {name!r}" if name else f"column {column + 1}"

    def _is_said(self, column: int) -> bool:
        return word(cell_of(self.header, column)) in LABEL_WORDS

    def _by_image(self, labels: Sequence[str]) -> dict[int, str]:
        found: dict[int, str] = {}
        for entry, label in zip(self.entries, labels, strict=True):
            if label and found.setdefault(entry.image, label) != label:
                file = cell_of(entry.cells, self.file_column)
                what = f"{file!r} is labelled {found[entry.image]!r} and {label!r}"
                raise ImagesError(what, where=f"{self.path}, line {entry.line}", fix="keep one of the two rows")
        return found

    def _column(self, column: int, class_names: Sequence[str] = ()) -> Reading:
        """Read the labels from one column."""
        distinct = self.contents.get(column, frozenset()) - {""}
        indices = by_name(distinct, class_names)
        labels = [cell_of(entry.cells, column) for entry in self.entries]
        named = 2 * sum(label in indices for label in labels) > sum(map(bool, labels))
        said, numbers = self._is_said(column), all(map(NUMBER.fullmatch, distinct))
        strength = (SAID if said else NAMES) if named else (NUMBERS if numbers else WORDS) if said else ANY
        meaning = [indices.get(label, label) for label in labels]
        return Reading(self.title(column), labels, meaning, strength, counted(labels, len(class_names)))

    def _likeliest(self, class_names: Sequence[str]) -> Reading:
        """Return the one way to read the labels that is certain, or refuse."""
        titles = {cell_of(self.header, column): column for column in self.contents}
        classes = {titles[str(title)]: index for title, index in by_name(titles, class_names).items()}
        figures = {column: index for column, index in classes.items() if all(map(is_figure, self.contents[column]))}
        marks = {column: index for column, index in figures.items() if is_marks(self.contents[column])}
        ways = [self._column(column, class_names) for column in self.contents if column not in figures]
        said = any(way.strength == SAID for way in ways)
        wrong = self._not_one(marks)
        if marks and wrong and not said:
            raise self._badly_marked(marks, wrong)
        if marks and not wrong and not (said and len(marks) == 1):  # one alone can be a flag: train, not test
            ways.append(self._marked(marks, class_names))
        if len(figures) > len(marks) and all(way.strength == ANY for way in ways):
            raise self._scored(sorted(set(figures) - set(marks)))
        best = max(ways, key=lambda way: way.strength, default=None)
        if best is None or (best.strength == ANY and len(ways) > 1):
            raise self._unsure(ways)
        rivals = [way for way in ways if way is not best and contradicts(way, best)]
        if rivals:
            raise self._unsure([best, *rivals])
        return best

    def _not_one(self, marks: Iterable[int]) -> list[Entry]:
        """Return the rows in which not exactly one class is marked."""
        columns = list(marks)
        return [
            entry
            for entry in self.entries
            if sum(cell_of(entry.cells, column).lower() in MARKED for column in columns) != 1
        ]

    def _marked(self, marks: dict[int, int], class_names: Sequence[str]) -> Reading:
        """Read a one-hot table: the label is the name of the column with the mark."""
        meaning = [
            next(index for column, index in marks.items() if cell_of(entry.cells, column).lower() in MARKED)
            for entry in self.entries
        ]
        labels = [class_names[index] for index in meaning]
        return Reading("the names of the columns with a 1", labels, meaning, NAMES, from_marks=True)

    def _badly_marked(self, marks: dict[int, int], wrong: Sequence[Entry]) -> ImagesError:
        files = some([cell_of(entry.cells, self.file_column) for entry in wrong])
        others = [
            self.title(column) for column, cells in self.contents.items() if column not in marks and is_marks(cells)
        ]
        hint = f"; {some(others)} {'is' if len(others) == 1 else 'are'} no class" if others else ""
        what = f"{len(wrong)} of {len(self.entries)} rows have not exactly one class marked with 1: {files}{hint}"
        return ImagesError(what, where=f"{self.path}, line {wrong[0].line}", fix="mark one class in each row")

    def _scored(self, columns: Sequence[int]) -> ImagesError:
        titles = some([self.title(column) for column in columns])
        what = f"{self.path.name} holds scores, not labels: {titles} {'is' if len(columns) == 1 else 'are'} of figures"
        fix = "give one label for each image, or mark its class with 1 and the others with 0"
        return ImagesError(what, where=self.path, fix=fix)

    def _unsure(self, ways: Sequence[Reading]) -> ImagesError:
        """Build the error for labels that could be read in several ways, or in none, with the first rows."""
        first = self.entries[:3]
        rows = [",".join(self.header)] if self.header else []
        rows += [",".join(entry.cells) for entry in first]
        told = [f"\n    {row[:160]}" for row in rows]
        for way in ways[:4]:
            pairs = zip(first, way.labels, strict=False)
            read = ", ".join(f"{cell_of(entry.cells, self.file_column)} is {label!r}" for entry, label in pairs)
            told.append(f"\n    by {way.title}: {read}")
        return ImagesError(
            f"which column of {self.path.name} holds the labels is not certain:{''.join(told)}",
            where=self.path,
            fix="name it: --set data.label_format.label_column=NAME, or its number, counted from 1",
        )


def contradicts(other: Reading, best: Reading) -> bool:
    """Tell whether a weaker or equal way to read the labels is a reason to doubt the best."""
    if other.strength == best.strength or other.from_marks:
        return other.meaning != best.meaning
    some_named = any(isinstance(one, int) for one in other.meaning)
    if best.strength == NAMES and not best.from_marks:  # a class's name can also be a word for something else
        agrees = other.counted is not None and list(other.counted) == list(best.meaning)
        return not agrees and (other.strength > ANY or other.counted is not None or some_named)
    return best.strength == NUMBERS and other.strength == WORDS and some_named


def counted(labels: Sequence[str], count: int) -> list[int | None] | None:
    """Return the classes that numbers mean, each None where they do not say it; None where they are no such numbers."""
    numbers = as_numbers(set(labels) - {""})
    if not numbers or max(numbers.values()) > count:
        return None
    first = first_of(set(numbers.values()), count)
    return [numbers[label] - first if label and first is not None else None for label in labels]


def read_label_table(path: Path, spec: str, source: Source, label_format: LabelFormat | None = None) -> LabelTable:
    """Read the rows of a table that name images of the source ``spec``.

    Rows for images that are not there are passed over: a table may cover more than this source.

    Raises:
        ImagesError: the table is missing, not a table, ambiguous, contradicts itself, or names none of the images.
    """
    paths = Paths(spec, [source.name(index) for index in range(len(source))])
    asked = (label_format.image_column, label_format.label_column) if label_format is not None else (None, None)
    by_delimiter, at_spaces = read_ways(path)
    table, rows = most_named(path, by_delimiter, paths, asked)
    if table is None:
        table, _ = most_named(path, at_spaces, paths, asked)
    if table is None:
        raise none_named(path, rows or (at_spaces[0]() if at_spaces else []), source, asked)
    narrow = next((entry for entry in table.entries if len(entry.cells) < 2), None)
    if narrow is not None:
        what, fix = f"{path.name} has a row without a label column", "write two columns: file,label"
        raise ImagesError(what, where=f"{path}, line {narrow.line}", fix=fix)
    _ = table.plain_labels  # says now what contradicts itself in any case
    return table


def read_ways(path: Path) -> tuple[list[Way], list[Way]]:
    """Return the ways to read a table, as `prgkit.config.delimited.ways` does."""
    try:
        text = read_text(as_on_disk(path), most_bytes=LARGEST_TABLE_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"the labels in {path.name} cannot be read: {reason}"
        raise ImagesError(what, where=path, fix=GIVE_ROWS) from error
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or re.match(r'\s*(\{\s*"|\[\s*[\[{"])', text):
        raise ImagesError(f"{path.name} is a JSON file, and no table of labels", where=path, fix=GIVE_ROWS)
    return ways(text)


def most_named(
    path: Path, found: Sequence[Way], paths: Paths, asked: tuple[str | None, str | None]
) -> tuple[LabelTable | None, Sequence[Row]]:
    """Return the table whose rows name most images, if any does, and the rows of the likeliest way to read it."""
    best: LabelTable | None = None
    likeliest: Sequence[Row] | None = None
    for way in found:
        try:
            rows = way()
        except csv.Error as error:
            if likeliest is not None:
                continue
            raise ImagesError(f"{path.name} is no CSV file: {error}", where=path, fix=GIVE_ROWS) from error
        likeliest = rows if likeliest is None else likeliest
        table = arranged(path, rows, paths, *asked)
        if table is not None and (best is None or len(table.entries) > len(best.entries)):
            best = table
        if best is not None and not best.strangers:
            break
    return best, likeliest or []


def arranged(
    path: Path, rows: Sequence[Row], paths: Paths, image_column: str | None, label_column: str | None
) -> LabelTable | None:
    """Find the header and the column of files, and whose row is whose; None where no row names an image."""
    named = {name for name in (image_column, label_column) if name}
    header, body = parted(rows, named)
    width = max((len(cells) for _, cells in body), default=0)
    if any(place_of(name, header, width) is None for name in named):
        return None
    asked = place_of(image_column, header, width) if image_column else None
    columns = range(width) if asked is None else [asked]
    found = {column: [(line, paths.find(cell_of(cells, column))) for line, cells in body] for column in columns}
    column = file_column(path, header, found, body)
    if column is None:
        return None
    matches = [match for _, match in found[column]]
    if not header:  # its first row, where that cannot be a picture that is not here
        header, start = untitled_header(body, matches, column)
        body, matches = body[start:], matches[start:]
    labels = place_of(label_column, header, width) if label_column else None
    return with_rows(path, header, column, body, matches, paths, labels)


def parted(rows: Sequence[Row], named: set[str]) -> tuple[Sequence[str], Sequence[Row]]:
    """Return the header, where its words say that it is one, and the rows below it; only comments may be above it."""
    for place, (_, cells) in enumerate(rows):
        titles = [cells[0].lstrip("# "), *cells[1:]]
        words = [word(title) for title in titles]
        files = [number for number, one in enumerate(words) if one in FILE_WORDS | WEAK_FILE_WORDS]
        labels = [number for number, one in enumerate(words) if one in LABEL_WORDS]
        if (files and labels) or named.intersection(titles):
            return titles, rows[place + 1 :]
        if not cells[0].startswith("#"):
            break
    return (), rows


def place_of(name: str, header: Sequence[str], width: int) -> int | None:
    """Return the column of a name, or of a number that counts from 1."""
    if name in header:
        return list(header).index(name)
    return int(name) - 1 if name.isdecimal() and 0 < int(name) <= width else None


def file_column(
    path: Path, header: Sequence[str], found: Mapping[int, Sequence[tuple[int, Match | None]]], body: Sequence[Row]
) -> int | None:
    """Return the column whose cells name images, told from others that do by its header, or by what is in it."""
    named = {column: [match for _, match in matches if match] for column, matches in found.items()}
    most = max(map(len, named.values()), default=0)
    columns = [column for column, matches in named.items() if most and 2 * len(matches) >= most]
    rules: list[Callable[[int], bool]] = [
        lambda column: all(len(match.images) == 1 for match in named[column]),
        lambda column: word(cell_of(header, column)) in FILE_WORDS,
        lambda column: word(cell_of(header, column)) in WEAK_FILE_WORDS,
        lambda column: all(match.spelled for match in named[column]),
        lambda column: len({match.images[0] for match in named[column]}) == len(named[column]),
    ]
    for rule in rules:
        columns = list(filter(rule, columns)) or columns
    columns.sort(key=lambda column: -len(named[column]))
    pairs = (pair for column in columns[1:] for pair in zip(found[columns[0]], found[column], strict=True))
    if any(ours and theirs and ours.images != theirs.images for (_, ours), (_, theirs) in pairs):
        rows = "".join(f"\n    {','.join(cells)[:160]}" for _, cells in body[:3])
        what = f"which column of {path.name} names the images is not certain:{rows}"
        fix = "name it: --set data.label_format.image_column=NAME, or its number, counted from 1"
        raise ImagesError(what, where=path, fix=fix)
    return columns[0] if columns else None


def untitled_header(body: Sequence[Row], matches: Sequence[Match | None], column: int) -> tuple[Sequence[str], int]:
    """Return the first row that is no comment as a header, and where the rows begin: it names no picture at all."""
    for place, ((_, cells), match) in enumerate(zip(body, matches, strict=True)):
        if match is None and cells[0].startswith("#"):
            continue
        suffix = os.path.splitext(cell_of(cells, column))[1].lower()
        if match is None and suffix not in image_suffixes():
            return cells, place + 1
        break
    return (), 0


def with_rows(
    path: Path,
    header: Sequence[str],
    column: int,
    body: Sequence[Row],
    matches: Sequence[Match | None],
    paths: Paths,
    asked: int | None,
) -> LabelTable:
    """Give each image its rows: where several folders have an image of its name, those that name its own."""
    best: dict[int, tuple[bool, int]] = {}
    for (line, cells), match in zip(body, matches, strict=True):
        if match is not None and len(match.images) > 1:
            names = some([paths.names[index] for index in match.images])
            what = f"{cell_of(cells, column)!r} could be any of {names}"
            raise ImagesError(what, where=f"{path}, line {line}", fix="write the whole path")
        if match is not None:
            best[match.images[0]] = max(best.get(match.images[0], (False, 0)), rank(match))
    entries: list[Entry] = []
    strangers: list[Row] = []
    elsewhere = ""
    for (line, cells), match in zip(body, matches, strict=True):
        if match is not None and rank(match) == best[match.images[0]]:
            entries.append(Entry(match.images[0], line, cells))
            elsewhere = elsewhere or (cell_of(cells, column) if match.elsewhere else "")
        elif match is not None or not cells[0].startswith("#"):
            strangers.append((line, cells))
    return LabelTable(path, header, column, entries, strangers, elsewhere, asked)


def rank(match: Match) -> tuple[bool, int]:
    """Return how surely a path names its image: wholly, or by how much of it."""
    return match.whole, 0 if match.whole else match.depth


def none_named(path: Path, rows: Sequence[Row], source: Source, asked: tuple[str | None, str | None]) -> ImagesError:
    """Build the error for a table of which no row names an image."""
    header, body = parted(rows, set())
    cells = header or (rows[0][1] if rows else [])
    for name in asked:
        if name and place_of(name, cells, len(cells)) is None:
            what = f"{path.name} has no column {name!r}{nearest(name, cells)}"
            return ImagesError(what, where=path, fix=f"its columns are {some(cells)}")
    seen = [cell for _, row in body[:2] for cell in row]  # the first can be a header
    pictures = [cell for cell in seen if os.path.splitext(cell)[1].lower() in image_suffixes()]
    named = repr([*pictures, *seen][0]) if seen else "nothing"
    return ImagesError(
        f"no row of {path.name} names an image: it has {named}, the images {source.name(0)!r}",
        where=path,
        fix="write paths relative to the images, as in: folder/picture.jpg,label",
    )


def cell_of(cells: Sequence[str], column: int) -> str:
    """Return a cell, empty where the row is shorter."""
    return cells[column] if column < len(cells) else ""


def word(title: str) -> str:
    """Return a column's name in small letters and digits alone."""
    return "".join(letter for letter in title.casefold() if letter.isalnum())


def is_marks(cells: Iterable[str]) -> bool:
    """Tell whether all cells are 0 or 1, as one-hot tables write them."""
    return all(cell.lower() in MARKED | UNMARKED for cell in cells)


def is_figure(cell: str) -> bool:
    """Tell whether a cell is a number, a mark or empty."""
    try:
        float(cell)
    except ValueError:
        return cell.lower() in MARKED | UNMARKED
    return True

"""A table of labels, as people and tools export it: its columns are found by what is in them, or it is refused."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prgkit.config.delimited import LARGEST_TABLE_BYTES, Row, Way, column_word, ways
from prgkit.config.sections import ImageSpec, LabelFormat
from prgkit.data.decode import image_suffixes
from prgkit.data.files import Source, printable
from prgkit.data.labels import LABEL_WORDS, Entry, LabelTable, cell_of
from prgkit.data.ticks import NEEDED, YES, without_guard
from prgkit.errors import ImagesError, nearest, some
from prgkit.storage.atomic import as_on_disk, read_text

# What a column is called, in small letters and digits alone; the second are words that others use for other things.
FILE_WORDS = frozenset({
    "file", "files", "filename", "filenames", "filepath", "filepaths", "image", "images", "imagefile",
    "imagefilename", "imagename", "imagepath", "imageid", "img", "imgname", "imgpath", "imgid", "path", "paths",
    "relativepath", "relpath", "picture", "photo", "fname",
})  # fmt: skip
WEAK_FILE_WORDS = frozenset({"id", "ids", "name", "key", "uri", "sample"})
GIVE_ROWS = "give a CSV file of file,label rows"
SPLITS = {"train": 0, "training": 0, "test": 1, "testing": 1, "val": 2, "valid": 2, "validation": 2, "dev": 3}
UPLOADED = re.compile(r"(^|[/\\])(?!(?:19|20)\d{6})[0-9a-f]{8}-(?=[^/\\]+$)")  # Label Studio's, and not a date
Index = dict[str, list[int]]


def read_label_table(path: Path, spec: ImageSpec, source: Source) -> LabelTable:
    """Read the rows of the table at ``path`` that name images of the source.

    Rows for images that are not there are passed over: a table may cover more than this source.

    Raises:
        ImagesError: the table is missing, not a table, ambiguous, contradicts itself, or names none of the images.
    """
    paths = Paths(spec.source, [source.name(index) for index in range(len(source))])
    by_delimiter, at_spaces = read_ways(path)
    if told := labels_of_sheet(path, by_delimiter):
        sheet, _ = most_named(path, [lambda: told], paths, LabelFormat())
        if sheet is not None:
            return replace(sheet, is_sheet=True)
    table, rows = most_named(path, by_delimiter, paths, spec.label_format)
    if table is None:
        table, _ = most_named(path, at_spaces, paths, spec.label_format)
    if table is None:
        raise none_named(path, rows or (at_spaces[0]() if at_spaces else []), source, spec.label_format)
    narrow = next((entry for entry in table.entries if len(entry.cells) < 2), None)
    if narrow is not None:
        what, fix = f"{path.name} has a row without a label column", "write two columns: file,label"
        raise ImagesError(what, where=f"{path}, line {narrow.line}", fix=fix)
    table.check()
    return table


def labels_of_sheet(path: Path, ways: Sequence[Way]) -> list[Row]:
    """Return file,label rows of a sheet that audit or suggest-labels wrote, of what is ticked; none of another table.

    Raises:
        ImagesError: nothing is ticked.
    """
    try:
        rows = ways[0]() if ways else []
    except csv.Error:
        return []
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if not {*NEEDED, "file"} <= set(header):
        return []
    told = [(rows[0][0], ["file", "label"])]
    for line, cells in rows[1:]:
        row = {"class": "", **dict(zip(header, map(without_guard, cells), strict=False))}
        label = row["teacher"] if row.get("right", "").lower() in YES else row["class"]
        if label:
            told.append((line, [row["file"], label]))
    if len(told) == 1:
        fix = "tick some images on the sheet beside it, and put the file that it saves in its place"
        raise ImagesError(f"nothing is ticked in {path.name}", where=path, fix=fix)
    return told


def read_ways(path: Path) -> tuple[list[Way], list[Way]]:
    """Return the ways to read a table, as `prgkit.config.delimited.ways` does."""
    try:
        text = read_text(as_on_disk(path), most_bytes=LARGEST_TABLE_BYTES)
    except (OSError, ValueError) as error:  # OSError: a name that is too long, a folder that may not be looked into
        what = f"the labels in {path.name} cannot be read: {getattr(error, 'strerror', error)}"
        raise ImagesError(what, where=path, fix=GIVE_ROWS) from error
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or re.match(r'\s*(\{\s*"|\[\s*[\[{"])', text):
        raise ImagesError(f"{path.name} is a JSON file, and no table of labels", where=path, fix=GIVE_ROWS)
    return ways(text)


def most_named(
    path: Path, ways: Sequence[Way], paths: Paths, label_format: LabelFormat
) -> tuple[LabelTable | None, Sequence[Row]]:
    """Return the table whose rows name most images, if any does, and the rows of the likeliest way to read it."""
    best: LabelTable | None = None
    likeliest: Sequence[Row] | None = None
    for way in ways:
        try:
            rows = way()
        except csv.Error as error:
            if likeliest is not None:
                continue
            raise ImagesError(f"{path.name} is no CSV file: {error}", where=path, fix=GIVE_ROWS) from error
        likeliest = rows if likeliest is None else likeliest
        table = arranged(path, rows, paths, label_format)
        if table is not None and (best is None or len(table.entries) > len(best.entries)):
            best = table
        if best is not None and not best.unmatched:
            break
    return best, likeliest or []


def arranged(path: Path, rows: Sequence[Row], paths: Paths, label_format: LabelFormat) -> LabelTable | None:
    """Find the header and the column of files, and whose row is whose; None where no row names an image."""
    image_column, label_column = label_format.image_column, label_format.label_column
    named = {name for name in (image_column, label_column) if name}
    header, body = parted(rows, named)
    width = max((len(cells) for _, cells in body), default=0)
    if any(place_of(name, header, width) is None for name in named):
        return None
    given = place_of(image_column, header, width) if image_column else None
    columns = range(width) if given is None else [given]
    by_column = {column: [paths.find(cell_of(cells, column)) for _, cells in body] for column in columns}
    column = file_column(path, header, by_column, body)
    if column is None:
        return None
    matches = by_column[column]
    if not header:  # its first row, where that cannot be a picture that is not here
        header, start = untitled_header(body, matches, column)
        body, matches = body[start:], matches[start:]
    best = best_ranks(path, column, body, matches, paths)
    entries = [
        (Entry(match.images[0], line, cells), match.elsewhere)
        for (line, cells), match in zip(body, matches, strict=True)
        if match is not None and rank(match) == best[match.images[0]]
    ]
    return LabelTable(
        path=path,
        header=header,
        file_column=column,
        entries=[entry for entry, _ in entries],
        unmatched=[
            row
            for row, match in zip(body, matches, strict=True)
            if (rank(match) != best[match.images[0]] if match is not None else not row[1][0].startswith("#"))
        ],
        elsewhere=next((cell_of(entry.cells, column) for entry, elsewhere in entries if elsewhere), ""),
        label_column=place_of(label_column, header, width) if label_column else None,
    )


def parted(rows: Sequence[Row], named: set[str]) -> tuple[Sequence[str], Sequence[Row]]:
    """Return the header, where its words say that it is one, and the rows below it; only comments may be above it."""
    for place, (_, cells) in enumerate(rows):
        titles = [cells[0].lstrip("# "), *cells[1:]]
        words = [column_word(title) for title in titles]
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
    path: Path, header: Sequence[str], by_column: Mapping[int, Sequence[Match | None]], body: Sequence[Row]
) -> int | None:
    """Return the column whose cells name images, told from others that do by its header, or by what is in it."""
    named = {column: [match for match in matches if match] for column, matches in by_column.items()}
    most = max(map(len, named.values()), default=0)
    columns = [column for column, matches in named.items() if most and 2 * len(matches) >= most]
    rules: list[Callable[[int], bool]] = [
        lambda column: all(len(match.images) == 1 for match in named[column]),
        lambda column: column_word(cell_of(header, column)) in FILE_WORDS,
        lambda column: column_word(cell_of(header, column)) in WEAK_FILE_WORDS,
        lambda column: all(match.spelled for match in named[column]),
        lambda column: len({match.images[0] for match in named[column]}) == len(named[column]),
    ]
    for rule in rules:
        columns = list(filter(rule, columns)) or columns
    columns.sort(key=lambda column: -len(named[column]))
    pairs = (pair for column in columns[1:] for pair in zip(by_column[columns[0]], by_column[column], strict=True))
    if any(ours and theirs and ours.images != theirs.images for ours, theirs in pairs):
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


def best_ranks(
    path: Path, column: int, body: Sequence[Row], matches: Sequence[Match | None], paths: Paths
) -> dict[int, tuple[bool, int]]:
    """Return how surely an image is named by the row that does it best: in other folders may be more of its name."""
    best: dict[int, tuple[bool, int]] = {}
    for (line, cells), match in zip(body, matches, strict=True):
        if match is not None and len(match.images) > 1:
            names = some([paths.names[index] for index in match.images])
            what = f"{cell_of(cells, column)!r} could be any of {names}"
            raise ImagesError(what, where=f"{path}, line {line}", fix="write the whole path")
        if match is not None:
            best[match.images[0]] = max(best.get(match.images[0], (False, 0)), rank(match))
    return best


def rank(match: Match) -> tuple[bool, int]:
    """Return how surely a path names its image: wholly, or by how much of it."""
    return match.whole, 0 if match.whole else match.depth


def none_named(path: Path, rows: Sequence[Row], source: Source, label_format: LabelFormat) -> ImagesError:
    """Build the error for a table of which no row names an image."""
    header, body = parted(rows, set())
    cells = header or (rows[0][1] if rows else [])
    for name in (label_format.image_column, label_format.label_column):
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


class Match(NamedTuple):
    """The images that a path could mean; more than one where it does not say."""

    images: list[int]
    depth: int  # how many parts of the path agree, from its end
    whole: bool  # all of them
    elsewhere: bool  # it names a folder, and it is not the folder that the images lie in
    spelled: bool  # with its suffix


class Paths:
    """The paths of a source's images; one in a table means an image if it is the end of its path, or it its end.

    So a base name does, a path from above the source, and one on another machine; a suffix may be missing, separators
    may be Windows', and small letters stand for capitals where nothing else fits.
    """

    def __init__(self, spec: str, names: Sequence[str]) -> None:
        root = printable(os.path.abspath(os.path.expandvars(os.path.expanduser(spec)))).replace(os.sep, "/")
        above, suffix = os.path.splitext(root)
        self.names = names
        inside = [name.partition(".tar/") for name in names]  # shard, ".tar/", member
        self._own = ["/".join(parts(member or shard)) for shard, _, member in inside]
        self._shards = [f"{shard}.tar" if member else "" for shard, _, member in inside]
        self._root = parts(os.path.dirname(root) if suffix == ".tar" else above if suffix == ".zip" else root)
        last = {path.rpartition("/")[2].casefold() for path in self._own}
        self._last = last | {os.path.splitext(name)[0] for name in last}  # tells at once what none of them can be
        self._wholes: dict[tuple[bool, bool], Index] = {}
        self._ends: dict[tuple[int, bool, bool], Index] = {}
        self._found: dict[str, Match | None] = {}

    def find(self, text: str) -> Match | None:
        """Return what a path means here, if anything."""
        if text not in self._found:
            self._found[text] = self._search(printable(text))
        return self._found[text]

    def _search(self, text: str) -> Match | None:
        both = dict.fromkeys((text, text.replace("\\", "/")))
        spellings = [one for one in both if one.rpartition("/")[2].casefold() in self._last]
        for fold in (False, True):
            for bare in (False, True):
                for spelling in spellings:
                    if match := self._match(parts(spelling.casefold() if fold else spelling), fold, bare):
                        return match
        inner = UPLOADED.sub(r"\1", text)
        match = self._search(inner) if inner != text else None
        return match if match and len(match.images) == 1 else None

    def _match(self, path: list[str], fold: bool, bare: bool) -> Match | None:
        count, wholes = len(path), self._whole(fold, bare)
        if not path:
            return None
        if same := wholes.get("/".join(path)):
            return Match(same, count, True, False, not bare)
        ranked = [(count, index) for index in self._ending(count, fold, bare).get("/".join(path), [])]
        for depth in range(1, count):
            for index in wholes.get("/".join(path[-depth:]), []):
                if (above := self._agreeing(path[:-depth], index, fold)) is not None:
                    ranked.append((depth + above, index))
        if not ranked:
            return None
        most = max(depth for depth, _ in ranked)
        images = [index for depth, index in ranked if depth == most]
        own = self._own[images[0]].count("/") + 1
        return Match(images, most, most == count, own <= most < count and most == own, not bare)

    def _agreeing(self, above: list[str], index: int, fold: bool) -> int | None:
        """Count the folders above an image that agree, from its side; None where one is train and the other test."""
        folders = [*self._root, *filter(None, [self._shards[index]])]
        if fold:
            folders = [folder.casefold() for folder in folders]
        count = 0
        for theirs, ours in zip(reversed(above), reversed(folders), strict=False):
            if theirs not in (ours, f"{ours}.zip"):
                splits = SPLITS.get(theirs.casefold()), SPLITS.get(ours.casefold())
                return None if None not in splits and splits[0] != splits[1] else count
            count += 1
        return count

    def _whole(self, fold: bool, bare: bool) -> Index:
        """Return the images by their whole path below the source."""
        if (fold, bare) not in self._wholes:
            self._wholes[fold, bare] = indexed(enumerate(spelled(path, fold, bare) for path in self._own))
        return self._wholes[fold, bare]

    def _ending(self, count: int, fold: bool, bare: bool) -> Index:
        """Return the images that lie deeper by the last ``count`` parts of their path."""
        if (count, fold, bare) not in self._ends:
            deeper = ((index, path) for index, path in enumerate(self._own) if path.count("/") >= count)
            ends = ((index, "/".join(spelled(path, fold, bare).split("/")[-count:])) for index, path in deeper)
            self._ends[count, fold, bare] = indexed(ends)
        return self._ends[count, fold, bare]


def parts(path: str) -> list[str]:
    """Split a path at its slashes, without what leads nowhere and without steps up at its start."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    while parts and parts[0] == "..":
        del parts[0]
    return parts


def spelled(path: str, fold: bool, bare: bool) -> str:
    """Return a path without its suffix, in small letters, or as it is."""
    path = os.path.splitext(path)[0] if bare else path
    return path.casefold() if fold else path


def indexed(pairs: Iterable[tuple[int, str]]) -> Index:
    """Collect the numbers of each text."""
    indices: Index = {}
    for index, text in pairs:
        indices.setdefault(text, []).append(index)
    return indices

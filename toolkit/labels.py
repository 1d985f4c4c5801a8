"""Labels of evaluation images: read from a CSV, matched with the class names; training never comes here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ImagesError, nearest
from prgkit.files import read_text
from prgkit.prompts import canonical
from prgkit.sources import Source

FILE_HEADERS = frozenset({"file", "filename", "file_name", "image", "path", "name"})
LABEL_HEADERS = frozenset({"label", "class", "category", "class_name"})
LARGEST_TABLE_BYTES = 256 << 20  # some ten million rows
WORDNET_ID = re.compile(r"n\d{8}")


def read_label_table(path: Path, source: Source) -> dict[int, str]:
    """Read ``file,label`` rows, with or without a header, into labels by image index.

    A file is named by its path below the source or, where only one image has it, by its base name. Rows for images
    that are not there are passed over: a table may cover more than this source.

    Raises:
        ImagesError: the table is missing, not a table, ambiguous, contradicts itself, or names none of the images.
    """
    rows = read_rows(path)
    indices = index_by_name(source)
    found: dict[int, str] = {}
    for line, file, label in rows:
        matches = indices.get(file.replace("\\", "/").removeprefix("./"), [])
        if len(matches) > 1:
            what = f"{file!r} could be any of {some([source.name(index) for index in matches])}"
            raise ImagesError(what, where=f"{path}, line {line}", fix="write the whole path")
        for index in matches:
            if found.setdefault(index, label) != label:
                what = f"{file!r} is labelled {found[index]!r} and {label!r}"
                raise ImagesError(what, where=f"{path}, line {line}", fix="keep one of the two rows")
    if not found:
        named = f"{rows[0][1]!r}" if rows else "nothing"
        raise ImagesError(
            f"no row of {path.name} names an image: it has {named}, the images {source.name(0)!r}",
            where=path,
            fix="write paths relative to the images, as in: folder/picture.jpg,label",
        )
    return found


def read_rows(path: Path) -> list[tuple[int, str, str]]:
    """Return line number, file and label of every row that has both."""
    try:
        text = read_text(path, most_bytes=LARGEST_TABLE_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"the labels in {path.name} cannot be read: {reason}"
        raise ImagesError(what, where=path, fix="give a CSV file of file,label rows") from error
    lines = text.splitlines()
    delimiter = max(",;\t", key=(lines[0] if lines else "").count)
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        fix = "give a CSV file of file,label rows"
        raise ImagesError(
            f"{path.name} is no CSV file: {error}", where=f"{path}, line {reader.line_num}", fix=fix
        ) from error
    narrow = next((line for line, row in rows if len(row) < 2), None)
    if narrow is not None:
        fix = "write two columns: file,label"
        raise ImagesError(f"{path.name} has a row without a label column", where=f"{path}, line {narrow}", fix=fix)
    file_column, label_column = 0, 1
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if FILE_HEADERS.intersection(header) and LABEL_HEADERS.intersection(header):
        file_column = next(column for column, cell in enumerate(header) if cell in FILE_HEADERS)
        label_column = next(column for column, cell in enumerate(header) if cell in LABEL_HEADERS)
        rows = rows[1:]
    widest = max(file_column, label_column)
    wide = ((line, row) for line, row in rows if len(row) > widest)
    return [(line, row[file_column], row[label_column]) for line, row in wide if row[label_column]]


def index_by_name(source: Source) -> dict[str, list[int]]:
    """Map every way to name an image, whole path to base name, to the images it could mean."""
    indices: dict[str, list[int]] = {}
    for index in range(len(source)):
        name = source.name(index)
        inside_shard = name.partition("/")[2] if ".tar/" in name else name
        for spelling in {name, inside_shard, os.path.basename(name)}:
            indices.setdefault(spelling, []).append(index)
    # A whole path is never ambiguous, even where another image deeper down has it as its base name.
    for index in range(len(source)):
        indices[source.name(index)] = [index]
    return indices


def class_indices(
    labels: Sequence[str | int | None], class_names: Sequence[str], *, names: Sequence[str], where: str
) -> NDArray[np.int64]:
    """Turn labels into class indices [images]; labels are class names, in any case, or numbers from 0.

    Raises:
        ImagesError: an image has no label, or a label is no class.
    """
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    if unlabelled:
        raise ImagesError(
            f"{len(unlabelled)} of {len(labels)} images have no label: {some(unlabelled)}",
            where=where,
            fix="put the images into folders named by class, or give a CSV of file,label rows",
        )
    distinct = {label for label in labels if label is not None}
    found = lookup(distinct, class_names)
    strangers = sorted((label for label in distinct if label not in found), key=str)
    if strangers:
        hints = [f"{label!r}{hint(label, class_names)}" for label in strangers[:3]]
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise ImagesError(
            f"{len(strangers)} of {len(distinct)} labels match no class: {', '.join(hints)}{more}",
            where=where,
            fix=f"label with the class names, or with numbers from 0 to {len(class_names) - 1} in their order",
        )
    return np.array([found[label] for label in labels if label is not None], dtype=np.int64)


def lookup(labels: Iterable[str | int], class_names: Sequence[str]) -> dict[str | int, int]:
    """Find each label's class index; a label without one is left out.

    Text is a name before it is a number: digits as text are indices only where none of the labels is a name.
    """
    distinct = list(labels)
    texts = [label for label in distinct if isinstance(label, str)]
    if len(class_names) == len(texts) == 1000 and all(WORDNET_ID.fullmatch(text) for text in texts):
        return {text: index for index, text in enumerate(sorted(texts))}  # ImageNet's folders: its order is theirs
    exact = {name: index for index, name in enumerate(class_names)}
    loose = {canonical(name): index for index, name in enumerate(class_names)}
    found: dict[str | int, int] = {}
    for text in texts:
        spellings = (canonical(text), canonical(text.replace("/", " ")))  # SUN397 writes "apse/indoor"
        index = exact.get(text, next((loose[one] for one in spellings if one in loose), None))
        if index is not None:
            found[text] = index
    if not found and all(text.isdecimal() for text in texts):
        found.update({text: int(text) for text in texts if int(text) < len(class_names)})
    found.update({label: label for label in distinct if isinstance(label, int) and 0 <= label < len(class_names)})
    return found


def hint(label: str | int, class_names: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` where a class name is close."""
    close = nearest(label, class_names).removeprefix("; ") if isinstance(label, str) else ""
    return f" ({close})" if close else ""


def some(names: Sequence[str]) -> str:
    """Return the first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""Labels of images, matched with the class names; only evaluation, and what says that it learns labels, comes here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prgkit.config.class_names import WORDNET_ID
from prgkit.config.delimited import Row, column_word
from prgkit.config.prompts import canonical
from prgkit.errors import ImagesError, nearest, some
from prgkit.progress import silent

NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")  # a spreadsheet writes 3 as 3.0
NUMBERED = re.compile(r"(?:\d+|n\d{8})[\s._-]+(?=.*[^\W\d])(.+)")  # 001.Black_footed_Albatross, n02085620-Chihuahua
# Some of ImageNet's classes, in every wording of them, and their places in the order of its WordNet ids.
IMAGENET = {
    0: "tench", 1: "goldfish", 105: "koala", 207: "golden retriever", 340: "zebra", 388: "panda", 497: "church",
    574: "golf ball", 701: "parachute", 805: "soccer ball", 954: "banana", 999: "toilet",
}  # fmt: skip

Label = str | int  # a number as a library hands it out counts from 0; one that people wrote is text

# What a column of labels is called, in small letters and digits alone.
LABEL_WORDS = frozenset({
    "label", "labels", "labelname", "labelid", "class", "classes", "classname", "classlabel", "classid",
    "classindex", "classidx", "category", "categories", "categoryname", "categoryid", "target", "targets",
    "species", "breed", "variety", "truth", "groundtruth", "gt", "tag", "tags", "y",
})  # fmt: skip
MARKED = frozenset({"1", "1.0", "true"})
UNMARKED = frozenset({"0", "0.0", "false", ""})
# How strongly a column says that it holds the labels.
TITLED, NAMES, NUMBERS, WORDS, ANY = 4, 3, 2, 1, 0


def class_indices(
    labels: Sequence[Label | None],
    class_names: Sequence[str],
    *,
    names: Sequence[str],
    where: str,
    first_number: int | None = None,
    note: Callable[[str], None] = silent,
) -> NDArray[np.int64]:
    """Turn labels into class indices [images]; labels are class names, in any spelling, or numbers in their order.

    ``first_number`` is what the first class's number is; None: found from the numbers, and always said.

    Raises:
        ImagesError: an image has no label, a label is no class, or numbers could count from 0 as well as from 1.
    """
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    if unlabelled:
        raise ImagesError(
            f"{len(unlabelled)} of {len(labels)} images have no label: {some(unlabelled)}",
            where=where,
            fix="put the images into folders named by class, or give a CSV of file,label rows",
        )
    examples = {label: name for name, label in zip(reversed(names), reversed(labels), strict=True) if label is not None}
    indices = by_name(examples, class_names)
    if in_wordnet_order(examples, class_names):
        ends = f"{min(map(str, examples))} is {class_names[0]}, {max(map(str, examples))} is {class_names[-1]}"
        note(f"labels are WordNet ids, read in their order: {ends}")
    if not indices and (numbers := as_numbers(examples)) is not None:
        open_to_doubt = first_number is not None or any(isinstance(label, str) for label in examples)
        first = counted_from(numbers, examples, class_names, first_number, where=where) if open_to_doubt else 0
        indices = {label: number - first for label, number in numbers.items() if 0 <= number - first < len(class_names)}
        if len(indices) == len(examples):
            note(numbering_note({numbers[label] for label in indices}, first, class_names))
    else:
        handed_out = {label: label - (first_number or 0) for label in examples if isinstance(label, int)}
        indices |= {label: index for label, index in handed_out.items() if 0 <= index < len(class_names)}
    if unknown := sorted((label for label in examples if label not in indices), key=str):
        raise unknown_labels(unknown, len(examples), class_names, first_number or 0, where=where)
    return np.array([indices[label] for label in labels if label is not None], dtype=np.int64)


def unknown_labels(
    unknown: Sequence[Label], count: int, class_names: Sequence[str], first: int, *, where: str
) -> ImagesError:
    """Build the error for those of ``count`` labels that match no class, the first few with what may be meant."""
    hints = [f"{label!r}{hint(label, class_names)}" for label in unknown[:3]]
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    last = first + len(class_names) - 1
    fix = f"label with the class names, or with numbers from {first} to {last} in their order"
    if len(class_names) == 1000 and all(WORDNET_ID.fullmatch(str(label)) for label in unknown):
        fix = "name the classes as ImageNet does, in the order of its ids (data.classes: imagenet1k), or " + fix
    what = f"{len(unknown)} of {count} labels match no class: {', '.join(hints)}{more}"
    return ImagesError(what, where=where, fix=fix)


def lookup(labels: Iterable[Label], class_names: Sequence[str]) -> dict[Label, int]:
    """Find each label's class index, numbers counted from 0; a label without one is left out.

    Text is a name before it is a number: digits as text are indices only where none of the labels is a name.
    """
    distinct = set(labels)
    named = by_name(distinct, class_names)
    numbers = as_numbers(label for label in distinct if not named or isinstance(label, int)) or {}
    return named | {label: number for label, number in numbers.items() if number < len(class_names)}


def by_name(labels: Iterable[Label], class_names: Sequence[str]) -> dict[Label, int]:
    """Return the class index of each label that is a class's name: as it is, in another spelling, or after a number."""
    texts = [label for label in labels if isinstance(label, str)]
    if in_wordnet_order(texts, class_names):
        return {text: index for index, text in enumerate(sorted(texts))}  # ImageNet's folders: its order is theirs
    exact = {name: index for index, name in enumerate(class_names)}
    loose = {canonical(name): index for index, name in enumerate(class_names)}

    def find(text: str) -> int | None:
        whole = NUMBER.fullmatch(text)
        spellings = (text, text.replace("/", " "), whole[1] if whole else text)  # SUN397 writes "apse/indoor"
        return exact.get(text, next((loose[key] for key in map(canonical, spellings) if key in loose), None))

    indices: dict[Label, int] = {text: index for text in texts if (index := find(text)) is not None}
    # A number in front is only passed over where it could not be what tells two labels apart.
    bare = {text: index for text in texts if text not in indices and (index := find(unnumbered(text))) is not None}
    uses = Counter([*indices.values(), *bare.values()])
    return indices | {text: index for text, index in bare.items() if uses[index] == 1}


def in_wordnet_order(labels: Collection[Label], class_names: Sequence[str]) -> bool:
    """Tell whether labels are the ids of ImageNet's 1,000 classes, and the classes those, in the order of the ids."""
    return (
        len(class_names) == len(labels) == 1000
        and all(WORDNET_ID.fullmatch(str(label)) for label in labels)
        and all(name in canonical(class_names[index]) for index, name in IMAGENET.items())
    )


def unnumbered(text: str) -> str:
    """Return a label without the number or WordNet id in front of it, if any."""
    match = NUMBERED.fullmatch(text)
    return match[1] if match else text


def as_numbers(labels: Iterable[Label]) -> dict[Label, int] | None:
    """Return what number each label is, or None where one of them is none."""
    matches = {label: NUMBER.fullmatch(str(label)) for label in labels}
    sizes = {label: int(match[1]) for label, match in matches.items() if match and len(match[1]) < 10}
    return sizes if len(sizes) == len(matches) else None


def counted_from(
    numbers: dict[Label, int],
    examples: dict[Label, str],
    class_names: Sequence[str],
    first_number: int | None,
    *,
    where: str,
) -> int:
    """Return whether numbers that people wrote count from 0 or from 1, or refuse where it cannot be known."""
    used = set(numbers.values())
    first = first_number if first_number is not None else first_of(used, len(class_names))
    if first is not None or max(used) > len(class_names):
        return first or 0
    shown = [(label, number) for label, number in sorted(numbers.items(), key=lambda pair: pair[1])][:3]
    ways = "".join(
        f"\n    from {first}: "
        + ", ".join(f"{label} is {class_names[number - first]} ({examples[label]})" for label, number in shown)
        for first in (0, 1)
    )
    raise ImagesError(
        f"the labels are numbers from {min(used)} to {max(used)}, and could count from 0 as well as from 1:{ways}",
        where=where,
        fix="say which: --set data.label_format.first_number=0, or 1; or label with the class names",
    )


def first_of(used: Collection[int], count: int) -> int | None:
    """Return what numbers of ``count`` classes count from, 0 or 1, or None where they do not say it."""
    return 0 if 0 in used else 1 if count in used and max(used) == count else None


def numbering_note(used: Collection[int], first: int, class_names: Sequence[str]) -> str:
    """Say what the numbers were read as."""
    pairs = [f"{number} is {name}" for number, name in enumerate(class_names, first)]
    shown = pairs if len(pairs) <= 4 else [*pairs[:2], "...", pairs[-1]]
    missing = [str(number) for number in range(first, first + len(class_names)) if number not in used]
    none = f"; no image has {some(missing)}" if missing else ""
    return f"labels are numbers, read from {first}: {', '.join(shown)}{none}"


def hint(label: Label, class_names: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` where a class name is close."""
    close = nearest(label, class_names).removeprefix("; ") if isinstance(label, str) else ""
    return f" ({close})" if close else ""


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
    counted: Sequence[int | None] | None = None  # [entries], the classes where labels are numbers such as theirs
    from_marks: bool = False


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table that name images of a source; which column holds the labels is known with the class names."""

    path: Path
    header: Sequence[str]  # empty where there is none
    file_column: int
    entries: Sequence[Entry]
    unmatched: Sequence[Row]  # rows that name no image here
    elsewhere: str  # a file whose folder is none of this source's, while it has the name of an image; empty: none
    label_column: int | None  # where the recipe names it
    is_sheet: bool = False  # of audit or suggest-labels: of some images of a source, and the others have no label

    def labels(self, class_names: Sequence[str], *, note: Callable[[str], None] = silent) -> dict[int, str]:
        """Return the label of each image that has one, and say how the table is read.

        Raises:
            ImagesError: it is not certain which column holds them, or an image has two.
        """
        reading = self._column(self.label_column) if self.label_column is not None else self._likeliest(class_names)
        labels = self._by_image(reading.labels)
        if len(self.contents) > 1 and self.label_column is None:
            note(f"{self.path.name}: images by {self.title(self.file_column)}, labels by {reading.title}")
        if self.elsewhere:
            note(f"{self.path.name}: {self.elsewhere!r} is taken for an image here, whose folder has another name")
        if self.unmatched:
            line, cells = self.unmatched[0]
            count = "1 row names" if len(self.unmatched) == 1 else f"{len(self.unmatched):,} rows name"
            note(f"{count} no image here, e.g. {cell_of(cells, self.file_column)!r} ({self.path.name}, line {line})")
        return labels

    def check(self) -> None:
        """Refuse two labels of an image, as far as they are known without the class names.

        Those are the labels of the only column, or of the one that says so.
        """
        titled = [column for column in self.contents if self._is_titled(column)]
        only = [columns[0] for columns in (titled, list(self.contents)) if len(columns) == 1]
        for column in only[:1] if self.label_column is None else [self.label_column]:
            self._by_image(self._column(column).labels)

    @cached_property
    def contents(self) -> dict[int, frozenset[str]]:
        """The distinct cells of every column that could hold labels, small letters throughout where they are marks."""
        width = max(len(entry.cells) for entry in self.entries)
        cells = {column: frozenset(cell_of(entry.cells, column) for entry in self.entries) for column in range(width)}
        return {column: words for column, words in cells.items() if column != self.file_column and words != {""}}

    def title(self, column: int) -> str:
        """Return what people call a column: its name, else its number."""
        name = cell_of(self.header, column)
        return f"column {name!r}" if name else f"column {column + 1}"

    def _is_titled(self, column: int) -> bool:
        return column_word(cell_of(self.header, column)) in LABEL_WORDS

    def _by_image(self, labels: Sequence[str]) -> dict[int, str]:
        by_image: dict[int, str] = {}
        for entry, label in zip(self.entries, labels, strict=True):
            if label and by_image.setdefault(entry.image, label) != label:
                what = f"{self._file(entry)!r} is labelled {by_image[entry.image]!r} and {label!r}"
                raise ImagesError(what, where=f"{self.path}, line {entry.line}", fix="keep one of the two rows")
        return by_image

    def _file(self, entry: Entry) -> str:
        return cell_of(entry.cells, self.file_column)

    def _column(self, column: int, class_names: Sequence[str] = ()) -> Reading:
        """Read the labels from one column."""
        distinct = self.contents.get(column, frozenset()) - {""}
        indices = by_name(distinct, class_names)
        labels = [cell_of(entry.cells, column) for entry in self.entries]
        named = 2 * sum(label in indices for label in labels) > sum(map(bool, labels))
        titled, numbers = self._is_titled(column), all(map(NUMBER.fullmatch, distinct))
        strength = (TITLED if titled else NAMES) if named else (NUMBERS if numbers else WORDS) if titled else ANY
        meaning = [indices.get(label, label) for label in labels]
        return Reading(self.title(column), labels, meaning, strength, counted(labels, len(class_names)))

    def _likeliest(self, class_names: Sequence[str]) -> Reading:
        """Return the one way to read the labels that is certain, or refuse."""
        titles = {cell_of(self.header, column): column for column in self.contents}
        classes = {titles[str(title)]: index for title, index in by_name(titles, class_names).items()}
        figures = {column: index for column, index in classes.items() if all(map(is_figure, self.contents[column]))}
        marks = {column: index for column, index in figures.items() if is_marks(self.contents[column])}
        ways = [self._column(column, class_names) for column in self.contents if column not in figures]
        titled = any(way.strength == TITLED for way in ways)
        marked = [
            [column for column in marks if cell_of(entry.cells, column).lower() in MARKED] for entry in self.entries
        ]
        wrong = [entry for entry, columns in zip(self.entries, marked, strict=True) if len(columns) != 1]
        if marks and wrong and not titled:
            raise self._badly_marked(marks, wrong)
        if marks and not wrong and not (titled and len(marks) == 1):  # one alone can be a flag: train, not test
            meaning = [marks[columns[0]] for columns in marked]
            labels = [class_names[index] for index in meaning]
            ways.append(Reading("the names of the columns with a 1", labels, meaning, NAMES, from_marks=True))
        if len(figures) > len(marks) and all(way.strength == ANY for way in ways):
            raise self._scored(sorted(set(figures) - set(marks)))
        best = max(ways, key=lambda way: way.strength, default=None)
        if best is None or (best.strength == ANY and len(ways) > 1):
            raise self._unsure(ways)
        rivals = [way for way in ways if way is not best and contradicts(way, best)]
        if rivals:
            raise self._unsure([best, *rivals])
        return best

    def _badly_marked(self, marks: Collection[int], wrong: Sequence[Entry]) -> ImagesError:
        files = some([self._file(entry) for entry in wrong])
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
        lines = [f"\n    {row[:160]}" for row in rows]
        for way in ways[:4]:
            pairs = zip(first, way.labels, strict=False)
            read = ", ".join(f"{self._file(entry)} is {label!r}" for entry, label in pairs)
            lines.append(f"\n    by {way.title}: {read}")
        return ImagesError(
            f"which column of {self.path.name} holds the labels is not certain:{''.join(lines)}",
            where=self.path,
            fix="name it: --set data.label_format.label_column=NAME, or its number, counted from 1",
        )


def contradicts(other: Reading, best: Reading) -> bool:
    """Tell whether a weaker or equal way to read the labels is a reason to doubt the best."""
    if other.strength == best.strength or other.from_marks:
        return other.meaning != best.meaning
    some_named = any(isinstance(meaning, int) for meaning in other.meaning)
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


def cell_of(cells: Sequence[str], column: int) -> str:
    """Return a cell, empty where the row is shorter."""
    return cells[column] if column < len(cells) else ""


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

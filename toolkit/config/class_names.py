"""Files of class names in the forms that other tools write: numbered, quoted, with columns, as JSON."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prgkit.config.delimited import Row, column_word, rows, ways
from prgkit.config.yaml_io import plain_yaml
from prgkit.errors import RecipeError, some

Entry = tuple[str, str]  # where a name stands, and the name

# A number or WordNet id in front of a name, in brackets or after a word such as "class", and what parts the two.
IN_FRONT = re.compile(
    r"(?P<open>[\[(]?(?:(?:class|label|id|no\.?|index)[\s_]*)?)(?P<id>\d+|n\d{8})"
    r"(?:(?P<mark>\s*(?:[-=]+>|→)\s*|\s*[\])]?\s*(?:[:.,–-](?:\s+|(?!\d))|[=|;]\s*)|\s*[\])]\s*)|[\s_]+)(?P<name>\S.*)",
    re.IGNORECASE,
)
# Behind one there has to be a mark: "channel 1" is a name.
BEHIND = re.compile(r"(?P<open>)(?P<name>\S.*?)(?P<mark>\s*(?:[:=|,;\t]|\()\s*)(?P<id>\d+|n\d{8})\)?")
BULLET = re.compile(r"(?P<same>[-*+•–—])\s+(?:\[[ xX]\]\s+)?(?P<name>\S.*)")  # with Markdown's box to tick, too
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}
NAME_TITLES = ("name", "names", "classname", "class", "classes", "label", "labels", "category", "categories", "species")
TITLES = {*NAME_TITLES, "id", "ids", "index", "idx", "number", "no", "wnid", "synset"}
# "labels" comes last: beside another it can be the labels of images.
LISTS = ("names", "classes", "categories", "id2label", "idx_to_class", "label2id", "class_to_idx", "labels")
ASSIGNED = re.compile(r"\A(?:\s*#.*\n)*\s*(?:(?:const|let|var)\s+)?\w+\s*(?::[^=\n]*)?=\s*(?=[\[({])")
KEYED = re.compile(r"^(names|classes)[ \t]*:", re.MULTILINE)  # Ultralytics' data.yaml, say
WORDNET_ID = re.compile(r"n\d{8}")
# A number without a mark, in front or behind: an id, where it differs from name to name as the words do.
BESIDE = (re.compile(r"(?P<id>-?\d+)[\s_]+(?P<name>\D.*)"), re.compile(r"(?P<name>\S.*?)[\s_]+(?P<id>\d+)"))
# How many there are: in front as `uniq -c` writes it, or in brackets; names that differ in nothing else keep theirs.
COUNTED = (BESIDE[0], re.compile(r"(?P<name>\S.*?)\s*[\[(][\d.,]+[\])]"))
COLORED = re.compile(r"(?P<name>[^:]+):\d+,\d+,\d+:[^:]*:[^:]*")  # CVAT's labelmap.txt
# The folder of a split, as "train/", that all names stand in; "apse/indoor" is a name.
BELOW = re.compile(
    r"(?P<same>(?:.*/)?(?:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|images|data(?:set)?)/)(?P<name>[^/]+)"
)
# What all names may have beside them, and how that is told.
FORMS = ((BULLET, "begin with the marks of a list"), (BELOW, "begin with a folder"), (COLORED, "end with colors"))
# Nobody writes a picture's caption so: marks of HTML, Markdown and programs, comments, paths, addresses, the lines of a
# configuration or of `ls -l`, hidden files.
ODD = re.compile(
    r"[<>{}\\*`|;=]|^[./~]+/|^\.\w|/$|://|^\w+:(\s|$)|\s#|^\W+$|^\[[ x]?\]\s|^[-dl][-rwx]{9}|^total \d+$"
    r"|\.(jpe?g|png|txt|db|ini)$",
    re.IGNORECASE,
)
LIKE_ID = re.compile(
    r"\d+|n\d{8}|(?:class|label|category|cls|id|item)[ _-]?\d+"
    r"|(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}|[0-9a-f]{8}(?:-[0-9a-f]+){4}",
    re.IGNORECASE,
)


def read_names(text: str, path: Path) -> tuple[list[Entry], list[str]]:
    """Return the names in a file's text with their places, and what is to be said of how they are read.

    Raises:
        RecipeError: it is JSON of another kind, or a table in which the column of names is not certain.
    """
    is_json = path.suffix.lower() == ".json"
    written = ASSIGNED.sub("", text, count=1)
    value = parsed(written) if is_json or written.lstrip()[:1] in ("[", "{", "(") else None
    if value is None and KEYED.search(text) and isinstance(mapping := plain_yaml(text), dict):
        value = mapping if any(isinstance(mapping.get(key), list | dict) for key in LISTS) else None
    if value is not None or is_json:
        return from_value(value, path)
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(re.split("\r\n|\r|\n", text), 1)]
    lines = [(at, line) for at, line in lines if line]
    if len(lines) > 1 and all(re.match(r"#\s*\d+\W", line) for _, line in lines):  # numbers, not comments
        lines = [(at, line.removeprefix("#").strip()) for at, line in lines]
    comments = [line for _, line in lines if line.startswith("#")]
    entries = [(at, line) for at, line in lines if not line.startswith("#")]
    if len(comments) > 1 and not entries:
        what = f"every line of {path.name} is a comment, as it begins with #"
        raise RecipeError(what, where=path, fix="write the names without #, one a line")
    names, notes = from_text(text, entries, path)
    if comments:
        count = "1 line is a comment, and is" if len(comments) == 1 else f"{len(comments)} lines are comments, and are"
        notes = [f"{count} left out of the class names: {comments[0][:80]!r}", *notes]
    return names, notes


def from_text(text: str, entries: Sequence[tuple[str, str]], path: Path) -> tuple[list[Entry], list[str]]:
    """Return the names in the lines of a file that are no comments."""
    if len(entries) == 1:
        return from_one_line(entries[0][1])
    if table := table_of(text, entries, path):
        names, notes = from_table(table, path)
        quoted = without_quotes([line for _, line in entries])  # as CSV has them, so that none is left
        return names, [f"class names {quoted.what}, which are left out", *notes] if quoted else notes
    header = [entries[0][1]] if is_header([line for _, line in entries]) else []
    names, notes = from_lines(entries[len(header) :])
    with_commas = [name for _, name in names if "," in name]
    if len(with_commas) > 1:
        notes.append(f"class names have commas, and each line is one class: {with_commas[0]}; ...")
    return names, [f"class names begin below a header: {title!r} is none of them" for title in header] + notes


def is_header(lines: Sequence[str]) -> bool:
    """Tell whether the first line is the title of the others: the word for a name, or words above ids and names."""
    words = re.findall(r"[^\W_]+", lines[0].casefold()) if len(lines) > 2 else []
    titled = bool(words) and TITLES.issuperset(words)
    return titled and (set(words) <= set(NAME_TITLES) or without_ids(list(lines[1:])) is not None)


def like_ids(names: Sequence[str]) -> list[str]:
    """Return the names that no teacher can know: numbers, codes, and numbers beside a name."""
    for form in (*COUNTED, BESIDE[1]):
        matches = [match for match in map(form.fullmatch, names) if match]
        differ = form in COUNTED or len({match["id"] for match in matches}) == len(matches)
        if differ and len(matches) == len({match["name"] for match in matches}) == len(names):
            return list(names)
    fronts = [IN_FRONT.fullmatch(name) for name in names]
    marked = [bool(front and front["mark"] and front["mark"].strip() not in ("-", "–")) for front in fronts]
    return [name for name, odd in zip(names, marked, strict=True) if odd or LIKE_ID.fullmatch(name)]


def odd_names(names: Sequence[str]) -> list[str]:
    """Return the names that hold what no caption does: marks of HTML or Markdown, paths, keys of a configuration."""
    folders = {name.rpartition("/")[0] for name in names}
    return [name for name in names if ODD.search(name) or (len(folders) == 1 != len(names) and "/" in name)]


def parsed(text: str) -> Any:
    """Read JSON, or a list or mapping as Python prints it; None where it is neither."""
    for read in (partial(json.loads, object_pairs_hook=each_once), ast.literal_eval):
        try:
            return read(text.strip().removesuffix(";"))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None


def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a mapping of which no key is lost."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise RecipeError("a key stands twice in the class names", fix="keep one of each")
    return mapping


def from_value(value: Any, path: Path) -> tuple[list[Entry], list[str]]:
    """Return the names in a list or mapping; nothing of any other file is shown, as it could hold anything."""
    keys = [key for key in LISTS if key in value] if isinstance(value, dict) else []
    readings = {key: reading for key in keys if (reading := listed(value[key]))} if keys else {"": listed(value)}
    if len(readings) > 1:
        readings.pop("labels", None)
    first, *others = readings or [""]
    names = {key: [name for _, name in reading[0]] for key, reading in readings.items() if reading}
    if differing := next((key for key in others if names[key] != names[first]), None):
        what = f"{path.name} has other class names in {differing!r} than in {first!r}"
        raise RecipeError(what, where=path, fix="keep one of the two")
    if reading := readings.get(first):
        return reading[0], [*([f"class names are those in {first!r}"] if len(keys) > 1 else []), *reading[1]]
    what = f"{path.name} is no list of class names, nor a mapping of numbers to names"
    raise RecipeError(what, where=path, fix='write ["apple", "bus"], or {"0": "apple", "1": "bus"}, or one name a line')


def listed(value: Any) -> tuple[list[Entry], list[str]] | None:
    """Return the names in a list, or in a mapping of numbers to names or of names to numbers; None where it is none."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, dict) and "name" in item for item in value):
        numbers = [item.get("id") for item in value]
        known = len({number for number in numbers if type(number) is int}) == len(value)
        value = {
            number: item["name"] for number, item in zip(numbers if known else range(len(value)), value, strict=True)
        }
    if isinstance(value, dict) and not all(str(key).isdecimal() for key in value):  # numbers as text: names in front
        texts = [number for number in value.values() if isinstance(number, str) and re.fullmatch(r"[0-9]{1,9}", number)]
        value = {name: int(number) for name, number in value.items()} if len(texts) == len(value) else value
    if isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        value = {number: name for name, number in value.items()} if len(set(value.values())) == len(value) else None
    if isinstance(value, dict) and value and all(re.fullmatch(r"\d{1,9}", str(key)) for key in value):
        named = {int(key): behind_id(name) for key, name in value.items()}
        entries: list[Entry] = [(f"number {number}", named[number]) for number in sorted(named)]
        if len(named) == len(value) and all(isinstance(name, str) for _, name in entries):
            return entries, [numbering_note([(at.split()[1], name) for at, name in entries], moved=False)]
    if isinstance(value, dict) and value and all(WORDNET_ID.fullmatch(str(key)) for key in value):
        value = list(value.values())
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        first = f": {', '.join(map(repr, value[:2]))}, ..." if len(value) > 2 else ""
        return [(f"entry {n}", item) for n, item in enumerate(value, 1)], [
            f"class names look like a list, and are read as one{first}"
        ]
    return None


def behind_id(name: Any) -> Any:
    """Return the name of ImageNet's ``["n01440764", "tench"]``; anything else as it is."""
    is_pair = isinstance(name, list) and len(name) == 2 and WORDNET_ID.fullmatch(str(name[0]))
    return name[1] if is_pair else name


def from_one_line(line: str) -> tuple[list[Entry], list[str]]:
    """Return the names of a file that has a single line, parted by what it has most of."""
    delimiter = max("\t;,|", key=line.count)
    try:
        (_, cells), *_ = rows(line, delimiter) or [(1, [])]
    except csv.Error:
        cells = line.split(delimiter)
    names = [cell for cell in cells if cell]
    if len(names) < 2:
        return [("line 1", line)], []
    return [(f"entry {n}", name) for n, name in enumerate(names, 1)], [
        f"class names seem to stand in one line, and are parted at {delimiter!r}: {some(names)}"
    ]


def table_of(text: str, entries: Sequence[tuple[str, str]], path: Path) -> list[Row] | None:
    """Return the rows of a file that is a table: by its suffix, tabs in every line, or the words of its header."""
    first = entries[0][1] if entries else ""
    titles = re.split("[\t;,|]", first)
    titled = len(titles) > 1 and any(column_word(title) in NAME_TITLES for title in titles)
    is_csv = path.suffix.lower() == ".csv"
    tabbed = all("\t" in line for _, line in entries)
    if not (is_csv or titled or (entries and tabbed)):
        return None
    by_delimiter, _ = ways(text)
    try:
        table = rows(text, "\t") if tabbed and entries else by_delimiter[0]() if by_delimiter else rows(text, ",")
    except csv.Error as error:
        if not is_csv:
            return None
        raise RecipeError(f"{path.name} is no CSV file: {error}", where=path, fix="write one name a line") from error
    table = [(line, cells) for line, cells in table if not cells[0].startswith("#")]
    return table if is_csv or len({len(cells) for _, cells in table}) == 1 else None


def from_table(table: Sequence[Row], path: Path) -> tuple[list[Entry], list[str]]:
    """Return the names in the column of a table that holds them, in the order of its numbers."""
    lengths = Counter(len(cells) for _, cells in table)
    width = lengths.most_common(1)[0][0] if lengths else 0
    if long := next((line for line, cells in table if any(cells[width:])), None):
        what, fix = f"{path.name} has rows of different lengths", "put quotes around a name that has a comma in it"
        raise RecipeError(what, where=f"{path}, line {long}", fix=fix)
    padded = [(line, [*cells, *[""] * (width - len(cells))][:width]) for line, cells in table]
    filled = [column for column in range(width) if any(cells[column] for _, cells in padded)]
    titles = [column_word(title) for title in padded[0][1]] if padded else []
    ids = [column for column in filled if are_ids([cells[column] for _, cells in padded])]
    below = [column for column in filled if are_ids([cells[column] for _, cells in padded[1:]])]
    untitled = any(not re.fullmatch(r"n?\d+", padded[0][1][column]) for column in set(below) - set(ids))
    has_header = bool(set(titles) & set(NAME_TITLES)) or untitled
    body, ids = (padded[1:], below) if has_header else (padded, ids)
    texts = [column for column in filled if column not in ids] or filled[:1]
    named = [titles.index(title) for title in NAME_TITLES if title in titles and titles.index(title) in texts]
    column = named[0] if has_header and named else texts[0] if len(texts) == 1 else None
    if column is None:
        lines = "".join(f"\n    {','.join(cells)[:160]}" for _, cells in padded[:3])
        what = f"which column of {path.name} holds the class names is not certain:{lines}"
        raise RecipeError(what, where=path, fix="call it name in the first line, or write one name a line")
    notes = []
    if has_header and len(filled) == 1:
        notes.append(f"class names begin below a header: {padded[0][1][column]!r} is none of them")
    if len(filled) > 1:
        title = f"{padded[0][1][column]!r}" if has_header else f"{column + 1}"
        notes.append(f"class names seem to be column {title} of {path.name}: {some([c[column] for _, c in body])}")
    entries: list[Entry] = [(f"line {line}", cells[column]) for line, cells in body]
    numbers = [
        [cells[column] for _, cells in body] for column in ids if all(cells[column].isdecimal() for _, cells in body)
    ]
    if numbers:
        entries, note = in_order(entries, numbers[0])
        notes.append(note)
    names, more = from_lines(entries)
    return names, notes + more


def from_lines(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Take off what every line has besides the name, as long as there is something."""
    notes: list[str] = []
    named = list(entries)
    if named and re.fullmatch(r"(names|classes)\s*:", named[0][1], re.IGNORECASE):
        named = named[1:]
    forms = [partial(without_form, form) for form in FORMS]
    strips: list[Callable[[list[str]], Stripped | None]] = [without_commas, without_quotes, *forms, without_ids]
    while len(named) > 1 and (step := next(filter(None, (strip([n for _, n in named]) for strip in strips)), None)):
        notes.append(f"class names {step.what}, which are left out: {named[0][1]!r} is read as {step.names[0]!r}")
        named = [(at, name) for (at, _), name in zip(named, step.names, strict=True)]
        if step.ids and all(map(str.isdecimal, step.ids)):
            ordered, note = in_order(named, step.ids)
            notes += [note] if ordered != named else []
            named = ordered
    return named, notes


class Stripped(NamedTuple):
    """Names without something that every line had."""

    names: list[str]
    what: str  # that was taken off, in words
    ids: Sequence[str] = ()


def without_commas(names: list[str]) -> Stripped | None:
    """Take off the comma, semicolon or slash at the end of every line but the last."""
    for mark, what in {",": "commas", ";": "semicolons", "/": "slashes"}.items():
        if all(name.endswith(mark) for name in names[:-1]):
            return Stripped([name.removesuffix(mark).strip() for name in names], f"end with {what}")
    return None


def without_quotes(names: list[str]) -> Stripped | None:
    """Take off quotes around every name; a line of several quoted names stays as it is."""
    several = any(re.search(r"""["']\s*,\s*["']""", name) for name in names)
    if several or not all(len(name) > 2 and QUOTES.get(name[0]) == name[-1] for name in names):
        return None
    return Stripped([name[1:-1].strip() for name in names], "begin and end with quotes")


def without_form(form: tuple[re.Pattern[str], str], names: list[str]) -> Stripped | None:
    """Return each line's part called name, where all have one of `FORMS`, and its part called same in common."""
    pattern, what = form
    matches = [match for match in map(pattern.fullmatch, names) if match]
    if len(matches) < len(names) or len({match.groupdict().get("same") for match in matches}) > 1:
        return None
    return Stripped([match["name"] for match in matches], what)


def without_ids(names: list[str]) -> Stripped | None:
    """Take off ids where every line has one, in one form, and they cannot belong to the names."""
    for form, where in ((IN_FRONT, "begin with ids"), (BEHIND, "seem to end with ids")):
        matches = [match for match in map(form.fullmatch, names) if match]
        marks = {(match["open"].strip(), (match["mark"] or "").strip()) for match in matches}
        ids, bare = [match["id"] for match in matches], [match["name"] for match in matches]
        repeat = len(set(bare)) < len(bare) and marks <= {("", "")}  # "1 wheeler", "2 wheeler" are names
        if len(matches) == len(names) and len(marks) == 1 and are_ids(ids) and not repeat:
            return Stripped(bare, where, ids)
    return None


def are_ids(texts: Sequence[str]) -> bool:
    """Tell whether texts are ids of a whole list: WordNet's, numbers without a gap from 0 or 1, or of equal width."""
    if not texts or len(set(texts)) < len(texts):
        return False
    if all(map(WORDNET_ID.fullmatch, texts)):
        return True
    if not all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        return False
    padded = len(set(map(len, texts))) == 1 < len(texts[0]) and any(text.startswith("0") for text in texts)
    numbers = sorted(map(int, texts))
    return padded or (numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers))))


def in_order(entries: list[Entry], numbers: Sequence[str]) -> tuple[list[Entry], str]:
    """Put names in the order of their numbers, and say so."""
    order = sorted(range(len(entries)), key=lambda place: int(numbers[place]))
    pairs = [(numbers[place], entries[place][1]) for place in order]
    return [entries[place] for place in order], numbering_note(pairs, moved=order != list(range(len(entries))))


def numbering_note(pairs: Sequence[tuple[str, str]], *, moved: bool) -> str:
    """Say which number is which name."""
    lines = [f"{number} is {name}" for number, name in pairs]
    shown = lines if len(lines) <= 3 else [*lines[:2], "...", lines[-1]]
    order = ", and put in the order of their numbers" if moved else ""
    return f"class names are numbered{order}: {', '.join(shown)}"

"""Where answers to pictures are kept: a table, JSON lines, or copies of the pictures with the answers on them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from prgkit.errors import ImagesError
from prgkit.evaluate.predict import Prediction
from prgkit.storage.atomic import guarding_space, write_bytes

COLUMNS = ("image", "class", "probability", "second_class", "second_probability", "abstained", "rejected", "error")


LONGEST = 65_500  # pixels of a JPEG's side, as libjpeg has it


def open_answers(out: Path) -> AnswerLines | AnnotatedPictures:
    """Open a .csv or .jsonl file, or a folder for pictures, new or with answers in it to go on with.

    Raises:
        ImagesError: it is a file of another kind, a table with other columns, or a folder that is called like a file.
    """
    if out.suffix.lower() in (".csv", ".jsonl"):
        if out.is_dir():
            raise ImagesError(f"answers go to a {out.suffix} file, and this is a folder", where=out, fix="name another")
        return AnswerLines(out)
    if out.exists() and not out.is_dir():
        raise ImagesError("answers go to a .csv, a .jsonl, or a folder of pictures", where=out, fix="name one of these")
    return AnnotatedPictures(out)


class AnswerLines:
    """A table, or JSON lines: a line an answer, written when it is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.as_table = path, path.suffix.lower() == ".csv"
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a kill can leave half a line
        begins = as_row(COLUMNS) if self.as_table else '{"image": '
        try:
            if not whole and not begins.startswith(data[: len(begins)].decode()):
                raise ValueError("it is no first line that was cut short")
            self.known, answered = answers_in(whole.decode(), as_table=self.as_table)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            fix = "name another file, or delete this one"
            raise ImagesError("the file holds something else than answers", where=path, fix=fix) from error
        whole = answered.encode()
        if whole != data:
            write_bytes(path, whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.as_table and not whole:
            self.write(as_row(COLUMNS))

    def __contains__(self, name: object) -> bool:
        return name in self.known

    def add(self, answer: Prediction) -> None:
        """Append a line."""
        if answer.error is None:
            self.known.add(answer.image)
        if not self.as_table:
            self.write(json.dumps(answer.to_json(), ensure_ascii=False) + "\n")
            return
        second: tuple[object, object] = answer.top[1] if len(answer.top) > 1 else ("", "")
        told = (answer.label, answer.probability, *second, answer.abstained, answer.rejected)
        error = " ".join(str(answer.error).split()) if answer.error else ""
        self.write(as_row((answer.image, *told, error)))

    def write(self, line: str) -> None:
        """Append one line."""
        with guarding_space(self.path, len(line)), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(line)


def answers_in(text: str, *, as_table: bool) -> tuple[set[str], str]:
    """Return the names of the pictures that have an answer in a file's text, and the text without those that failed."""
    if as_table:
        rows = csv.reader(io.StringIO(text))
        if (header := next(rows, None)) is not None and tuple(header) != COLUMNS:
            raise ValueError(f"columns {header}")
        found = [(row[0], as_row(tuple(row)), any(row[len(COLUMNS) - 1 :])) for row in rows if row]
    else:
        header, lines = None, text.split("\n")[:-1]
        found = [(one["image"], f"{line}\n", bool(one.get("error"))) for line in lines for one in [json.loads(line)]]
    answered = [(name, line) for name, line, failed in found if not failed]
    if len(answered) < len(found):
        text = "".join([as_row(COLUMNS) if header else "", *(line for _, line in answered)])
    return {name for name, _ in answered}, text


def as_row(cells: tuple[object, ...]) -> str:
    """Return a line of CSV; None is an empty cell, a truth is lower case."""
    line = io.StringIO()
    texts = [str(cell).lower() if isinstance(cell, bool) else "" if cell is None else str(cell) for cell in cells]
    csv.writer(line, lineterminator="\n").writerow(texts)
    return line.getvalue()


class AnnotatedPictures:
    """Copies of the pictures in a folder, each with its answer written on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: object) -> bool:
        return place_below(self.folder, str(name)).exists()

    def add(self, answer: Prediction) -> None:
        """Write the picture; one that cannot be read has none."""
        if answer.read is not None:
            save_picture(annotated(answer.read(), answer), place_below(self.folder, answer.image))


def place_below(folder: Path, name: str) -> Path:
    """Return where a copy of a picture lies: below the folder, whatever its name is."""
    path = Path(name)
    parts = ["_" if part == ".." else part for part in path.parts if part != path.anchor] or ["picture"]
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.jpg")


def save_picture(page: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; smaller where JPEG has no such size."""
    page.thumbnail((LONGEST, LONGEST))
    data = io.BytesIO()
    page.save(data, "JPEG", quality=90)
    write_bytes(path, data.getvalue())


def annotated(picture: Image.Image, answer: Prediction) -> Image.Image:
    """Return a picture with its answer on a dark bar below it."""
    text = f"{in_words(answer)}  {100 * (answer.probability or 0):.0f} %"
    height = max(14, picture.height // 16)
    page = Image.new("RGB", (picture.width, picture.height + height + 4), (24, 24, 24))
    page.paste(picture, (0, 0))
    font = ImageFont.load_default(height * 0.8)
    ImageDraw.Draw(page).text((4, picture.height + 2 + height / 2), text, (255, 255, 255), font, "lm")
    return page


def in_words(answer: Prediction) -> str:
    """Return the class, or why there is none."""
    return answer.label or ("none of the classes" if answer.rejected else "abstains")

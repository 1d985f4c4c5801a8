"""An append-only file of JSON lines: after a kill, a line is whole or not there, and damaged ones are named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from prgkit.errors import RunError
from prgkit.storage.atomic import flush, guarding_space, write_text

Record = TypeVar("Record")


class Journal(Generic[Record]):
    """A file of one JSON object a line, each of them a ``record``: a pydantic model, or ``dict[str, Any]``.

    Several processes may read at once; one that appends has to hold a lock of its folder.
    """

    def __init__(self, path: Path, record: type[Record]) -> None:
        self.path = path
        self._adapter = TypeAdapter(record)
        self._lines_seen = 0

    def append(self, record: Record) -> None:
        """Append one line and flush it to the disk, so that a kill loses at most a torn last line.

        Raises:
            DiskFullError: there is no space for it.
            ValueError: it holds a number that JSON does not have: infinity, or none at all.
        """
        line = self._line(record)
        self._drop_torn_line()
        with guarding_space(self.path, len(line)), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            flush(file)
        self._lines_seen += 1

    def lines(self, *, after: int = 0) -> list[tuple[int, Record | None]]:
        """Return the whole lines from line ``after`` + 1 on, with their numbers; None stands for one that is damaged.

        A torn last one is left out.
        """
        lines = self.path.read_bytes().split(b"\n")[after:-1] if self.path.exists() else []
        return [(number, self._record(line)) for number, line in enumerate(lines, start=after + 1)]

    def new_lines(self) -> list[tuple[int, Record | None]]:
        """Return the lines that this object has neither returned here nor appended: those of another process."""
        new = self.lines(after=self._lines_seen)
        self._lines_seen += len(new)
        return new

    def records(self, *, fix: str) -> list[Record]:
        """Return the records where each has to be whole, but for the last.

        Raises:
            RunError: a line before the last is damaged; ``fix`` says what to do about it.
        """
        lines = self.lines()
        if damaged := [number for number, record in lines[:-1] if record is None]:
            raise RunError(f"line {damaged[0]} of {self.path.name} is damaged", where=self.path, fix=fix)
        return [record for _, record in lines if record is not None]

    def replace(self, records: Iterable[Record]) -> None:
        """Write the file anew, whole or not at all, with these records."""
        write_text(self.path, "".join(map(self._line, records)))

    def _line(self, record: Record) -> str:
        return json.dumps(self._adapter.dump_python(record), allow_nan=False) + "\n"

    def _record(self, line: bytes) -> Record | None:
        try:
            return self._adapter.validate_python(json.loads(line))
        except ValueError:  # no JSON, or another kind of object
            return None

    def _drop_torn_line(self) -> None:
        """Cut off a last line that a kill or a full disk left without its end, so that the next starts on its own."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with open(self.path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

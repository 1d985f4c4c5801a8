"""One process at a time on a folder: the others wait or are refused, and a kill leaves nothing locked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from prgkit.errors import RunError

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes on one folder are then not noticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path, what: str, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``folder`` for this process alone; where another one holds it, wait if ``wait`` is there to be told so.

    Raises:
        RunError: another process holds it, and there is no ``wait``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = f"another process{holder_of(file)} is working on this {what}"
                if wait is None:
                    raise RunError(holder, where=folder, fix="wait for it, or stop it first") from error
                wait(f"{holder}; waiting until it has done its part ({folder})")
                fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def holder_of(file: TextIO) -> str:
    """Return `` (its id)`` of the process that holds a lock, where it has written it down."""
    file.seek(0)
    number = file.read(20).strip()
    return f" ({number})" if number.isdecimal() else ""


_held: set[TextIO] = set()


def _let_go() -> None:
    """Close a fork's copies of the locks: a worker that outlives its killed parent must not go on holding them."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

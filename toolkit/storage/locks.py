"""One process at a time on a folder: the others wait or are refused, and a kill leaves nothing locked."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from prgkit.errors import RunError

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes on one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # the file that the system locks
NOTE = ".lock.held"  # stands for the lock where the disk has none: NFS without lockd, Lustre without flock, many FUSE
LOOK_AGAIN_SECONDS = 0.2
LetGo = Callable[[], None]


class Holder(NamedTuple):
    """The process that wrote a note."""

    machine: str
    process: int
    began: str


@contextmanager
def locked(folder: Path, what: str, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``folder`` for this process alone; where another one holds it, wait if ``wait`` is there to be told so.

    Raises:
        RunError: another process holds it, and there is no ``wait``.
    """
    announced = False
    while (let_go := take(folder)) is None:
        holder, way_out = holder_of(folder)
        if wait is None:
            fix = f"wait for it, or stop it first{way_out}"
            raise RunError(f"another process{holder} is working on this {what}", where=folder, fix=fix)
        if not announced:
            doing = f"another process{holder} is working on this {what}"
            wait(f"{doing}; waiting until it has done its part ({folder}){way_out}")
        announced = True
        time.sleep(LOOK_AGAIN_SECONDS)
    try:
        yield
    finally:
        let_go()


def take(folder: Path) -> LetGo | None:
    """Take a folder's lock and return what lets it go, or None where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed by whoever lets go
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # the disk knows no locks
        file.close()
        return take_by_note(folder)
    if os.fstat(file.fileno()).st_nlink == 0:  # whoever had it has removed the folder
        file.close()
        return take(folder)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held.add(file)

    def let_go() -> None:
        _held.discard(file)
        file.close()

    return let_go


def take_by_note(folder: Path) -> LetGo | None:
    """Take a folder by a file that only one process can create; that of a process that was killed is taken over."""
    path, aside = folder / NOTE, folder / f"{NOTE}.{os.getpid()}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(Holder(machine(), os.getpid(), began(os.getpid()))._asdict(), file)
        return lambda: path.unlink(missing_ok=True)
    except FileExistsError:
        theirs = read_note(path)
    if theirs is None or theirs.machine != machine() or began(theirs.process) == theirs.began:
        return None
    try:
        path.rename(aside)  # of several that would take over, one moves it,
    except FileNotFoundError:
        return take_by_note(folder)
    if read_note(aside) != theirs:  # and only that of the process that is gone
        aside.rename(path)
        return None
    aside.unlink()
    return take_by_note(folder)


def machine() -> str:
    """Return what two processes share that can see each other: the host, and the container."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.is_symlink() else ''}".strip()


def began(number: int) -> str:
    """Return when a process of this machine began, in the system's own ticks; empty where there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        state, *others = text.rpartition(")")[2].split()  # after the name, which may hold anything
        return "" if state in "ZX" else others[18]
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # another user's
        pass
    return "running"


def read_note(path: Path) -> Holder | None:
    """Return the process that wrote a note; None where the note is gone, or not yet written."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(note["machine"]), int(note["process"]), str(note["began"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def holder_of(folder: Path) -> tuple[str, str]:
    """Return `` (its id)`` of the process that has a folder, where it is known, and what ends a lock that it left."""
    if (path := folder / NOTE).exists():
        theirs, way_out = read_note(path), f"; if none is running, delete {path}"
        if theirs is None:
            return "", way_out
        if theirs.machine == machine():
            return f" ({theirs.process})", ""
        return f" ({theirs.process} on {theirs.machine.partition(' ')[0]})", way_out
    number = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    return (f" ({number})" if number.isdecimal() else ""), ""


_held: set[TextIO] = set()


def _let_go() -> None:
    """Close a fork's copies of the locks: a worker that outlives its killed parent must not go on holding them."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

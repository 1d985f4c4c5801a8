"""Errors a user can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PrgkitError(Exception):
    """A mistake that is not a bug; the command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        if fix is not None:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class RecipeError(PrgkitError):
    """A recipe, class list or prompt that cannot be used."""


class ImagesError(PrgkitError):
    """Images, or their labels, that cannot be found or read."""


class TeacherError(PrgkitError):
    """A teacher that cannot be loaded."""


class TargetsError(PrgkitError):
    """A target store that is damaged, stale or in use."""


class StudentError(PrgkitError):
    """A student that cannot be built or loaded."""


class RunError(PrgkitError):
    """A run folder that is missing, unfinished or was made from something else."""


class CameApartError(RunError):
    """A training whose loss is no number any more."""


class WorkerError(PrgkitError):
    """A process that worked ahead and is no more; what it worked for can go on with the same command."""


class ExportError(PrgkitError):
    """A model that cannot be exported as asked."""


class NotWorthItError(ExportError):
    """An artifact that could be made, and would be worse than the one it is meant to improve on."""


class BackendError(PrgkitError):
    """A runtime that is missing, or cannot run what it was given."""


class ParityError(PrgkitError):
    """Two runtimes that should agree on the same images and do not."""


class BenchError(PrgkitError):
    """A measurement that cannot be made as asked."""


class HubError(PrgkitError):
    """The Hugging Face Hub cannot be reached, or refuses what it was asked for."""


class DiskFullError(PrgkitError):
    """No space left for something that was about to be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or ``""`` where none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

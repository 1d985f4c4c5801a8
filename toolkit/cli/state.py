"""What the commands of one chain share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from prgkit.errors import PrgkitError

if TYPE_CHECKING:
    from prgkit.cli.terminal import Terminal
    from prgkit.export.formats.options import ExportOptions

Document: TypeAlias = Mapping[str, object] | Sequence[object]  # what a command answers under --json


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe is meant, what is different this time, and where its run and the teacher's targets lie."""

    recipe: str | None
    images: str | None
    classes: str | None
    overrides: tuple[str, ...]  # "student.image_size=32"
    targets_root: Path
    folder: Path | None = None  # the run's
    dry_run: bool = False

    @property
    def names_a_recipe(self) -> bool:
        """Whether these options say which recipe is meant, or leave it to the chain or the newest run."""
        return (self.recipe, self.images, self.classes) != (None, None, None)  # an empty one is a mistake


def standing_in() -> Path:
    """Return the folder that the user stands in.

    Raises:
        PrgkitError: it is gone.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        name = os.environ.get("PWD", "")
        there = f"cd {shlex.quote(name)} enters the one that has its name now"
        fix = there if os.path.isdir(name) else "cd to one that exists"
        raise PrgkitError("the folder that you stand in is gone", where=name or None, fix=fix) from error


@dataclass
class Session:
    """What the commands of one chain share."""

    terminal: Terminal
    is_main_process: bool = True  # False in all but the first of the processes that torchrun starts
    processes: int = 1  # that torchrun started
    folder: Path | None = None  # the run, or the bundle, that the chain is about
    recipe_options: RecipeOptions | None = None  # those so far: a command that names no recipe means the one before
    failure: PrgkitError | None = None  # raised at the end, after the results are printed
    as_json: bool = False  # what the commands return is printed, at the end
    export_options: ExportOptions | None = None  # of the chain's export, if it has one
    dry_run: bool = False  # --dry-run was given: what follows would have nothing to work on
    typed_in: Path = field(default_factory=standing_in)

    def place(self, given: Path | None) -> Path | None:
        """Return a path as it was typed, or the whole of it where the command works in a run's own place by now."""
        return given if given is None or Path.cwd() == self.typed_in else self.typed_in / given

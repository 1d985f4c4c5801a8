"""The run or the bundle that a command means: the one named, the one stood in, or the newest."""

from __future__ import annotations

import os
import re
import shlex
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prgkit.errors import RunError
from prgkit.storage.atomic import read_json, sha256
from prgkit.storage.run import Run

RUNS = Path("runs")

LONGEST_NAME_BYTES = 200  # most file systems take 255


def find_run(given: Path | None) -> Run:
    """Return the run that a command means: the one given, the one stood in, or the newest under runs/.

    Raises:
        RunError: there is none.
    """
    if given is not None:
        if (given / "recipe.yaml").is_file():
            return Run(given)
        if given.is_file():
            raise packed_or_no_folder(given)
        raise RunError(
            "this is no run folder: it has no recipe.yaml" if given.exists() else "there is no such run folder",
            where=given,
            fix="prgkit distill RECIPE makes one",
        )
    if Path("recipe.yaml").is_file() and Path("card.json").is_file():
        return Run(Path())
    runs = sorted(RUNS.glob("*/card.json"), key=lambda card: card.stat().st_mtime)
    if not runs:
        raise RunError(
            "there is no run here", where=Path.cwd(), fix="prgkit distill demo makes one, or name one with --run FOLDER"
        )
    return Run(runs[-1].parent)


def packed_or_no_folder(file: Path) -> RunError:
    """Build the error for a file where a folder is meant: most likely a bundle that is still packed."""
    if not zipfile.is_zipfile(file):
        return RunError("this is a file, not a run or a bundle", where=file, fix="give the folder that holds it")
    unpack = f"python -m zipfile -e {shlex.quote(str(file))} ."
    return RunError("this bundle is still packed", where=file, fix=f"unpack it here, and give its folder: {unpack}")


def find_bundle(given: Path | None) -> tuple[Path, Run | None]:
    """Return the bundle that a command means and the run it lies in, if any; found as `find_run` finds a run.

    Raises:
        RunError: there is no run, it has not been exported, or the bundle holds another student than the run.
    """
    place = given or Path()
    run: Run | None
    if (place / "manifest.json").is_file():
        bundle, run = place, Run(place.resolve().parent)
        if not run.recipe_file.is_file() or run.bundle != bundle.resolve():
            return bundle, None
    else:
        run = find_run(given)
        bundle = run.bundle
    again = f"prgkit export --run {shlex.quote(str(run.folder))}"
    if not (bundle / "manifest.json").is_file():
        raise RunError("the run has not been exported yet", where=run.folder, fix=again)
    exported = read_json(bundle / "manifest.json").get("run", {}).get("student_sha256")
    if run.weights.exists() and exported != sha256(run.weights):
        raise RunError("the bundle is stale: it holds another student than the run", where=bundle, fix=again)
    return bundle, run


@contextmanager
def standing_where_it_started(run: Run) -> Iterator[Run]:
    """Work in the folder that the run was started from: its recipe's relative paths begin there.

    The folder is remembered relative to the run, so that a project can be moved as a whole.
    """
    before, folder = Path.cwd(), run.folder.resolve()
    origin = folder / run.card.origin
    if origin.resolve() == before or not origin.is_dir():
        yield run
        return
    os.chdir(origin)
    try:
        yield Run(folder)
    finally:
        os.chdir(before)


def run_name(source: str) -> str:
    """Return a folder name for a recipe or a source of images, in letters that every system takes.

    A path gives its last part, ``torchvision:CIFAR100/train`` all of its own.
    """
    scheme, colon, rest = source.partition(":")
    spelled = colon and scheme in ("torchvision", "hf", "demo")
    # What follows decides where a run is written, and may be a stranger's recipe: one part of a path, no more.
    words = rest if spelled else os.path.basename(os.path.abspath(os.path.expanduser(source.replace("\0", ""))))
    stem = re.sub(r"\.(yaml|yml|zip|tar(\.\w+)?|tgz)$", "", words)
    name = re.sub(r"[^\w.-]+", "-", stem).encode()[:LONGEST_NAME_BYTES].decode(errors="ignore")
    return name.strip("-.") or "run"

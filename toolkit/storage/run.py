"""A run folder: the one place that knows a file's name inside it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from prgkit import __version__
from prgkit.config.messages import first_mistake
from prgkit.config.recipe import NOT_LEARNED_FROM, Recipe, save_recipe, validate
from prgkit.config.yaml_io import YamlMapping, read_yaml
from prgkit.errors import PrgkitError, RunError
from prgkit.storage.atomic import read_json, read_sealed, sha256, write_sealed
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.run_card import SCHEMA, ImageFacts, RunCard, StudentFacts, TeacherFacts

RUNS = Path("runs")
LONGEST_NAME_BYTES = 200  # most file systems take 255
Metrics = dict[str, int | float]  # of an epoch: its number, the losses, the agreement, the seconds so far
Facts = TypeVar("Facts")
TICKS = Path("audit") / "ticks.csv"  # in a run, and in the bundle that travels


class Run:
    """One student's folder: its recipe, its card, its weights, and what was measured while it learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.card_file = folder / "card.json"
        self.weights = folder / "student.safetensors"
        self.state = folder / "state" / "checkpoint.safetensors"
        self.quality_file = folder / "quality.json"
        self.answers_file = folder / "answers.json"  # how the teacher's answers were put right
        self.confidence_file = folder / "confidence.npy"  # of the teacher in them, where images are chosen by it
        self.snapshot_file = folder / "images.npz"  # which images it was made from
        self.metrics_file = folder / "metrics.jsonl"
        self.ticks_file = folder / TICKS
        self.sample_file = self.ticks_file.with_name("sample.json")  # which images are on the sheet, and why those
        self.sheet_file = self.ticks_file.with_name("sheet.html")
        self.bundle = folder / "bundle"
        self.bench = folder / "bench"
        self.trackers = folder / "trackers"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe the run was started with."""
        return validate(read_yaml(self.recipe_file), where=self.recipe_file)

    @property
    def card(self) -> RunCard:
        """What the run is made from and how far it is.

        Raises:
            RunError: the card is missing, damaged, or of another version of prgkit.
        """
        content = read_sealed(self.card_file, fix=self.lost_card())
        if content.get("schema") != SCHEMA:
            what = f"the run's card is {content.get('schema', 'of no schema')}, and this prgkit reads {SCHEMA}"
            raise RunError(what, where=self.card_file, fix=self.lost_card())
        try:
            return RunCard.model_validate(content)
        except ValidationError as error:
            what = f"{self.card_file.name} is damaged: {first_mistake(error)}"
            raise RunError(what, where=self.card_file, fix=self.lost_card()) from error

    def update_card(self, **facts: Any) -> None:
        """Add facts to the card; the file is replaced whole."""
        known = self.card.to_json() if self.card_file.exists() else {}
        write_sealed(self.card_file, RunCard.model_validate({**known, **facts}).to_json())

    @property
    def image_facts(self) -> ImageFacts:
        """What is known of its images since they were read."""
        return self._known(self.card.images)

    @property
    def teacher_facts(self) -> TeacherFacts:
        """What is known of its teacher since the images were read."""
        return self._known(self.card.teacher)

    @property
    def student_facts(self) -> StudentFacts:
        """What is known of its student since it was built."""
        return self._known(self.card.student)

    def _known(self, facts: Facts | None) -> Facts:
        if facts is None:
            again = f"prgkit distill {shlex.quote(str(self.recipe_file))} --run {shlex.quote(str(self.folder))}"
            raise RunError("the run was stopped before it knew that", where=self.folder, fix=f"{again} goes on with it")
        return facts

    @property
    def target_stores(self) -> list[Path]:
        """The store of each of its teachers, seen from where it was started; none before the teachers are known."""
        return [Path(store) for store in self.card.teacher.targets] if self.card.teacher is not None else []

    def lost_card(self) -> str:
        """Say what brings a damaged card back: the run's own command finds its recipe and its checkpoint."""
        recipe, folder = shlex.quote(str(self.recipe_file)), shlex.quote(str(self.folder))
        return f"delete it, then: prgkit distill {recipe} --run {folder}"

    def clear_leftovers(self) -> None:
        """Remove what a kill left half-written of the files that only the holder of the run's lock writes."""
        for file in (self.state, self.weights, self.metrics_file, self.quality_file):
            for leftover in file.parent.glob(f".{file.name}.*.part"):
                leftover.unlink()

    @property
    def begun(self) -> bool:
        """Whether anything was learned in it."""
        return any(file.exists() for file in (self.state, self.weights, self.metrics_file))

    @property
    def used(self) -> bool:
        """Whether anything was done in it that another recipe's run must not replace."""
        return self.begun or any(
            place.exists() for place in (self.ticks_file, self.sample_file, self.bundle, self.bench)
        )

    def forget(self) -> None:
        """Remove what a start leaves in a run in which nothing was done; the recipe goes last.

        Raises:
            RunError: another process draws a sample of it to tick.
        """
        sample, files = self.ticks_file.parent, (self.quality_file, self.answers_file, self.confidence_file)
        with locked(sample, "audit"):
            for place in (self.state.parent, self.trackers, sample):
                shutil.rmtree(place, ignore_errors=True)
        for file in (*files, self.snapshot_file, self.card_file, self.recipe_file):
            file.unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the student is trained."""
        return self.card_file.exists() and self.card.finished

    def quality(self) -> dict[str, Any] | None:
        """Return what was known of the pseudo-labels before training, where that was written down."""
        if not self.quality_file.exists():
            return None
        return read_sealed(self.quality_file, fix="delete it: the report does without")

    def metrics(self) -> list[Metrics]:
        """Return the metrics, one record an epoch; a torn last line is left out."""
        return self._metrics.records(fix="delete that line: one epoch's figures are lost, and nothing else is")

    def append_metrics(self, record: Metrics) -> None:
        """Append one epoch's record and flush it to the disk."""
        self._metrics.append(record)

    def keep_metrics(self, epochs: int) -> None:
        """Drop the records after ``epochs``: they came after the checkpoint that training goes on from."""
        kept = [record for record in self.metrics() if record["epoch"] <= epochs]
        if len(kept) < len(self._metrics.lines()):
            self._metrics.replace(kept)

    @property
    def _metrics(self) -> Journal[Metrics]:
        return Journal(self.metrics_file, Metrics)


def start_run(folder: Path, recipe: Recipe) -> Run:
    """Open ``folder`` as the run of ``recipe``: a new one, or the same one to go on with.

    One of another recipe in which nothing was done becomes a new one. To be called by the holder of the run's lock, but
    for a run that is this recipe's already.

    Raises:
        RunError: the folder holds a run of another recipe, or something else.
    """
    require_own_folder(folder, recipe)
    run = Run(folder)
    if run.recipe_file.exists() and differences(run, recipe):
        run.forget()
    base = {
        "schema": SCHEMA,
        "prgkit": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fingerprint": recipe.fingerprint(),
        "origin": os.path.relpath(Path.cwd(), folder),
        "finished": False,
    }
    if run.recipe_file.exists():
        save_recipe(recipe, run.recipe_file)  # what may change in a run: its export and how it is watched
        if not run.card_file.exists():  # the first start was stopped between the two
            run.update_card(**base)
        return run
    save_recipe(recipe, run.recipe_file)
    run.update_card(**base)
    return run


def require_own_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder in which a run of ``recipe`` can neither start nor go on.

    Raises:
        RunError: the folder holds a run of another recipe, or something else.
    """
    run = Run(folder)
    if run.recipe_file.exists():
        if run.used and (changed := differences(run, recipe)):
            raise RunError(
                f"this run was made from another recipe; it differs in {', '.join(changed)}",
                where=folder,
                fix=f"start a new run with --run {folder}-2, or delete {folder}",
            )
    elif folder.exists() and any(not is_leftover(path) for path in folder.iterdir()):
        raise RunError(
            "the folder is not empty and holds no run", where=folder, fix="give --run a new or an empty folder"
        )


def undoing(run: Run) -> Callable[[], None]:
    """Return what undoes a start, from before it: where nothing was done, the folder is left as it is now."""
    new, made = not run.recipe_file.exists(), not run.folder.exists()

    def undo() -> None:
        if not new or run.used:
            return
        with suppress(RunError):
            run.forget()
            if made:
                shutil.rmtree(run.folder, ignore_errors=True)

    return undo


def differences(run: Run, recipe: Recipe) -> list[str]:
    """Return the keys in which a run's recipe is another one than ``recipe``."""
    changed = changed_keys(run.recipe, recipe)
    if not changed and any(teacher.context for teacher in recipe.teacher) and run.card_file.exists():
        return [] if run.card.fingerprint == recipe.fingerprint() else ["what teacher.context holds"]
    return changed


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
    here, folder = Path.cwd(), run.folder.resolve()
    origin = folder / run.card.origin
    if origin.resolve() == here or not origin.is_dir():
        yield run
        return
    os.chdir(origin)
    try:
        yield Run(folder)
    finally:
        os.chdir(here)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Return the dotted keys that make two recipes different runs."""
    before, after = (_flat(recipe.model_dump(mode="json", exclude=NOT_LEARNED_FROM)) for recipe in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


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


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a kill left behind: a half-written one, or a lock."""
    return path.name.startswith(".lock") or (path.name.startswith(".") and path.name.endswith(".part"))


class Interrupted(PrgkitError):  # noqa: N818 - nothing went wrong
    """The user, or the system, asked to stop; everything computed so far is saved."""

    exit_code = 130  # as after any SIGINT


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; the loop looks between steps and saves.

    A second signal of the same kind ends the process as usual.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _flat(config: YamlMapping, prefix: str = "") -> YamlMapping:
    flat: YamlMapping = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

"""A run folder: the one place that knows a file's name inside it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from prgkit import __version__
from prgkit.config.messages import first_mistake
from prgkit.config.recipe import Recipe, save_recipe, validate
from prgkit.config.sections import StudentConfig
from prgkit.config.yaml_io import YamlMapping, read_yaml
from prgkit.errors import RunError
from prgkit.storage.atomic import read_sealed, sha256, write_sealed
from prgkit.storage.documents import read_document
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.quality import Statistics
from prgkit.storage.run_card import SCHEMA, ImageFacts, RunCard, StudentFacts, TeacherFacts

Metrics = dict[str, int | float]  # of an epoch: its number, the losses, the agreement, the seconds so far
Facts = TypeVar("Facts")
NO_FILE = ("random", "pretrained")  # what student.initial can be besides a path
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
        self.refinement_file = folder / "refinement.safetensors"  # what was fitted to the images, where that was asked
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
        fix = f"delete it, then: {self.command}"
        return read_document(self.card_file, RunCard, SCHEMA, what="a run's card", fix=fix, error=RunError)

    def update_card(self, **facts: Any) -> None:
        """Add facts to the card; the file is replaced whole."""
        known = self.card.to_json() if self.card_file.exists() else {}
        write_sealed(self.card_file, RunCard.model_validate({**known, **facts}).to_json())

    @property
    def image_facts(self) -> ImageFacts:
        """What is known of its images since they were read."""
        return self._known(self.card.images, "its images were read")

    @property
    def teacher_facts(self) -> TeacherFacts:
        """What is known of its teacher since the images were read."""
        return self._known(self.card.teacher, "its images were read")

    @property
    def student_facts(self) -> StudentFacts:
        """What is known of its student since it was built."""
        return self._known(self.card.student, "its student was built")

    def _known(self, facts: Facts | None, since: str) -> Facts:
        if facts is None:
            raise RunError(f"the run was stopped before {since}", where=self.folder, fix=f"go on: {self.command}")
        return facts

    @property
    def command(self) -> str:
        """The command that goes on with it; it finds its recipe and its checkpoint, and writes a lost card anew."""
        return f"prgkit distill {shlex.quote(str(self.recipe_file))} --run {shlex.quote(str(self.folder))}"

    @property
    def target_stores(self) -> list[Path]:
        """The store of each of its teachers, seen from where it was started; none before the teachers are known."""
        return [Path(store) for store in self.card.teacher.targets] if self.card.teacher is not None else []

    def clear_leftovers(self) -> None:
        """Remove what a kill left half-written of the files that only the holder of the run's lock writes."""
        found = (self.quality_file, self.answers_file, self.refinement_file, self.confidence_file)
        for file in (self.state, self.weights, self.metrics_file, *found):
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
        files = (self.quality_file, self.answers_file, self.refinement_file, self.confidence_file)
        sample = self.ticks_file.parent
        with locked(sample, "audit"):
            for place in (self.state.parent, self.trackers, sample):
                shutil.rmtree(place, ignore_errors=True)
        for file in (*files, self.snapshot_file, self.card_file, self.recipe_file):
            file.unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the student is trained."""
        return self.card_file.exists() and self.card.finished

    def quality(self) -> Statistics | None:
        """Return what was known of the pseudo-labels before training, where that was written down."""
        if not self.quality_file.exists():
            return None
        fix = "delete it: the report does without"
        try:
            return Statistics.model_validate(read_sealed(self.quality_file, fix=fix))
        except ValidationError as mistakes:
            damage = f"{self.quality_file.name} is damaged: {first_mistake(mistakes)}"
            raise RunError(damage, where=self.quality_file, fix=fix) from mistakes

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
    save_recipe(recipe, run.recipe_file)  # of a run to go on with, its export and how it is watched may have changed
    if not run.card_file.exists():  # the run is new, or its first start was stopped between the two
        run.update_card(
            schema=SCHEMA,
            prgkit=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            fingerprint=recipe.fingerprint(),
            origin=os.path.relpath(Path.cwd(), folder.resolve()),  # a link on the way would lead ".." elsewhere
            finished=False,
        )
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
                fix=f"start a new run with --run {shlex.quote(f'{folder}-2')}, or delete {folder}",
            )
    elif initial_weights(recipe.student) in (folder, run.weights):
        what, fix = "student.initial names the run itself", "name another run, or give this one another folder: --run"
        raise RunError(what, where=folder, fix=fix)
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
    if changed or not run.card_file.exists():
        return changed
    if any(teacher.context for teacher in recipe.teacher) and run.card.fingerprint != recipe.fingerprint():
        changed.append("what teacher.context holds")
    began, weights = run.card.student and run.card.student.initial_sha256, initial_weights(recipe.student)
    if began and weights is not None and weights.is_file() and sha256(weights) != began:
        changed.append("what student.initial holds")
    return changed


def initial_run(config: StudentConfig) -> Run | None:
    """Return the run whose student another one starts from; None where it starts from something else."""
    run = Run(Path(os.path.expanduser(config.initial)))
    return run if config.initial not in NO_FILE and run.recipe_file.is_file() else None


def initial_weights(config: StudentConfig) -> Path | None:
    """Return the file of weights that a student starts from, a run's or another; None where there is none."""
    run = initial_run(config)
    if run is not None:
        return run.weights
    return None if config.initial in NO_FILE else Path(os.path.expanduser(config.initial))


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Return the dotted keys that make two recipes different runs."""
    before, after = (_flat(recipe.model_dump(mode="json", exclude=recipe.not_learned_from)) for recipe in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a kill left behind: a half-written one, or a lock."""
    return path.name.startswith(".lock") or (path.name.startswith(".") and path.name.endswith(".part"))


def _flat(config: YamlMapping, prefix: str = "") -> YamlMapping:
    flat: YamlMapping = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

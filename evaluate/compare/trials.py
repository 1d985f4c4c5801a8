"""`prgkit compare`: objectives x students x seeds on the same targets and split, each trained, judged, written down.

A cell is a run like any other, with a file that says what came out of it; a comparison that was stopped goes on where
it was. Labels are read when all of a cell's choices have been made: they judge a student and select nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import Recipe, validate
from prgkit.data.augment import evaluation_views
from prgkit.data.index import ImageIndex, read_image_index, select_labelled
from prgkit.data.snapshot import load_snapshot
from prgkit.device import best_device
from prgkit.errors import ImagesError, PrgkitError, RecipeError, RunError, nearest
from prgkit.evaluate.compare.aggregate import standings, write_standings
from prgkit.evaluate.compare.base_to_novel import Novel, halves, judge_novel, require_two_halves
from prgkit.export.from_run import teacher_logits
from prgkit.metrics import scores, top1
from prgkit.progress import Progress
from prgkit.storage.atomic import fingerprint, read_json, write_json
from prgkit.storage.run import Run
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.ensemble import existing_targets
from prgkit.training.distill import distill
from prgkit.training.prepare import hold_out

CELL = "prgkit.cell/1"
# METHOD's minimum ladder: each rung adds one thing to the one before, or takes one of the two parts of PRG away.
LADDER: Mapping[str, Mapping[str, Any]] = {
    "ce": {"name": "ce"},
    "kd": {"name": "kd"},
    "prg, nodes only": {"name": "prg", "edge_weight": 0.0},
    "prg, edges only": {"name": "prg", "node_weight": 0.0},
    "prg": {"name": "prg"},
}


@dataclass(frozen=True)
class Trial:
    """One student, one objective and one seed."""

    row: str
    recipe: Recipe

    @property
    def folder_name(self) -> str:
        """Its folder's name: what can differ between cells, and the recipe's fingerprint."""
        student = self.recipe.student.model.rpartition("/")[2]  # of hf-hub:timm/NAME the name, which makes no folder
        return f"{student}-{self.recipe.objective_name}-{self.recipe.fingerprint()[:12]}"


def trials_of(
    recipe: Recipe,
    *,
    objectives: Sequence[str],
    students: Sequence[str],
    seeds: int,
    ladder: bool = False,
    sweeps: Sequence[tuple[str, Sequence[Any]]] = (),
    base_to_novel: bool = False,
) -> list[Trial]:
    """Return every cell of a comparison, rows together and seeds last.

    Args:
        recipe: what all cells share.
        objectives: names; the recipe's own parameters of one are kept, else its defaults hold.
        students: timm models; none for the recipe's.
        seeds: how many, counted from the recipe's own.
        ladder: `LADDER` in place of ``objectives``.
        sweeps: parameters of objectives and the values they take, in every combination; an objective without the
            parameter stands there once.
        base_to_novel: teach the first half of the classes alone, and no labelled images beside them.

    Raises:
        RecipeError: an objective or a parameter is not known, or a value cannot stand there.
    """
    for name in objectives:
        if name not in OBJECTIVES:
            raise RecipeError(
                f"unknown objective {name!r}{nearest(name, OBJECTIVES)}", fix=f"known: {', '.join(OBJECTIVES)}"
            )
    rows = LADDER if ladder else {name: {"name": name} for name in objectives}
    pages = {row: {**own_parameters(recipe, page["name"]), **page} for row, page in rows.items()}
    if not pages:
        raise RecipeError("there is no objective to compare", fix=f"name some of {', '.join(OBJECTIVES)}")
    for place, (key, _) in enumerate(sweeps):
        if key in (before for before, _ in sweeps[:place]):
            raise RecipeError(f"{key} is swept twice", fix=f"give all its values at once: --sweep {key}=0,1,3")
        if ladder and any(key in page for page in LADDER.values()):
            raise RecipeError(f"the ladder itself sets {key}", fix="sweep it with --objectives prg")
        fields = {name for page in pages.values() for name in OBJECTIVES[page["name"]].model_fields}
        if key not in fields - {"name"}:
            raise RecipeError(
                f"no objective of this comparison has a parameter {key!r}{nearest(key, fields)}",
                fix=f"choose one of {', '.join(sorted(fields - {'name'}))}",
            )
    raw = recipe.model_dump(mode="json")
    if base_to_novel:
        require_two_halves(recipe)
        raw["data"] |= {"classes": halves(recipe.classes)[0], "evaluation": None, "evaluation_labels": None}
    cells = []
    for student, (row, page), seed in product(
        students or [recipe.student.model], swept(pages, sweeps).items(), range(seeds)
    ):
        changed = {
            **raw,
            "student": {**raw["student"], "model": student},
            "objective": page,
            "training": {**raw["training"], "seed": recipe.training.seed + seed},
        }
        cells.append(Trial(row, validate(changed, where=f"the comparison's {row}").resolved()))
    return cells


def own_parameters(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the recipe's own page of an objective; of another, what every objective has."""
    pages = [page.model_dump(mode="json") for page in recipe.objective if page.name == name]
    return {**pages[0], "weight": 1.0} if pages else {"prompt_weighting": recipe.prompt_weighting}


def swept(
    pages: Mapping[str, Mapping[str, Any]], sweeps: Sequence[tuple[str, Sequence[Any]]]
) -> dict[str, dict[str, Any]]:
    """Return each row with every combination of the swept parameters it has."""
    rows: dict[str, dict[str, Any]] = {}
    for row, page in pages.items():
        mine = [(key, values) for key, values in sweeps if key in OBJECTIVES[page["name"]].model_fields]
        for values in product(*(values for _, values in mine)):
            chosen = dict(zip((key for key, _ in mine), values, strict=True))
            name = ", ".join([row, *(f"{key} {value}" for key, value in chosen.items())])
            rows[name] = {**page, **chosen}
    return rows


def compare(
    cells: Sequence[Trial],
    out: Path,
    targets_root: Path,
    progress: Progress,
    *,
    command: str,
    whole: Recipe | None = None,
) -> dict[str, Any]:
    """Train and judge every cell that is not finished, write the comparison into ``out`` and return it.

    ``whole`` is the recipe with all classes where the cells were taught the base ones. A cell whose training comes
    apart is left out and named under ``failed``.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the same command goes on.
        PrgkitError: for anything the user can mend; the cells that are finished stay.
    """
    split = EvalSplit.of(whole or cells[0].recipe, targets_root, progress, base_to_novel=whole is not None)
    told: Progress = progress
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, 1):
        recipe, folder = cell.recipe, out / "cells" / cell.folder_name
        name = f"{recipe.student.model}, {cell.row}, seed {recipe.training.seed}"
        result = finished(folder / "cell.json", cell, split)
        if result is None:
            progress.note(f"cell {number} of {len(cells)}: {name}")
            try:
                run = distill(recipe, folder, targets_root, told)
            except RunError as error:
                progress.note(f"left out: {error}")
                failed.append({"cell": name, "reason": str(error)})
                continue
            told = ProgressOnly(progress)
            if (snapshot := load_snapshot(run)) is not None and snapshot.keys != split.learned:
                raise changed(folder)
            result = judge(run, recipe, split, progress)
            write_json(folder / "cell.json", result)
        done.append({"row": cell.row, **result})
    if not done:
        raise RunError(f"no cell could be trained; the first: {failed[0]['reason']}", where=out)
    found = {**standings(done), "failed": failed, "command": command}
    write_standings(out, found)
    return found


def finished(path: Path, cell: Trial, split: EvalSplit) -> dict[str, Any] | None:
    """Return what a cell came to, or None where it is not finished, or was judged on other images or labels.

    Raises:
        RunError: it learned from other images than there are now, so that it cannot stand beside new cells.
    """
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = read_json(path)
    except PrgkitError:
        return None
    if result.get("schema") != CELL or result.get("fingerprint") != cell.recipe.fingerprint():
        return None
    if result["learned_from"] != split.learned_from:
        raise changed(path.parent)
    return result if result["evaluation"]["digest"] == split.digest else None


def changed(folder: Path) -> RunError:
    """Build the error for a cell that cannot stand beside others, as it learned from other images."""
    what = "the images have changed since this cell was trained"
    return RunError(what, where=folder, fix="compare in another --out")


@dataclass(frozen=True)
class ProgressOnly:
    """Whoever watches, but not told again what the first cell has told of the images and the teacher's answers."""

    progress: Progress

    def start(self, stage: str, total: int, unit: str) -> None:
        """Tell of a stage."""
        self.progress.start(stage, total, unit)

    def advance(self, count: int, facts: str = "") -> None:
        """Tell of progress."""
        self.progress.advance(count, facts)

    def note(self, text: str) -> None:
        """Tell no one."""


@dataclass(frozen=True)
class EvalSplit:
    """What students are judged on: the labelled images, or where there are none those held out from training."""

    images: ImageIndex
    positions: NDArray[np.int64]
    labels: NDArray[np.int64] | None  # [n]
    learned_from: str  # the fingerprint of the images that are learned from,
    learned: frozenset[str]  # and the keys of those without a label
    novel: Novel | None = None  # what is asked besides, of names that no one was taught

    @classmethod
    def of(cls, recipe: Recipe, targets_root: Path, progress: Progress, *, base_to_novel: bool = False) -> EvalSplit:
        """Read all of them: no device has to carry them here."""
        seen = existing_targets(recipe, targets_root) or ()
        learned = read_image_index(recipe.data.image_spec, progress, known=seen)
        origin, keys = fingerprint(learned.keys), frozenset(learned.keys)
        if spec := recipe.data.labelled_spec:
            few = read_image_index(spec, progress, known=seen, grey=learned.source.grey)
            few, truth = select_labelled(few, recipe.classes, note=progress.note)
            origin = fingerprint([origin, few.keys, truth.tolist()])
        if not (spec := recipe.data.evaluation_spec):
            return cls(learned, hold_out(learned.keys, recipe.data.held_out), None, origin, keys)
        images = read_image_index(spec, progress, known=seen, grey=learned.source.grey)
        images, labels = select_labelled(images, recipe.classes, note=progress.note)
        places = np.arange(len(images))
        if not base_to_novel:
            return cls(images, places, labels, origin, keys)
        base, names = halves(recipe.classes)
        taught = labels < len(base)
        if taught.all() or not taught.any():
            raise ImagesError(
                f"all evaluation images are of the {'first' if taught.all() else 'second'} half of the classes",
                where=images.source.spec,
                fix="name images of both halves as data.evaluation",
            )
        novel = Novel(names, places[~taught], labels[~taught] - len(base))
        return cls(images, places[taught], labels[taught], origin, keys, novel)

    @property
    def digest(self) -> str:
        """What changes when other images are judged, or other labels judge them."""
        judged: list[Any] = [self.images.keys, None if self.labels is None else self.labels.tolist()]
        if self.novel is not None:
            judged += [self.positions.tolist(), self.novel.names]
        return fingerprint(judged)


def judge(run: Run, recipe: Recipe, split: EvalSplit, progress: Progress) -> dict[str, Any]:
    """Return what a finished cell came to, as its file tells it: shares in percent, and every answer."""
    weighted, uniform = teacher_logits(run, recipe, split.images, split.positions, progress)
    student, card, labels = load_student(run).to(best_device()), run.card, split.labels
    workers = recipe.training.workers
    shown = evaluation_views(split.images, student.preprocessing, split.positions, workers=workers)
    logits = student_logits(student, shown)
    novel = judge_novel(run, recipe, split.images, split.novel, progress) if split.novel else None
    return {
        "schema": CELL,
        "fingerprint": recipe.fingerprint(),
        "learned_from": split.learned_from,
        "student": recipe.student.model,
        "image_size": recipe.student.image_size,
        "objective": [page.model_dump(mode="json") for page in recipe.objective],
        "seed": recipe.training.seed,
        "epochs": recipe.training.epochs,
        "images": run.image_facts.used,
        "images_per_s": card.images_per_s,
        # By agreement with the teacher on the held-out images, no label among them.
        "selected": card.best.model_dump() if card.best is not None else None,
        "evaluation": {
            "source": split.images.source.spec,
            "images": len(split.positions),
            "digest": split.digest,
        },
        "teacher": {
            "model": recipe.teacher_name,
            "top1": None if labels is None else top1(weighted, labels),
            "top1_uniform": None if labels is None else top1(uniform, labels),
        },
        **{
            key: value
            for key, value in scores(logits, teacher=weighted, labels=labels).items()
            if key not in ("agreement_fp32",)
        },
        "novel": novel,
        "answers": logits.argmax(axis=1).tolist(),
        "labels": None if labels is None else labels.tolist(),
    }

"""`prgkit compare`: objectives x students x seeds on the same targets and split, each trained, judged, written down.

A trial is a run like any other, with a file that says what came out of it; a comparison that was stopped goes on where
it was. Labels are read when all of a trial's choices have been made: they judge a student and select nothing.
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
from prgkit.config.sections import RANDOM
from prgkit.data.augment import evaluation_views
from prgkit.data.index import ImageIndex, read_image_index, select_labelled
from prgkit.data.snapshot import load_snapshot
from prgkit.device import best_device
from prgkit.errors import CameApartError, ImagesError, PrgkitError, RecipeError, RunError, nearest
from prgkit.evaluate.compare.aggregate import aggregate, write_comparison
from prgkit.evaluate.compare.base_to_novel import Novel, halves, judge_novel, require_two_halves
from prgkit.evaluate.compare.schema import (
    TRIAL_SCHEMA,
    Config,
    FailedTrial,
    JudgedImages,
    ObjectiveComparison,
    TrialResult,
    TrialTeacher,
)
from prgkit.metrics import scores, top1
from prgkit.progress import Progress
from prgkit.storage.atomic import fingerprint, sha256, write_json
from prgkit.storage.documents import read_document
from prgkit.storage.run import Run, initial_weights
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.answers import teacher_answers
from prgkit.teacher.ensemble import existing_targets
from prgkit.teacher.weights import teacher_identity, weights_identity
from prgkit.training.distill import distill
from prgkit.training.prepare import hold_out, without

# Each rung adds one thing to the one before, or takes one of the two parts of PRG away.
LADDER: Mapping[str, Config] = {
    "ce": {"name": "ce"},
    "kd": {"name": "kd"},
    "prg, nodes only": {"name": "prg", "edge_weight": 0.0},
    "prg, edges only": {"name": "prg", "node_weight": 0.0},
    "prg": {"name": "prg"},
}


@dataclass(frozen=True)
class Trial:
    """One student, one objective and one seed."""

    label: str  # the objective as the comparison names it
    recipe: Recipe
    control: bool = False  # its teacher has random weights, beside that of the others

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.recipe.student.model}, {self.label}, seed {self.recipe.training.seed}"

    def folder(self, out: Path) -> Path:
        """Return its run's folder, named by what can differ between trials and by the recipe's fingerprint."""
        student = self.recipe.student.model.rpartition("/")[2]  # of hf-hub:timm/NAME the name, which makes no folder
        return out / "trials" / f"{student}-{self.recipe.objective_name}-{self.recipe.fingerprint()[:12]}"

    def file(self, out: Path) -> Path:
        """Return the file that says what it came to."""
        return self.folder(out) / "trial.json"


@dataclass(frozen=True)
class Plan:
    """Which trials a comparison has, besides its recipe.

    Attributes:
        objectives: names; the recipe's own parameters of one are kept, else its defaults hold.
        students: timm models; none for the recipe's.
        seeds: how many, counted from the recipe's own.
        ladder: `LADDER` in place of ``objectives``.
        sweeps: parameters of objectives and the values they take, in every combination; an objective without the
            parameter stands there once.
        base_to_novel: teach the first half of the classes alone, and no labelled images beside them.
        random_teacher: add the last objective once more, taught by the same teacher with random weights: a control.
    """

    objectives: Sequence[str]
    students: Sequence[str]
    seeds: int
    ladder: bool = False
    sweeps: Sequence[tuple[str, Sequence[Any]]] = ()
    base_to_novel: bool = False
    random_teacher: bool = False


def trials_of(recipe: Recipe, plan: Plan) -> list[Trial]:
    """Return every trial of a comparison, rows together and seeds last.

    Raises:
        RecipeError: an objective or a parameter is not known, a value cannot stand there, or no control can be made.
    """
    configs = objective_configs(recipe, plan)
    require_sweeps(plan, configs)
    raw = recipe.model_dump(mode="json")
    if plan.base_to_novel:
        require_two_halves(recipe)
        raw["data"] |= {"classes": halves(recipe.classes)[0], "evaluation": None, "evaluation_labels": None}
    trials = []
    for student, (label, config), seed in product(
        plan.students or [recipe.student.model], swept(configs, plan.sweeps).items(), range(plan.seeds)
    ):
        changed = {
            **raw,
            "student": {**raw["student"], "model": student},
            "objective": config,
            "training": {**raw["training"], "seed": recipe.training.seed + seed},
        }
        trials.append(Trial(label, validate(changed, where=f"the comparison's {label}").resolved()))
    if plan.random_teacher:
        trials += [untaught(trial) for trial in trials if trial.label == trials[-1].label]
    return trials


def untaught(trial: Trial) -> Trial:
    """Return a trial whose teacher has random weights: what a student learns without anyone's knowledge."""
    label, raw = f"{trial.label}, random teacher", trial.recipe.model_dump(mode="json")
    random = {"weights": RANDOM, "context": None}  # a context is learned for the weights that are gone
    raw["teacher"] = [teacher.model_dump(mode="json") | random for teacher in trial.recipe.teacher]
    if len({teacher["model"] for teacher in raw["teacher"]}) < len(raw["teacher"]):
        what = "two teachers of one model are the same with random weights, so that they make no control"
        raise RecipeError(what, where="teacher", fix="leave --random-teacher out, or compare with one of them")
    return Trial(label, validate(raw, where=f"the comparison's {label}").resolved(), control=True)


def objective_configs(recipe: Recipe, plan: Plan) -> dict[str, Config]:
    """Return the objectives that are compared, by their labels."""
    for name in plan.objectives:
        if name not in OBJECTIVES:
            raise RecipeError(
                f"unknown objective {name!r}{nearest(name, OBJECTIVES)}", fix=f"known: {', '.join(OBJECTIVES)}"
            )
    chosen = LADDER if plan.ladder else {name: {"name": name} for name in plan.objectives}
    if not chosen:
        raise RecipeError("there is no objective to compare", fix=f"name some of {', '.join(OBJECTIVES)}")
    return {label: {**own_parameters(recipe, str(config["name"])), **config} for label, config in chosen.items()}


def require_sweeps(plan: Plan, configs: Mapping[str, Config]) -> None:
    """Refuse a sweep of a parameter that no objective has."""
    fields = {name for config in configs.values() for name in OBJECTIVES[str(config["name"])].model_fields} - {"name"}
    for key, _ in plan.sweeps:
        if plan.ladder and any(key in config for config in LADDER.values()):
            raise RecipeError(f"the ladder itself sets {key}", fix="sweep it with --objectives prg")
        if key not in fields:
            raise RecipeError(
                f"no objective of this comparison has a parameter {key!r}{nearest(key, fields)}",
                fix=f"choose one of {', '.join(sorted(fields))}",
            )


def own_parameters(recipe: Recipe, name: str) -> Config:
    """Return the recipe's own parameters of an objective; of another, what every objective has."""
    own = [objective.model_dump(mode="json") for objective in recipe.objective if objective.name == name]
    return {**own[0], "weight": 1.0} if own else {"prompt_weighting": recipe.prompt_weighting}


def swept(configs: Mapping[str, Config], sweeps: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, Config]:
    """Return each objective with every combination of the swept parameters it has."""
    combined: dict[str, Config] = {}
    for label, config in configs.items():
        own = [(key, values) for key, values in sweeps if key in OBJECTIVES[str(config["name"])].model_fields]
        for values in product(*(values for _, values in own)):
            chosen = dict(zip((key for key, _ in own), values, strict=True))
            combined[", ".join([label, *(f"{key} {value}" for key, value in chosen.items())])] = {**config, **chosen}
    return combined


def compare(
    trials: Sequence[Trial],
    out: Path,
    targets_root: Path,
    progress: Progress,
    *,
    command: str,
    whole: Recipe | None = None,
) -> ObjectiveComparison:
    """Train and judge every trial that is not finished, write the comparison into ``out`` and return it.

    ``whole`` is the recipe with all classes where the trials were taught the base ones. A trial whose training comes
    apart is left out and named under ``failed``.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the same command goes on.
        PrgkitError: for anything the user can mend; the trials that are finished stay.
    """
    split = EvalSplit.of(whole or trials[0].recipe, targets_root, progress, base_to_novel=whole is not None)
    watching: Progress = progress
    results, failed = [], []
    for number, trial in enumerate(trials, 1):
        result = finished(trial.file(out), trial, split)
        if result is None:
            progress.note(f"trial {number} of {len(trials)}: {trial.name}")
            folder = trial.folder(out)
            try:
                run = distill(trial.recipe, folder, targets_root, watching)
            except CameApartError as error:
                progress.note(f"left out: {error}")
                failed.append(FailedTrial(trial=trial.name, reason=str(error)))
                continue
            watching = ProgressOnly(progress)
            if (snapshot := load_snapshot(run)) is not None and snapshot.keys != split.training_keys:
                raise changed("the images have", folder)
            result = judge(run, trial, split, progress)
            write_json(trial.file(out), result.model_dump(mode="json"))
        results.append(result)
    if not results:
        raise RunError(f"no trial could be trained; the first: {failed[0].reason}", where=out)
    recipes = [trial.recipe.model_dump(mode="json") for trial in trials if not trial.control]
    told = {"failed": failed, "command": command, "recipe": common(recipes)}
    comparison = aggregate(results).model_copy(update=told)
    write_comparison(out, comparison)
    return comparison


def common(recipes: Sequence[Config]) -> Config:
    """Return the keys and values that all recipes, or sections of them, have in common."""
    found: Config = {}
    for key, value in recipes[0].items():
        values = [recipe[key] for recipe in recipes if key in recipe]
        sections = [one for one in values if isinstance(one, dict)]
        if len(sections) == len(recipes):
            found[key] = common(sections)
        elif values == [value] * len(recipes):
            found[key] = value
    return found


def finished(path: Path, trial: Trial, split: EvalSplit) -> TrialResult | None:
    """Return what a trial came to, or None where it is not finished, or was judged on other images or labels.

    Raises:
        RunError: it learned from other images or another teacher than there are now, or began with other weights, so
            that it cannot stand beside new trials.
    """
    if not path.exists():
        return None
    try:
        result = read_document(path, TrialResult, TRIAL_SCHEMA, what="a trial", fix="", sealed=False)
    except PrgkitError:
        return None
    if result.fingerprint != trial.recipe.fingerprint():
        return None
    if result.training_images != split.training_images:
        raise changed("the images have", path.parent)
    if result.teacher_files not in (None, files_of(trial.recipe)):
        raise changed("the teacher has", path.parent)
    initial = initial_weights(trial.recipe.student)
    if result.initial_sha256 and initial is not None and initial.is_file() and sha256(initial) != result.initial_sha256:
        raise changed("what student.initial holds has", path.parent)
    if result.evaluation.digest != split.digest:
        return None
    # The same recipe may have another label in another comparison.
    return result.model_copy(update={"label": trial.label, "control": trial.control})


def files_of(recipe: Recipe) -> str:
    """Return what changes when the files of the recipe's teachers do, whatever they compute with."""
    return fingerprint([weights_identity(teacher_identity(config)) for config in recipe.teacher])


def changed(what: str, folder: Path) -> RunError:
    """Build the error for a trial that cannot stand beside others, as it learned from something else."""
    return RunError(f"{what} changed since this trial was trained", where=folder, fix="compare in another --out")


@dataclass(frozen=True)
class ProgressOnly:
    """Progress without the notes on the images and the teacher's answers, which the first trial has shown."""

    progress: Progress

    def start(self, stage: str, total: int, unit: str) -> None:
        """Show a stage."""
        self.progress.start(stage, total, unit)

    def advance(self, count: int, facts: str = "") -> None:
        """Show progress."""
        self.progress.advance(count, facts)

    def note(self, text: str) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class EvalSplit:
    """What students are judged on: the labelled images, or where there are none those held out from training."""

    images: ImageIndex
    positions: NDArray[np.int64]
    labels: NDArray[np.int64] | None  # [n]
    training_images: str  # the fingerprint of the images that are learned from,
    training_keys: frozenset[str]  # and the keys of those without a label
    novel: Novel | None = None  # what is asked besides, of names that no one was taught

    @classmethod
    def of(cls, recipe: Recipe, targets_root: Path, progress: Progress, *, base_to_novel: bool = False) -> EvalSplit:
        """Read all of them: no device has to carry them here."""
        seen = existing_targets(recipe, targets_root) or ()
        learned = read_image_index(recipe.data.image_spec, progress, known=seen)
        origin, keys, barred = fingerprint(learned.keys), frozenset(learned.keys), frozenset[str]()
        if spec := recipe.data.labelled_spec:
            few = read_image_index(spec, progress, known=seen, grey=learned.source.grey)
            few, truth = select_labelled(few, recipe.classes, note=progress.note)
            origin, barred = fingerprint([origin, few.keys, truth.tolist()]), frozenset(few.keys)
        if not (spec := recipe.data.evaluation_spec):
            places = hold_out(learned.keys, recipe.data.held_out)
            return cls(learned, places[without(learned, places, barred)], None, origin, keys)
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
        keys = self.images.keys
        if self.labels is None:
            return fingerprint([[keys[place] for place in self.positions.tolist()], None])
        judged: list[Any] = [keys, self.labels.tolist()]
        if self.novel is not None:
            judged += [self.positions.tolist(), self.novel.names]
        return fingerprint(judged)


def judge(run: Run, trial: Trial, split: EvalSplit, progress: Progress) -> TrialResult:
    """Return what a finished trial came to: shares in percent, and every answer."""
    recipe, card, labels = trial.recipe, run.card, split.labels
    assert card.best is not None  # the run is finished
    assert card.images_per_s is not None
    teacher = teacher_answers(run, recipe, split.images, split.positions, progress)
    student = load_student(run).to(best_device())
    views = evaluation_views(split.images, student.preprocessing, split.positions, workers=recipe.training.workers)
    logits = student_logits(student, views)
    figures = scores(logits, teacher=teacher.logits, labels=labels)._asdict()
    del figures["agreement_fp32"]
    return TrialResult(
        label=trial.label,
        control=trial.control,
        fingerprint=recipe.fingerprint(),
        training_images=split.training_images,
        teacher_files=files_of(recipe),
        initial_sha256=run.student_facts.initial_sha256,
        student=recipe.student.model,
        image_size=recipe.student.image_size,
        objective=[objective.model_dump(mode="json") for objective in recipe.objective],
        seed=recipe.training.seed,
        epochs=recipe.training.epochs,
        images=run.image_facts.used,
        images_per_s=card.images_per_s,
        selected=card.best,
        evaluation=JudgedImages(source=split.images.source.spec, images=len(split.positions), digest=split.digest),
        teacher=TrialTeacher(
            model=recipe.teacher_name,
            top1=None if labels is None else top1(teacher.logits, labels),
            top1_uniform_prompts=None if labels is None else top1(teacher.uniform_logits, labels),
        ),
        novel=judge_novel(run, recipe, split.images, split.novel, progress) if split.novel else None,
        answers=logits.argmax(axis=1).tolist(),
        labels=None if labels is None else labels.tolist(),
        **figures,
    )

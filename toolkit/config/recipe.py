"""A recipe: one YAML file that says everything a run depends on, checked whole before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_serializer, field_validator, model_validator

from prgkit.config.image_size import sides
from prgkit.config.messages import ONE_OR_MANY, explain
from prgkit.config.objectives import OBJECTIVES, AnyObjective, Config, ObjectiveConfig
from prgkit.config.prior import EVEN, load_by_class
from prgkit.config.prompts import LEARNED, load_classes, load_templates, load_words, phrases
from prgkit.config.sections import (
    Data,
    Export,
    Keep,
    LabelFormat,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
    Training,
    Views,
)
from prgkit.config.yaml_io import YamlMapping, parse_yaml, read_yaml, write_yaml
from prgkit.errors import RecipeError, nearest
from prgkit.progress import silent
from prgkit.storage.atomic import fingerprint, sha256

# What may change in a run that was started: how it is judged, exported and watched.
NOT_LEARNED_FROM: YamlMapping = {
    "data": {"evaluation", "evaluation_labels", "label_format"},
    "training": {"workers", "checkpoint_minutes", "trackers"},
    "export": True,
}


class Recipe(Config):
    """Everything a run depends on."""

    data: Data
    teacher: tuple[TeacherConfig, ...]  # the logits of several are averaged
    views: Views = Views()
    targets: TargetsConfig = TargetsConfig()
    student: StudentConfig
    objective: tuple[AnyObjective, ...]
    training: Training = Training()
    export: Export = Export()

    @field_validator(*ONE_OR_MANY, mode="before")
    @classmethod
    def _one_or_many(cls, section: Any) -> Any:
        return tuple(section) if isinstance(section, list) else (section,)

    @field_serializer(*ONE_OR_MANY)
    def _one_as_mapping(self, section: tuple[Config, ...]) -> Any:
        configs = [config.model_dump(mode="json") for config in section]
        return configs[0] if len(configs) == 1 else configs

    @model_validator(mode="after")
    def _different_teachers(self) -> Recipe:
        if not self.teacher:
            raise ValueError("teacher: name at least one")
        names = [(teacher.model, teacher.weights) for teacher in self.teacher]
        if len(set(names)) < len(names):
            raise ValueError("teacher: each teacher of a list may stand there once")
        if len({teacher.context is None for teacher in self.teacher}) > 1:
            raise ValueError("teacher: give every teacher of a list a context, or none")
        return self

    @model_validator(mode="after")
    def _one_prompt_weighting(self) -> Recipe:
        if not self.objective:
            raise ValueError("objective: name at least one")
        names = [objective.name for objective in self.objective]
        if len(set(names)) < len(names):
            raise ValueError("objective: each objective of a list may stand there once")
        if len({objective.prompt_weighting for objective in self.objective}) > 1:
            raise ValueError("objective: every objective of a list must name the same prompt_weighting")
        return self

    @model_validator(mode="after")
    def _labels_to_learn_from(self) -> Recipe:
        if self.learns_labels and self.data.labelled is None:
            raise ValueError("data.labelled: name a few labelled images, since an objective learns from their labels")
        if self.scores_by_text and self.learns_labels:
            raise ValueError("objective: dho needs a class head, which promptkd and clipkd leave out")
        return self

    @model_validator(mode="after")
    def _keys_that_are_read(self) -> Recipe:
        data = self.data
        for images, labels in (("evaluation", data.evaluation_labels), ("labelled", data.labelled_labels)):
            if labels is not None and getattr(data, images) is None:
                raise ValueError(f"data.{images}_labels: name the images too that it labels, as data.{images}")
        if data.keep.by_class and not data.keep.asks:
            raise ValueError("data.keep.by_class: only min_confidence and weighted read it, and neither is asked for")
        return self

    @model_validator(mode="after")
    def _words_to_ask_about(self) -> Recipe:
        if self.reads_words and self.data.words is None:
            raise ValueError("data.words: give phrases that are no classes, since an objective asks about them")
        return self

    @model_validator(mode="after")
    def _corrections_that_fit(self) -> Recipe:
        targets = self.targets
        if self.scores_by_text and (targets.adjusts or targets.refine == "stata"):
            raise ValueError(
                "targets: promptkd and clipkd teach the scores of class vectors: of the corrections only refine: inmap "
                "gives such scores"
            )
        if targets.average is not None and len(self.teacher) == 1:
            raise ValueError("targets.average: it is of several teachers, and the recipe names one")
        if targets.average is not None and (self.scores_by_text or targets.refine == "inmap"):
            raise ValueError(
                "targets.average: promptkd, clipkd and refine: inmap score by the teachers' joint class vectors, which "
                "average logits; leave it out"
            )
        if targets.prior is not None and targets.refine != "inmap" and targets.debias == 0:
            raise ValueError("targets.prior: only refine: inmap and debias read it, and neither is asked for")
        return self

    @property
    def prompt_weighting(self) -> Literal["max", "mean", "softmax"]:
        """How the templates' logits become one, the same for every objective of the run."""
        return self.objective[0].prompt_weighting

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in label order; after `resolved` these are the recipe's own words."""
        return tuple(self.data.classes)

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt templates; after `resolved` these are the recipe's own words, or one for a learned context."""
        return LEARNED if self.teacher[0].context else tuple(self.data.prompts)

    @property
    def words(self) -> tuple[str, ...]:
        """The phrases that are no classes; after `resolved` these are the recipe's own words."""
        return tuple(self.data.words or ())

    @property
    def reads_words(self) -> bool:
        """Whether an objective asks the teacher about `data.words`."""
        return any(objective.reads_words for objective in self.objective)

    @property
    def scores_by_text(self) -> bool:
        """Whether the student has no class head of its own: the teacher's class vectors are shared."""
        return any(objective.scores_by_text for objective in self.objective)

    @property
    def teacher_name(self) -> str:
        """The teacher in a few words: ``ViT-L-14 openai``, or ``ViT-L-14 openai + RN50 openai`` for a list."""
        return " + ".join(teacher.name for teacher in self.teacher)

    @property
    def learns_labels(self) -> bool:
        """Whether the student has a second head, since one of the two learns from `data.labelled`."""
        return any(objective.learns_labels for objective in self.objective)

    @property
    def uses_labels(self) -> bool:
        """Whether the student, or the teacher's context, learns from a few labels."""
        return self.learns_labels or any(teacher.context for teacher in self.teacher)

    @property
    def not_learned_from(self) -> YamlMapping:
        """NOT_LEARNED_FROM without how labels are to be read, where that is said and labels are learned from."""
        if not self.learns_labels or self.data.label_format == LabelFormat():
            return NOT_LEARNED_FROM
        return {**NOT_LEARNED_FROM, "data": NOT_LEARNED_FROM["data"] - {"label_format"}}

    @property
    def reads_stages(self) -> bool:
        """Whether an objective looks at the maps that leave the student's stages."""
        return any(objective.reads_stages for objective in self.objective)

    @property
    def kept_floats(self) -> int:
        """What objectives keep of every image from step to step."""
        return sum(objective.kept_floats for objective in self.objective)

    @property
    def objective_name(self) -> str:
        """The objective in a word: ``prg``, or ``kd + prg`` for a list."""
        return " + ".join(objective.name for objective in self.objective)

    def resolved(self, note: Callable[[str], None] = silent) -> Recipe:
        """Return the recipe with every class name and template written out, so that a run needs no other file.

        ``note`` is told what was taken off the class names, and which look odd.
        """
        words = None if self.data.words is None else load_words(self.data.words)
        data = self.data.model_copy(
            update={
                "classes": load_classes(self.data.classes, note=note),
                "prompts": load_templates(self.data.prompts),
                "words": words,
            }
        )
        require_classes(self.objective, data.classes)
        require_phrases(self.objective, words or ())
        prior = load_by_class(self.targets.prior, data.classes, key="targets.prior", word=EVEN)
        weights = load_by_class(
            self.training.class_weights, data.classes, key="training.class_weights", word="balanced"
        )
        height, width = sides(self.student.image_size)
        views = self.views
        if height != width and views.aspect is None:
            views = views.model_copy(update={"aspect": round(width / height, 6)})
        sections = {
            "data": data,
            "targets": self.targets.model_copy(update={"prior": prior}),
            "training": self.training.model_copy(update={"class_weights": weights}),
            "views": views,
        }
        return self.model_copy(update=sections)

    def fingerprint(self) -> str:
        """Return what decides the trained weights: everything but `not_learned_from`, and what contexts hold.

        What is not set leaves no trace, so that a run outlives new keys.
        """
        config = self.model_dump(mode="json", exclude=self.not_learned_from, exclude_none=True)
        contexts = [Path(os.path.expanduser(teacher.context)) for teacher in self.teacher if teacher.context]
        return fingerprint([config, *(sha256(path) for path in contexts if path.is_file())] if contexts else config)


def require_classes(objectives: Sequence[AnyObjective], classes: Sequence[str]) -> None:
    """Refuse an objective that teaches nothing of so few classes."""
    for objective in objectives:
        if len(classes) < objective.fewest_classes:
            raise RecipeError(
                f"objective.standardise: of {len(classes)} classes a standardised logit says which one is larger and "
                "nothing else, so that no gradient passes",
                fix="leave it out, or learn by lelp, which is made for few classes",
            )


def require_phrases(objectives: Sequence[AnyObjective], words: Sequence[str]) -> None:
    """Refuse an objective that compares phrases with each other, and has one."""
    if sum(len(phrases(word)) for word in words) == 1 and any(objective.compares_words for objective in objectives):
        raise RecipeError(
            f"vocabulary compares phrases with each other, and {words[0]!r} is the only one",
            where="data.words",
            fix="give several, or a contrast pair such as 'old / new', or learn by aspects",
        )


def load_recipe(
    name: str,
    *,
    images: str | None = None,
    classes: str | None = None,
    overrides: Sequence[str] = (),
    note: Callable[[str], None] = silent,
) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, apply ``key=value`` overrides, and resolve it.

    ``images`` and ``classes`` take the place of its ``data.images`` and ``data.classes``, before the overrides.

    Raises:
        RecipeError: with every mistake in it at once, each with its path and the nearest right key.
    """
    path = find_recipe(name)
    raw = read_yaml(path)
    given = {f"data.{key}": value for key, value in (("images", images), ("classes", classes)) if value is not None}
    for key, value in given.items():
        section_of(raw, key)[key.removeprefix("data.")] = value
    for number, override in enumerate(overrides):
        apply_override(raw, override, earlier=overrides[:number])
    changes = [*(f"{key}={value}" for key, value in given.items()), *overrides]
    where = f"{path}, with {', '.join(changes)}" if changes else path
    return validate(raw, where=where).resolved(note)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe's name, or of a path to a YAML file."""
    path = Path(os.path.expanduser(name))
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    is_yaml = path.suffix in (".yaml", ".yml")
    if is_yaml and path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{name} is a folder, not a recipe", fix=f"--images {name} --classes FILE needs no recipe")
    files = [file.name for file in path.parent.glob("*.y*ml")]
    close = nearest(path.name, files if is_yaml else [*shipped, *files])
    raise RecipeError(
        f"there is no recipe file {name}{close}" if is_yaml else f"unknown recipe {name!r}{close}",
        fix=f"choose one of {', '.join(shipped)}, or give the path of a .yaml file",
    )


def shipped_recipes() -> dict[str, Path]:
    """Return the files that come with the package, by name."""
    folder = Path(str(resources.files("prgkit.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary_line(path: Path) -> str:
    """Return the first comment line of a recipe's file, which says what it does."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rstrip()


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads back as the same recipe."""
    write_yaml(recipe.model_dump(mode="json"), path)


def apply_override(raw: YamlMapping, override: str, *, earlier: Sequence[str] = ()) -> None:
    """Set one value of a recipe that is not checked yet: ``training.epochs=5``; the value is read as YAML.

    Another objective begins with its own defaults, also of what the old one calls alike; what an ``earlier`` override
    gave stays, where the new one has it.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set takes KEY=VALUE, not {override!r}", fix="for example --set training.epochs=5")
    section = section_of(raw, key)
    value = parse_yaml(f"value: {text}", where=f"--set {override}")["value"]
    if key == "objective.name" and str(value) in OBJECTIVES and section.get("name", value) != value:
        given = {one.partition("=")[0] for one in earlier}
        kept = {name for name in OBJECTIVES[value].model_fields if f"objective.{name}" in given}
        for foreign in section.keys() - ObjectiveConfig.model_fields.keys() - kept:
            del section[foreign]
    section[key.rpartition(".")[2]] = value


def section_of(raw: YamlMapping, key: str) -> YamlMapping:
    """Return the mapping that holds a dotted key, made where it is missing.

    Raises:
        RecipeError: something else stands in its place.
    """
    *sections, _ = key.split(".")
    section: Any = raw
    for name in sections:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise RecipeError(
            f"--set {key}: {'.'.join(sections)} is no section of keys",
            fix=f"give it as a whole: --set '{sections[0]}=...'",
        )
    return section


def validate(raw: YamlMapping, *, where: object) -> Recipe:
    """Check a recipe's content against the models; JSON keeps lists apart from tuples, and text apart from numbers.

    Raises:
        RecipeError: with every mistake in it.
    """
    try:
        return Recipe.model_validate_json(json.dumps(raw, default=str))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise RecipeError(f"the recipe cannot be read: {error}", where=where) from error
        fields = {name: field.annotation for name, field in Recipe.model_fields.items()}
        fields["teacher"] = TeacherConfig
        sections = {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Config)}
        sections.update({"": Recipe, "data.keep": Keep, "data.label_format": LabelFormat})
        listed = {name for name in ONE_OR_MANY if isinstance(raw.get(name), list)}
        mistakes = [explain(mistake, sections, OBJECTIVES, listed=listed) for mistake in error.errors()]
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise RecipeError("\n    ".join([f"the recipe has {count}:", *mistakes]), where=where) from error

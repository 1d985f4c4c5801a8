"""A recipe: one YAML page that says everything a run depends on, checked whole before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from prgkit.config.image_size import Size, sides, size_of
from prgkit.config.messages import ONE_OR_MANY, explain
from prgkit.config.objectives import OBJECTIVES, AnyObjective, Config
from prgkit.config.prompts import LEARNED, load_classes, load_templates
from prgkit.config.yaml_io import parse, read_page, write_page
from prgkit.errors import RecipeError, nearest
from prgkit.progress import silent
from prgkit.storage.atomic import fingerprint, sha256


def _shape(value: Any) -> str:
    return "a list" if isinstance(value, list | tuple) else "one word"


# Told apart by their shape, so that a mistake in a list is not also told as a list that is no word.
Words = Annotated[Annotated[str, Tag("one word")] | Annotated[tuple[str, ...], Tag("a list")], Discriminator(_shape)]


# The same of an image's size: one side of a square, or [height, width].
Side = Annotated[int, Field(ge=16)]
InputSize = Annotated[
    Annotated[Side, Tag("one word")] | Annotated[tuple[Side, Side], Tag("a list")], Discriminator(_shape)
]


class Keep(Config):
    """Which images are learned from, by the teacher's confidence: the largest probability in its answer."""

    min_confidence: float = Field(0.0, ge=0, lt=1)  # images below it are not learned from
    weighted: bool = False  # an image is in that share of the epochs that its confidence is

    @property
    def asks(self) -> bool:
        """Whether any confidence has to be known."""
        return self.weighted or self.min_confidence > 0


class LabelFormat(Config):
    """How labels are to be read, where a table or numbers do not say it for certain themselves."""

    image_column: str | None = None  # of a table: its name in the header, or its number, counted from 1
    label_column: str | None = None  # the same of the labels
    first_number: Literal[0, 1] | None = None  # what the first class's number is, where labels are numbers

    @field_validator("image_column", "label_column", mode="before")
    @classmethod
    def _number_as_text(cls, column: Any) -> Any:
        return str(column) if type(column) is int else column


class Data(Config):
    """Where the images come from, and what may be in them."""

    images: str  # a folder, a .zip, shards-{000..041}.tar, torchvision:NAME/split, hf:owner/name/split
    evaluation: str | None = None  # labelled images; their labels are read by evaluation alone
    evaluation_labels: str | None = None  # a CSV of file,label where folders or .cls members do not say it
    labelled: str | None = None  # a few labelled images; only objectives and commands that say so read them
    labelled_labels: str | None = None  # their CSV, as evaluation_labels is
    label_format: LabelFormat = LabelFormat()
    classes: Words  # a named list, a file with one name a line, or the names
    prompts: Words = "photo"  # a named template set, or templates with one {} each
    held_out: float = Field(0.05, gt=0, lt=0.5)  # share of the unlabelled images that selects the checkpoint
    keep: Keep = Keep()


class TeacherConfig(Config):
    """Any open_clip model: a name with its weights, ``hf-hub:owner/name`` or ``local-dir:path``."""

    model: str
    weights: str | None = None  # its tag; of a folder with several files of weights, one file's name
    context: str | None = None  # a file of prgkit adapt-teacher: what it learned is read in place of data.prompts
    precision: Literal["fp32", "bf16"] = "fp32"  # of its own pass
    batch_size: int = Field(64, ge=1)  # fixed, since a feature varies a little with the batch it is computed in

    @property
    def name(self) -> str:
        """The model and its weights in a few words; of a folder its own name, as where it lies is nobody's business."""
        if not self.model.startswith("local-dir:"):
            return " ".join(filter(None, (self.model, self.weights)))
        # A tag, left from the named model whose place the folder takes, says nothing of it; a file's name does.
        file = self.weights if self.weights and Path(self.weights).suffix else None
        return " ".join(filter(None, (Path(self.model).name, file)))


class Views(Config):
    """The random crops and flips that teacher and student both see."""

    count: int = Field(8, ge=1, le=255)  # random views of an image; each epoch shows the student the next one
    crop_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    flip: bool = True  # half of them mirrored
    seed: int = 0
    # Width / height that crops have on average; None: the student's, whose input is then filled without squashing.
    aspect: float | None = Field(None, gt=0)

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("must be [low, high] with 0 < low <= high <= 1")
        return scale


class TargetsConfig(Config):
    """How the teacher's answers are put right before anyone learns from them; without a label, without the teacher."""

    debias: float = Field(0.0, ge=0, le=1)  # how much of the teacher's own prior is taken off; 0: none
    entropy: float | None = Field(None, gt=0, lt=1)  # the mean that a temperature gives them, as a share of ln C

    @property
    def corrects(self) -> bool:
        """Whether the answers differ from what the teacher says by itself."""
        return self.debias > 0 or self.entropy is not None


class StudentConfig(Config):
    """Any timm model: a name of timm's, ``hf-hub:owner/name``, or ``local-dir:path`` of a folder in the hub's form."""

    model: str
    image_size: InputSize = 224  # pixels: one side of a square, or [height, width]
    initial: str = "random"  # random, pretrained, or a weights file of the same timm model
    # The share that the centre crop keeps; None: 1, or timm's own where the start is pretrained.
    crop: float | None = Field(None, gt=0, le=1)

    @field_validator("image_size")
    @classmethod
    def _square_is_a_number(cls, size: Size) -> Size:
        return size_of(size)


class Training(Config):
    """How the student is trained."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=2)  # over all processes
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has a momentum of 0.9
    learning_rate: float = Field(0.001, gt=0)  # at the end of the warm-up; it falls to zero along a cosine
    weight_decay: float = Field(0.05, ge=0)  # of matrices and kernels; biases and norms have none
    warmup_epochs: float = Field(1.0, ge=0)  # over which the rate rises, at most a fifth of the run
    gradient_clip: float | None = Field(5.0, gt=0)  # of the gradient's norm; null: none
    mixup: float | None = Field(None, gt=0)  # of Beta(mixup, mixup), by which two images are mixed, and their targets
    ema: float = Field(0.9998, ge=0, lt=1)  # warms up: min(ema, (1 + t) / (10 + t))
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto times both for a few steps and writes down which won
    compile: bool = False  # with torch.compile
    seed: int = 0
    workers: int | None = Field(None, ge=0)  # processes that decode images; None: chosen from the CPU count
    checkpoint_minutes: float = Field(5.0, gt=0)  # between two checkpoints within an epoch; each epoch ends with one
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where the metrics go besides metrics.jsonl


class Export(Config):
    """What leaves for the device."""

    opset: int = 20  # the oldest ONNX Runtime that runs it: 17 1.12, 18 1.15, 19 1.16, 20 1.17, 21 1.18, 22 1.21
    batch: tuple[int, int, int] = (1, 1, 32)  # [min, opt, max] of a TensorRT profile; opt is the deployed batch
    evaluation_images: int = Field(2000, ge=1)  # that travel in the bundle, of the held-out or labelled ones
    fidelity: float = Field(98.0, ge=90, lt=100)  # percent of those on which INT8 must surely give FP32's answer

    @field_validator("opset")
    @classmethod
    def _writable(cls, opset: int) -> int:
        if not 17 <= opset <= 23:
            raise ValueError("must be 17 to 23; ONNX Runtime 1.12 and newer run 17, 1.15 18, 1.16 19, 1.17 20")
        return opset

    @field_validator("batch")
    @classmethod
    def _ordered(cls, batch: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= batch[0] <= batch[1] <= batch[2]:
            raise ValueError("must be [min, opt, max] with 1 <= min <= opt <= max")
        return batch


# What may change in a run that was started: how it is judged, exported and watched.
NOT_LEARNED_FROM: dict[str, Any] = {
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
        pages = [page.model_dump(mode="json") for page in section]
        return pages[0] if len(pages) == 1 else pages

    @model_validator(mode="after")
    def _different_teachers(self) -> Recipe:
        if not self.teacher:
            raise ValueError("teacher: name at least one")
        names = [(page.model, page.weights) for page in self.teacher]
        if len(set(names)) < len(names):
            raise ValueError("teacher: each teacher of a list may stand there once")
        if len({page.context is None for page in self.teacher}) > 1:
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
        if self.scores_by_text and self.targets.corrects:
            raise ValueError("targets: promptkd and clipkd teach the class vectors' own scores; leave the section out")
        return self

    @property
    def prompt_weighting(self) -> Literal["max", "mean", "softmax"]:
        """How the templates' logits become one (METHOD: W), the same for every objective of the run."""
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
    def scores_by_text(self) -> bool:
        """Whether the student has no class head of its own: the teacher's class vectors are shared."""
        return any(objective.scores_by_text for objective in self.objective)

    @property
    def teacher_name(self) -> str:
        """The teacher in a few words: ``ViT-L-14 openai``, or ``ViT-L-14 openai + RN50 openai`` for a list."""
        return " + ".join(page.name for page in self.teacher)

    @property
    def learns_labels(self) -> bool:
        """Whether the student has a second head, since one of the two learns from `data.labelled`."""
        return any(objective.learns_labels for objective in self.objective)

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
        data = self.data.model_copy(
            update={
                "classes": load_classes(self.data.classes, note=note),
                "prompts": load_templates(self.data.prompts),
            }
        )
        height, width = sides(self.student.image_size)
        if height == width or self.views.aspect is not None:
            return self.model_copy(update={"data": data})
        views = self.views.model_copy(update={"aspect": round(width / height, 6)})
        return self.model_copy(update={"data": data, "views": views})

    def fingerprint(self) -> str:
        """Return what decides the trained weights: everything but NOT_LEARNED_FROM, and what learned contexts hold.

        What is not set leaves no trace, so that a run outlives new keys.
        """
        page = self.model_dump(mode="json", exclude=NOT_LEARNED_FROM, exclude_none=True)
        contexts = [Path(os.path.expanduser(teacher.context)) for teacher in self.teacher if teacher.context]
        return fingerprint([page, *(sha256(path) for path in contexts if path.is_file())] if contexts else page)


def load_recipe(name: str, *, overrides: Sequence[str] = (), note: Callable[[str], None] = silent) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, apply ``key=value`` overrides, and resolve it.

    Raises:
        RecipeError: with every mistake of the page at once, each with its path and the nearest right key.
    """
    path = find_recipe(name)
    raw = parse(read_page(path), where=path)
    for override in overrides:
        apply_override(raw, override)
    where = f"{path}, with {', '.join(overrides)}" if overrides else path
    return validate(raw, where=where).resolved(note)


def find_recipe(name: str) -> Path:
    """Return the page of a recipe's name, or of a path to a YAML file."""
    path = Path(os.path.expanduser(name))
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    is_page = path.suffix in (".yaml", ".yml")
    if is_page and path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{name} is a folder, not a recipe", fix=f"--images {name} --classes FILE needs no recipe")
    pages = [page.name for page in path.parent.glob("*.y*ml")]
    close = nearest(path.name, pages if is_page else [*shipped, *pages])
    raise RecipeError(
        f"there is no recipe file {name}{close}" if is_page else f"unknown recipe {name!r}{close}",
        fix=f"choose one of {', '.join(shipped)}, or give the path of a .yaml file",
    )


def shipped_recipes() -> dict[str, Path]:
    """Return the pages that come with the package, by name."""
    folder = Path(str(resources.files("prgkit.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary_line(path: Path) -> str:
    """Return a recipe page's first comment line, which says what it does."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rstrip()


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads back as the same recipe."""
    write_page(recipe.model_dump(mode="json"), path)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of the raw page: ``training.epochs=5``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise RecipeError(f"--set takes KEY=VALUE, not {override!r}", fix="for example --set training.epochs=5")
    page: Any = raw
    for section in sections:
        page = page.setdefault(section, {}) if isinstance(page, dict) else None
    if not isinstance(page, dict):
        raise RecipeError(
            f"--set {key}: {'.'.join(sections)} is no section of keys",
            fix=f"give it as a whole: --set '{sections[0]}=...'",
        )
    value = parse(f"value: {text}", where=f"--set {override}")["value"]
    if key == "objective.name" and value in OBJECTIVES:
        # A new objective brings its own parameters; the old one's are not carried over.
        for foreign in page.keys() - OBJECTIVES[value].model_fields.keys():
            del page[foreign]
    page[last] = value


def validate(raw: Mapping[str, Any], *, where: object) -> Recipe:
    """Check a raw page against the models; JSON keeps lists apart from tuples, and text apart from numbers.

    Raises:
        RecipeError: with every mistake of the page.
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

"""prgkit from Python: what the commands do, as functions; `import prgkit` finds them here when they are first used.

Names and defaults are the recipe's and the command line's. Notes that the command line prints go to the logger
``prgkit``.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from typing_extensions import TypedDict, Unpack

from prgkit.config.recipe import Recipe, load_recipe
from prgkit.config.yaml_io import yaml_text
from prgkit.errors import nearest
from prgkit.evaluate import system
from prgkit.evaluate.predict import Model
from prgkit.evaluate.report.schema import Report
from prgkit.export.bundle import bundle as exported
from prgkit.export.bundle.manifest import read_manifest
from prgkit.storage import run as storage
from prgkit.storage.find import RUNS, find_bundle, find_run, run_name, standing_where_it_started

if TYPE_CHECKING:
    from prgkit.annotation.label import ImageLabel
    from prgkit.evaluate.compare.schema import ObjectiveComparison

AnyPath: TypeAlias = str | os.PathLike[str]
logger = logging.getLogger("prgkit")


class Update(NamedTuple):
    """How far the work is, as a ``progress`` callback is told."""

    stage: str  # such as "teacher" or "student"
    done: int
    total: int
    unit: str  # such as "img"
    facts: str  # what the last ones showed, such as "epoch 3/20  loss 0.71"


Callback: TypeAlias = Callable[[Update], None]


class RecipeArguments(TypedDict, total=False):
    """Which recipe is meant, and how the work is followed.

    Attributes:
        images: a folder, a .zip or tar shards.
        classes: the names, a file with one a line, or the name of a known list.
        settings: any keys of the recipe, ``{"training.batch_size": 64}``.
        targets: where the teacher's targets are kept, for all runs; by default targets/.
        progress: called with an `Update` as the work goes on.
    """

    images: AnyPath
    classes: AnyPath | Sequence[str]
    settings: dict[str, object]
    targets: AnyPath
    progress: Callback | None


class ExportArguments(TypedDict, total=False):
    """What `Run.export` makes besides FP32 ONNX, as the options of ``prgkit export`` say it."""

    fp16: bool
    int8: bool
    trt: bool
    backend: str
    batch: tuple[int, int, int]
    sm: str | tuple[str, ...]
    open_vocabulary: Literal["initializer", "input"]
    embedding: bool
    explain: bool
    float_input: bool
    evaluation_images: int


class BenchArguments(TypedDict, total=False):
    """How `Bundle.bench` measures, as the options of ``prgkit bench`` say it."""

    seconds: float
    batches: Sequence[int]
    threads: int | None
    sweep_threads: Sequence[int]
    fps: float
    soak_minutes: float


class PushArguments(TypedDict, total=False):
    """What `Bundle.push` publishes, as the options of ``prgkit push`` say it."""

    private: bool
    with_images: bool
    license: str
    revision: str | None


class Run(storage.Run):
    """A student that was distilled, in the folder of its run: its recipe, its card, its metrics, its weights."""

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(find_run(Path(folder)).folder)

    def export(
        self, *, formats: str | Sequence[str] = (), progress: Callback | None = None, **options: Unpack[ExportArguments]
    ) -> Bundle:
        """Turn the student into ONNX, and what else is asked for, as ``prgkit export`` does; return the bundle.

        ``formats`` are "litert", "ncnn", ... as the command line has them, and "onnx", which every bundle has.

        Raises:
            PrgkitError: the run has no student, an artifact disagrees with PyTorch, or something is not installed.
        """
        from prgkit.export.formats.options import ExportOptions
        from prgkit.export.from_run import export_run

        asked: dict[str, Any] = {**options, "formats": tuple(name for name in several(formats) if name != "onnx")}
        asked["trt"] = any(options.get(key) for key in ("trt", "backend", "sm", "batch"))
        if options.get("sm"):
            asked["sm"] = several(options["sm"])
        asked["class_vectors"] = asked.pop("open_vocabulary", None)
        with standing_where_it_started(self) as there:
            export_run(there, ExportOptions(**asked), progress=Reporter(progress))
        return Bundle(self.bundle)


class Bundle(exported.Bundle):
    """What `Run.export` made, here or copied to a device: a folder of models, and of images to measure them with."""

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(Path(folder), read_manifest(Path(folder)))

    def bench(self, *, out: AnyPath | None = None, **options: Unpack[BenchArguments]) -> Report:
        """Measure every artifact on this machine, as ``prgkit bench`` does, and return the report, which is written.

        Raises:
            PrgkitError: an option makes no sense, something in the bundle is damaged, or nothing could be measured.
        """
        from prgkit.evaluate.bench.bench import bench
        from prgkit.evaluate.bench.options import BenchOptions

        bundle, run = find_bundle(self.folder)
        folder = system.bench_folder(bundle, run) if out is None else Path(out)
        asked = BenchOptions.model_validate(options)
        return bench(bundle, asked, run_folder=run.folder if run else None, out=folder, note=logger.info)

    def push(self, repo: str, **options: Unpack[PushArguments]) -> str:
        """Publish it as the model repository OWNER/NAME of the Hugging Face Hub; return its address."""
        from prgkit.export.hub import PushOptions, push

        return push(self.folder, repo, PushOptions(**options))

    def load(self, *, runtime: str | None = None) -> Model:
        """Open the file that is best on this machine, or that a runtime runs, to name pictures with it."""
        return load(self.folder, runtime=runtime)


def distill(
    recipe: AnyPath | None = None,
    *,
    student: str | None = None,
    epochs: int | None = None,
    run: AnyPath | None = None,
    **which: Unpack[RecipeArguments],
) -> Run:
    """Teach a student from unlabelled images, as ``prgkit distill`` does; a run that was stopped goes on.

    Args:
        recipe: a shipped recipe's name or a YAML file; without one, ``images`` and ``classes`` are needed.
        student: a timm model, the recipe's ``student.model``.
        epochs: the recipe's ``training.epochs``.
        run: the run's folder; by default runs/NAME.
        which: see `RecipeArguments`.

    Raises:
        PrgkitError: for anything that you can mend: what is wrong, where, and what to do.
    """
    from prgkit.training.distill import distill as train

    more = {"student.model": student, "training.epochs": epochs}
    given = {key: value for key, value in more.items() if value is not None}
    chosen, folder = choose(distill, recipe, which, given)
    return Run(train(chosen, Path(run) if run else folder, targets_of(which), Reporter(which.get("progress"))).folder)


def label(recipe: AnyPath | None = None, **which: Unpack[RecipeArguments]) -> list[ImageLabel]:
    """Return what the teacher says of every image, as ``prgkit label`` does; nothing is trained."""
    from prgkit.annotation.label import label_images

    chosen, _ = choose(label, recipe, which)
    return label_images(chosen, targets_of(which), Reporter(which.get("progress")))


def compare(
    recipe: AnyPath | None = None,
    *,
    objectives: str | Sequence[str] = ("ce", "kd", "prg"),
    students: str | Sequence[str] = (),
    seeds: int = 1,
    out: AnyPath | None = None,
    **which: Unpack[RecipeArguments],
) -> ObjectiveComparison:
    """Train every objective with every student and seed on the same targets, as ``prgkit compare`` does."""
    from prgkit.evaluate.compare.trials import Plan, trials_of
    from prgkit.evaluate.compare.trials import compare as train

    chosen, folder = choose(compare, recipe, which)
    plan = Plan(several(objectives), several(students), seeds)
    trials, place = trials_of(chosen, plan), folder.with_name(f"{folder.name}-compared")
    progress = Reporter(which.get("progress"))
    return train(trials, Path(out or place), targets_of(which), progress, command="prgkit.compare(...)", whole=None)


def load(folder: AnyPath, *, runtime: str | None = None) -> Model:
    """Open a bundle, or the bundle of a run, with the file that is best on this machine; needs no torch.

    A ``runtime`` that is named, such as "litert", runs what it can of the bundle.

    Raises:
        PrgkitError: there is none, or something in it is damaged.
    """
    bundle, run = find_bundle(Path(folder))
    return Model(bundle, bench=system.bench_folder(bundle, run), runtime=runtime, note=logger.info)


def pull(repo: str, folder: AnyPath | None = None, *, revision: str | None = None) -> Bundle:
    """Bring the bundle of the model repository OWNER/NAME of the Hugging Face Hub into ``folder``, by default NAME."""
    from prgkit.export.hub import pull as bring

    return Bundle(bring(repo, Path(folder or repo.rpartition("/")[2]), revision=revision, note=logger.info))


def choose(
    function: Callable[..., object],
    recipe: AnyPath | None,
    which: RecipeArguments,
    more: Mapping[str, object] | None = None,
) -> tuple[Recipe, Path]:
    """Return the recipe that a function was given, with ``more`` of its keys, and the folder of its run."""
    require_known(function, which)
    images, classes = which.get("images"), which.get("classes")
    if recipe is None and (images is None or classes is None):
        raise TypeError("give a recipe, or both images and classes")
    given: dict[str, object] = {**(more or {}), **which.get("settings", {})}
    if images is not None:
        given["data.images"] = images
    if classes is not None:
        given["data.classes"] = classes if isinstance(classes, str | os.PathLike) else list(classes)
    overrides = [f"{key}={yaml_text(value)}" for key, value in given.items()]
    chosen = load_recipe(os.fspath(recipe or "custom"), overrides=overrides, note=logger.info)
    return chosen, RUNS / run_name(os.fspath(recipe or images or ""))


def several(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names, of which one may be given by itself: it is no sequence of its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def require_known(function: Callable[..., object], which: RecipeArguments) -> None:
    """Raise a TypeError of keywords that the function does not have: they would be passed over in silence."""
    unknown = [name for name in which if name not in RecipeArguments.__annotations__]
    if not unknown:
        return
    known = [*list(inspect.signature(function).parameters)[:-1], *RecipeArguments.__annotations__]
    sections = {section: getattr(one.annotation, "model_fields", {}) for section, one in Recipe.model_fields.items()}
    keys = [f"{section}.{name}" for name in unknown for section, fields in sections.items() if name in fields]
    raise TypeError(
        f"{function.__name__}() has no argument {', '.join(map(repr, unknown))}; keys of the recipe go into "
        f"settings={{{(keys or ['training.batch_size'])[0]!r}: ...}}"
        + "".join(nearest(name, known) for name in unknown)
    )


def targets_of(which: RecipeArguments) -> Path:
    """Return where the teacher's targets are kept."""
    return Path(which.get("targets", "targets"))


@dataclass
class Reporter:
    """A `prgkit.progress.Progress` that tells a callback how far the work is, and the log what is to be noted."""

    callback: Callback | None
    now: Update | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage."""
        self.tell(Update(stage, 0, total, unit, ""))

    def advance(self, count: int, facts: str = "") -> None:
        """Count on."""
        if self.now is not None:
            self.tell(self.now._replace(done=self.now.done + count, facts=facts or self.now.facts))

    def tell(self, update: Update) -> None:
        """Call back, if anybody asked for it."""
        self.now = update
        if self.callback is not None:
            self.callback(update)

    def note(self, text: str) -> None:
        """Log a line."""
        logger.info(text)

"""prgkit from Python: what the commands do, as functions; `import prgkit` finds them here when they are first used.

Names and defaults are the recipe's and the command line's. Notes that the command line prints go to the logger
``prgkit``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from prgkit.config.recipe import Recipe, load_recipe
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


class Run(storage.Run):
    """A student that was distilled, in the folder of its run: its recipe, its card, its metrics, its weights."""

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(find_run(Path(folder)).folder)

    def export(
        self,
        *,
        fp16: bool = False,
        int8: bool = False,
        trt: bool = False,
        formats: Sequence[str] = (),
        batch: tuple[int, int, int] | None = None,
        backend: str | None = None,
        sm: Sequence[str] | None = None,
        open_vocabulary: Literal["initializer", "input"] | None = None,
        float_input: bool = False,
        explain: bool = False,
        evaluation_images: int | None = None,
        progress: Callback | None = None,
    ) -> Bundle:
        """Turn the student into ONNX, and what else is asked for, as ``prgkit export`` does; return the bundle.

        Raises:
            PrgkitError: the run has no student, an artifact disagrees with PyTorch, or something is not installed.
        """
        from prgkit.export.formats.options import ExportOptions
        from prgkit.export.from_run import export_run

        options = ExportOptions(
            fp16=fp16,
            int8=int8,
            trt=trt or bool(backend or sm or batch),
            formats=tuple(formats),
            batch=batch,
            backend=backend,
            sm=None if sm is None else tuple(sm),
            class_vectors=open_vocabulary,
            float_input=float_input,
            explain=explain,
            evaluation_images=evaluation_images,
        )
        with standing_where_it_started(self) as there:
            export_run(there, options, progress=Reporter(progress))
        return Bundle(self.bundle)


class Bundle(exported.Bundle):
    """What `Run.export` made, here or copied to a device: a folder of models, and of images to measure them with."""

    def __init__(self, folder: AnyPath) -> None:
        super().__init__(Path(folder), read_manifest(Path(folder)))

    def bench(
        self,
        *,
        seconds: float = 10.0,
        batches: Sequence[int] = (1, 8, 32),
        threads: int | None = None,
        sweep_threads: Sequence[int] = (),
        fps: float | None = None,
        soak_minutes: float | None = None,
        out: AnyPath | None = None,
    ) -> Report:
        """Measure every artifact on this machine, as ``prgkit bench`` does, and return the report, which is written.

        Raises:
            PrgkitError: an option makes no sense, something in the bundle is damaged, or nothing could be measured.
        """
        from prgkit.evaluate.bench.bench import bench
        from prgkit.evaluate.bench.options import BenchOptions

        bundle, run = find_bundle(self.folder)
        options = BenchOptions(
            seconds=seconds,
            batches=tuple(batches),
            threads=threads,
            sweep_threads=tuple(sweep_threads),
            fps=fps,
            soak_minutes=soak_minutes,
        )
        folder = system.bench_folder(bundle, run) if out is None else Path(out)
        return bench(bundle, options, run_folder=run.folder if run else None, out=folder, note=logger.info)

    def load(self, *, runtime: str | None = None) -> Model:
        """Open the file that is best on this machine, or that a runtime runs, to name pictures with it."""
        return load(self.folder, runtime=runtime)


def distill(
    recipe: AnyPath | None = None,
    *,
    images: AnyPath | None = None,
    classes: AnyPath | Sequence[str] | None = None,
    student: str | None = None,
    epochs: int | None = None,
    settings: Mapping[str, object] | None = None,
    run: AnyPath | None = None,
    targets: AnyPath = "targets",
    progress: Callback | None = None,
) -> Run:
    """Teach a student from unlabelled images, as ``prgkit distill`` does; a run that was stopped goes on.

    Args:
        recipe: a shipped recipe's name or a YAML file; without one, ``images`` and ``classes`` are needed.
        images: a folder, a .zip or tar shards.
        classes: the names, a file with one a line, or the name of a known list.
        student: a timm model, the recipe's ``student.model``.
        epochs: the recipe's ``training.epochs``.
        settings: further keys of the recipe, ``{"training.batch_size": 64}``.
        run: the run's folder; by default runs/NAME.
        targets: where the teacher's targets are kept, for all runs.
        progress: called with an `Update` as the work goes on.

    Raises:
        PrgkitError: for anything that you can mend: what is wrong, where, and what to do.
    """
    from prgkit.training.distill import distill as train

    chosen, folder = choose(recipe, images, classes, student=student, epochs=epochs, settings=settings)
    return Run(train(chosen, Path(run) if run else folder, Path(targets), Reporter(progress)).folder)


def label(
    recipe: AnyPath | None = None,
    *,
    images: AnyPath | None = None,
    classes: AnyPath | Sequence[str] | None = None,
    settings: Mapping[str, object] | None = None,
    targets: AnyPath = "targets",
    progress: Callback | None = None,
) -> list[ImageLabel]:
    """Return what the teacher says of every image, as ``prgkit label`` does; nothing is trained."""
    from prgkit.annotation.label import label_images

    chosen, _ = choose(recipe, images, classes, settings=settings)
    return label_images(chosen, Path(targets), Reporter(progress))


def compare(
    recipe: AnyPath | None = None,
    *,
    images: AnyPath | None = None,
    classes: AnyPath | Sequence[str] | None = None,
    objectives: Sequence[str] = ("ce", "kd", "prg"),
    students: Sequence[str] = (),
    seeds: int = 1,
    settings: Mapping[str, object] | None = None,
    out: AnyPath | None = None,
    targets: AnyPath = "targets",
    progress: Callback | None = None,
) -> ObjectiveComparison:
    """Train every objective with every student and seed on the same targets, as ``prgkit compare`` does."""
    from prgkit.evaluate.compare.trials import Plan, trials_of
    from prgkit.evaluate.compare.trials import compare as train

    chosen, folder = choose(recipe, images, classes, settings=settings)
    trials = trials_of(chosen, Plan(objectives, students, seeds))
    place = Path(out) if out else folder.with_name(f"{folder.name}-compared")
    return train(trials, place, Path(targets), Reporter(progress), command="prgkit.compare()", whole=None)


def load(folder: AnyPath, *, runtime: str | None = None) -> Model:
    """Open a bundle, or the bundle of a run, with the file that is best on this machine; needs no torch.

    A ``runtime`` that is named, such as "litert", runs what it can of the bundle.

    Raises:
        PrgkitError: there is none, or something in it is damaged.
    """
    bundle, run = find_bundle(Path(folder))
    return Model(bundle, bench=system.bench_folder(bundle, run), runtime=runtime, note=logger.info)


def choose(
    recipe: AnyPath | None,
    images: AnyPath | None,
    classes: AnyPath | Sequence[str] | None,
    *,
    student: str | None = None,
    epochs: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> tuple[Recipe, Path]:
    """Return the recipe that is meant, and the folder of its run."""
    if recipe is None and (images is None or classes is None):
        raise TypeError("give a recipe, or both images and classes")
    listed = classes if isinstance(classes, str | os.PathLike | None) else list(classes)
    named = {"data.images": images, "data.classes": listed, "student.model": student, "training.epochs": epochs}
    values = {key: value for key, value in named.items() if value is not None} | dict(settings or {})
    overrides = [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in values.items()]
    chosen = load_recipe(os.fspath(recipe or "custom"), overrides=overrides, note=logger.info)
    return chosen, RUNS / run_name(os.fspath(recipe or images or ""))


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

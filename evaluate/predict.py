"""Name what is in pictures, with a bundle and nothing that a device would not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import TypedDict, Unpack

from prgkit.errors import BackendError, ExportError, PrgkitError, nearest
from prgkit.evaluate.heat_map import Explainer
from prgkit.evaluate.pictures import (
    READ_AHEAD,
    Picture,
    Pictures,
    PreparedPicture,
    in_order,
    open_pictures,
    prepared_ahead,
)
from prgkit.evaluate.selection import selected_artifact
from prgkit.export.bundle.bundle import open_bundle, verify_artifact
from prgkit.export.bundle.confidence import promise, rejection_score, uncalibrated
from prgkit.export.bundle.manifest import Artifact, Manifest
from prgkit.export.runtimes import first_setup
from prgkit.export.runtimes.base import Runner
from prgkit.metrics import log_softmax
from prgkit.progress import silent
from prgkit.workers import available_cores

TOGETHER = 32  # pictures that all cores answer together, before each opens the file for itself
SIDE_BY_SIDE = 16  # files open for one core each, at most

Batch: TypeAlias = list[PreparedPicture]


@dataclass(frozen=True)
class Prediction:
    """The answer to one picture; of one that cannot be read only why."""

    image: str  # its path, or for one that has none its place among those asked about
    label: str | None = None  # the class; None where the model abstains
    probability: float | None = None  # that of the likeliest class, calibrated where the bundle knows its temperature
    top: tuple[tuple[str, float], ...] = ()  # class names and probabilities, the likeliest first
    abstained: bool = False  # below the confidence asked for, or rejected
    rejected: bool = False  # the picture seems to show none of the classes
    artifact: str | None = None  # the file of the bundle that answered
    error: PrgkitError | None = None
    read: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)  # reads the picture again

    def to_json(self) -> dict[str, object]:
        """Return it as ``prgkit predict --json`` prints it."""
        if self.error is not None:
            where = None if self.error.where is None else str(self.error.where)
            return {"image": self.image, "error": {"what": self.error.what, "where": where, "fix": self.error.fix}}
        return {
            "image": self.image,
            "artifact": self.artifact,
            "class": self.label,
            "abstained": self.abstained,
            "rejected": self.rejected,
            "top": self.top,
        }


class AnswerArguments(TypedDict, total=False):
    """How `Model.stream` answers; it says what each means."""

    top_k: int
    min_confidence: float
    reject_unknown: bool
    batch_size: int


class Model:
    """A bundle that is opened on this machine to name pictures; close it, or use it in a ``with`` statement.

    Args:
        folder: the bundle.
        bench: where this machine's measurements of the bundle are: the artifact that its selection.json names is run,
            the FP32 file otherwise.
        runtime: what runs it, such as litert: that file where it was chosen for this runtime, or else the bundle's
            first that it can run.
        note: told what a confidence is worth, and which files of a folder are no pictures.

    Raises:
        PrgkitError: the bundle or selection.json is damaged; there is no such runtime, or it runs nothing here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bench: Path | None = None,
        runtime: str | None = None,
        note: Callable[[str], None] = silent,
    ) -> None:
        self.bundle, self.note = open_bundle(folder, verify=()), note
        selected = selected_artifact(self.bundle, bench, runtime)
        self._setup = first_setup(folder, [selected, *self.bundle.artifacts] if runtime else [selected], runtime)
        self.artifact = self._setup.artifact
        verify_artifact(folder, self.artifact)
        self._runner = self._setup.open()
        self._idle: SimpleQueue[Runner] = SimpleQueue()  # the same file, opened for one core each
        self._cores = min(available_cores(), SIDE_BY_SIDE) if self._setup.variant.side_by_side else 1
        self._explainer: Explainer | None = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what the runtime holds."""
        self._runner.close()
        while not self._idle.empty():
            self._idle.get().close()
        if self._explainer is not None:
            self._explainer.close()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.bundle.classes

    def predict(self, images: Pictures, **asked: Unpack[AnswerArguments]) -> list[Prediction]:
        """Return an answer for every picture in ``images``, in their order; `stream` says more."""
        return list(self.stream(images, **asked))

    def stream(
        self,
        images: Pictures,
        *,
        top_k: int = 3,
        min_confidence: float = 0.0,
        reject_unknown: bool = False,
        batch_size: int = 1,
    ) -> Iterator[Prediction]:
        """Yield an answer for every picture, as soon as it is known; pictures are read ahead in threads.

        Args:
            images: one or several of: a path, a folder, a .zip or .tar, a pattern such as ``"cam/*.jpg"``, Pillow's
                image, or an array uint8 [H, W, 3] or [n, H, W, 3] in RGB order.
            top_k: how many classes an answer names.
            min_confidence: below this probability the label is None.
            reject_unknown: the label is None, too, where a picture seems to show none of the classes.
            batch_size: how many pictures the network is given at a time.

        Raises:
            ExportError: the bundle does not know what shows none of the classes.
        """
        facts = self.bundle.manifest.confidence
        if reject_unknown and facts is None:
            why = "pictures of none of the classes cannot be told: " + uncalibrated(self.bundle.manifest)
            raise ExportError(why, where=self.bundle.folder, fix="leave --reject-unknown out")
        if min_confidence or self.bundle.manifest.relabelled:
            self.note(worth(self.bundle.manifest, self.artifact, min_confidence))
        preprocessing = self.bundle.preprocessing
        size = min(batch_size, self._runner.max_batch or batch_size)
        pictures = open_pictures(images, preprocessing.grey_range, self.note)
        ready = prepared_ahead(pictures, preprocessing, ahead=max(READ_AHEAD, (self._cores + 1) * size))
        for batch, logits in self._answered(in_batches(ready, size)):
            rows = iter(logits)
            for one in batch:
                if one.error is not None:
                    yield Prediction(one.picture.name, error=one.error)
                    continue
                row = next(rows)  # [classes]
                if not np.isfinite(row).all():
                    yield Prediction(one.picture.name, error=self._not_finite())
                    continue
                rejected = bool(
                    reject_unknown and facts and rejection_score(row[None], facts.reject_by)[0] < facts.reject_below
                )
                answer = self.answer(row, top_k, min_confidence, rejected=rejected)
                yield replace(answer, image=one.picture.name, read=one.picture.read)

    def _answered(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
        """Yield each batch with the logits [n, classes] of those that can be read.

        All cores work on one batch at first, and on each of a camera. Of many pictures each core then takes its own: a
        small network gains little from several cores, and pictures are decoded on the same ones.
        """
        together = 0
        for batch in batches:
            yield batch, self._logits(batch, self._runner)
            together += len(batch)
            if self._cores > 1 and together >= TOGETHER and not batch[-1].picture.live:
                break
        yield from in_order(self._by_one_core, batches, threads=self._cores, ahead=self._batches_ahead)

    def _batches_ahead(self, batch: Batch) -> int:
        return 0 if batch[-1].picture.live else self._cores

    def _by_one_core(self, batch: Batch) -> tuple[Batch, NDArray[np.float32]]:
        try:
            runner = self._idle.get_nowait()
        except Empty:
            runner = replace(self._setup, threads=1).open()
        try:
            return batch, self._logits(batch, runner)
        finally:
            self._idle.put(runner)

    def _logits(self, batch: Batch, runner: Runner) -> NDArray[np.float32]:
        """Return logits [n, classes] of the pictures that can be read, divided by the bundle's temperature."""
        pixels = [one.pixels for one in batch if one.pixels is not None]
        if not pixels:
            return np.empty((0, len(self.classes)), np.float32)
        logits: NDArray[np.float32] = runner.run(np.stack(pixels)) / self.bundle.manifest.temperature
        return logits

    def _not_finite(self) -> BackendError:
        what = f"{self._runner.name} answers with what is no number"
        return BackendError(what, where=self.bundle.folder, fix="let another file answer: --runtime NAME, or its FP32")

    def heat_map(self, picture: Picture, label: str) -> Image.Image:
        """Return a picture as the student sees it, with what spoke for a class drawn over it.

        Raises:
            ExportError: the bundle was exported without --explain, or has no such class.
            ImagesError: the picture cannot be read.
        """
        if label not in self.classes:
            raise ExportError(f"there is no class {label!r}{nearest(label, self.classes)}", where=self.bundle.folder)
        (one,) = open_pictures(picture, self.bundle.preprocessing.grey_range, self.note)
        return Image.fromarray(self.require_heat_maps().of_picture(one.read(), label))

    def require_heat_maps(self) -> Explainer:
        """Open the file that says where a class was found; refuse where the bundle has none."""
        if self._explainer is None:
            self._explainer = Explainer(self.bundle)
        return self._explainer

    def answer(self, logits: NDArray[np.float32], top_k: int, min_confidence: float, *, rejected: bool) -> Prediction:
        """Put the logits [classes] of a picture into an answer."""
        probabilities = np.exp(log_softmax(logits[None]))[0]  # [classes]
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        abstained = rejected or bool(probabilities[best[0]] < min_confidence)
        top = tuple((self.classes[index], round(float(probabilities[index]), 6)) for index in best)
        return Prediction(
            image="",
            label=None if abstained else top[0][0],
            probability=top[0][1],
            top=top,
            abstained=abstained,
            rejected=rejected,
            artifact=self._runner.name,
        )


def in_batches(pictures: Iterator[PreparedPicture], size: int) -> Iterator[Batch]:
    """Yield up to ``size`` pictures at a time; one after which others come later waits for none."""
    batch: Batch = []
    for one in pictures:
        batch.append(one)
        if len(batch) == size or one.picture.live:
            yield batch
            batch = []
    if batch:
        yield batch


def worth(manifest: Manifest, artifact: Artifact, min_confidence: float) -> str:
    """Say what a bundle promises of answers with that confidence, or that it promises nothing."""
    if manifest.confidence is None:
        return uncalibrated(manifest)
    shared = (
        ""
        if artifact.precision == "fp32"
        else f" (measured with the FP32 file, whose temperature {artifact.name} shares)"
    )
    return promise(manifest.confidence, min_confidence) + shared

"""INT8 files, whatever runtime they are for: made from calibration images, judged against FP32, and kept or not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import Origin, remove
from prgkit.export.bundle.bundle import Evaluation, describe_artifact, read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32, int8_sentence, known_classes, too_few
from prgkit.export.bundle.manifest import Artifact, Layout, NotKept, OwnQuantiser, Quantization
from prgkit.export.formats.base import Made
from prgkit.export.runtimes.base import Runner
from prgkit.export.runtimes.parity import compare, run_and_close
from prgkit.storage.atomic import fingerprint

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import CalibrationSet, StudentExport

CALIBRATION_IMAGES = 256

Pixels = NDArray[np.uint8]  # [images, S, S, 3]
Result = Artifact | NotKept  # a file that is kept, or what became of one that is not


class Int8File(NamedTuple):
    """One INT8 file of a bundle, and how it is written."""

    name: str
    file: str
    layout: Layout | OwnQuantiser
    format: str
    write: Callable[[Path], float | None]  # returns on which share of the images tensors are clipped, if it clips any
    runner: Callable[[Path], Runner]  # opens it where it is judged
    options: tuple[str, ...] = ("--int8",)
    converters: Sequence[str] = ()  # packages that write it, besides those of ONNX
    note: str | None = None


@dataclass(frozen=True)
class Int8Judge:
    """What INT8 files are calibrated and judged on."""

    export: StudentExport
    calibration: Pixels  # none of them among the images that files are judged on
    evaluation: Evaluation
    labels: NDArray[np.int64]  # [n], -1 where none is known

    def make_all(self, files: Sequence[Int8File]) -> Made:
        """Make files, and return those that are kept and what became of the others."""
        results = [self.make(file) for file in files]
        kept = [result for result in results if isinstance(result, Artifact)]
        left = [result for result in results if not isinstance(result, Artifact)]
        return Made(kept, left, frozenset(file.name for file in files))

    def make(self, file: Int8File) -> Result:
        """Return a file's artifact, or what became of it where it is not surely as good as FP32."""
        cache, note, margin = self.export.cache, self.export.note, self.export.options.margin
        used = (self.calibration, self.evaluation.pixels, self.evaluation.teacher_logits, self.labels)
        judged: Origin = {"int8": [file.name, margin, *(digest(values) for values in used)]}
        made_from = self.export.origin_by(file.converters) | judged
        if artifact := cache.take(file.name, made_from):
            return artifact
        if before := cache.not_kept(file.name, made_from):
            note(f"{file.file}: {int8_sentence(before)} (found before, from the same)")
            return before
        known = {"name": file.name, "layout": file.layout, "calibration_images": len(self.calibration)}
        if few := too_few(len(self.evaluation.pixels), margin):  # to find that out again costs nothing: no made_from
            note(f"{file.file}: {int8_sentence(few)}")
            return few.model_copy(update=known)
        made = self.judge(file).model_copy(update=known)
        note(f"{file.file}: {int8_sentence(made)}")
        if not made.kept:
            (self.export.folder / file.file).unlink()
            return made.model_copy(update={"made_from": fingerprint(made_from)})
        return cache.add(self.describe(file, made), made_from)

    def judge(self, file: Int8File) -> Quantization:
        """Write a file, and return how it stands to FP32."""
        path, margin = self.export.folder / file.file, self.export.options.margin
        remove(path)  # of another origin: not every quantiser overwrites
        clip_quantile = file.write(path)
        logits = run_and_close(file.runner(path), self.evaluation.pixels)
        found = compare_with_fp32(self.evaluation.logits, logits, self.evaluation.teacher_logits, self.labels)
        return Quantization(kept=found.holds(margin), margin=margin, comparison=found, clip_quantile=clip_quantile)

    def describe(self, file: Int8File, made: Quantization) -> Artifact:
        """Return the artifact of a file that is kept, with its parity with PyTorch."""
        logits = run_and_close(file.runner(self.export.folder / file.file), self.export.pixels)
        return describe_artifact(
            self.export.folder,
            file.file,
            name=file.name,
            format=file.format,
            precision="int8",
            backend=file.layout,
            executed=True,
            note=file.note,
            parity=compare(self.export.reference_logits, logits, precision="int8"),
            quantization=made,
            export_options=file.options,
        )


def int8_judge(export: StudentExport) -> Int8Judge | None:
    """Return what an export's INT8 files are calibrated and judged on; None where it has no images to calibrate on.

    Raises:
        ExportError: of these there is none that is not held out.
    """
    if export.calibration is None:
        return None
    evaluation = read_evaluation(export.folder)
    labels = known_classes(evaluation, export.ticks, export.classes)
    return Int8Judge(export, calibration_pixels(export.calibration()), evaluation, labels)


def calibration_pixels(calibration: CalibrationSet) -> Pixels:
    """Return up to `CALIBRATION_IMAGES` images [n, S, S, 3] for the ranges of activations.

    Raises:
        ExportError: there is none.
    """
    if not calibration.images:
        raise ExportError("there is no image to calibrate INT8 on that is not held out", fix="export without --int8")
    return calibration.read(np.arange(min(CALIBRATION_IMAGES, calibration.images)))


def digest(values: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()

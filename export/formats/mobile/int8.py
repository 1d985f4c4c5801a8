"""INT8 files that a runtime's own quantiser makes of the whole network: kept where they are as good as FP32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prgkit.export.bundle.bundle import describe_artifact, read_evaluation
from prgkit.export.bundle.fidelity import compare_with_fp32, int8_sentence, known_classes, too_few
from prgkit.export.bundle.manifest import Artifact, NotKept, OwnQuantiser, Quantization
from prgkit.export.formats.base import Made
from prgkit.export.runtimes.base import Runner
from prgkit.export.runtimes.parity import compare, run_and_close
from prgkit.storage.atomic import fingerprint

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


@dataclass(frozen=True)
class Int8Recipe:
    """One INT8 file of a bundle, made by a runtime's own quantiser."""

    name: str
    file: str
    format: str
    runtime: OwnQuantiser
    converters: Sequence[str]  # packages that write it
    write: Callable[[Path, Path], None]  # calibration pixels [n, S, S, 3] as a .npy file, and the path to write
    runner: Callable[[Path], Runner]
    export_options: tuple[str, ...]


def make_int8(export: StudentExport, recipe: Int8Recipe) -> Made:
    """Return the artifact of an INT8 file, or what became of it where it is not surely as good as FP32."""
    from prgkit.export.int8.quantise import calibration_pixels, digest

    if export.calibration is None:
        return Made()
    evaluation, margin, cache = read_evaluation(export.folder), export.options.margin, export.cache
    labels = known_classes(evaluation, export.ticks, export.classes)
    calibration = calibration_pixels(export.calibration())
    images = [digest(values) for values in (calibration, evaluation.pixels, evaluation.teacher_logits, labels)]
    made_from = export.origin_by(recipe.converters) | {"int8": [recipe.name, margin, *images]}
    known: dict[str, Any] = {"name": recipe.name, "layout": recipe.runtime, "calibration_images": len(calibration)}

    def refused(facts: NotKept) -> Made:
        export.note(f"{recipe.file}: {int8_sentence(facts)}")
        return Made((), [facts], frozenset({recipe.name}))

    if artifact := cache.take(recipe.name, made_from):
        export.note(f"{artifact.file}: finished before, and made from the same; it is kept")
        return Made([artifact], (), frozenset({recipe.name}))
    if before := cache.not_kept(recipe.name, made_from):
        return refused(before)
    if few := too_few(len(evaluation.pixels), margin):
        return refused(few.model_copy(update=known))
    path = export.folder / recipe.file
    np.save(saved := export.work / "calibration.npy", calibration)
    recipe.write(saved, path)
    logits = run_and_close(recipe.runner(path), evaluation.pixels)
    found = compare_with_fp32(evaluation.logits, logits, evaluation.teacher_logits, labels)
    made = Quantization(kept=found.holds(margin), margin=margin, comparison=found, **known)
    if not made.kept:
        path.unlink()
        return refused(made.model_copy(update={"made_from": fingerprint(made_from)}))
    export.note(f"{recipe.file}: {int8_sentence(made)}")
    return Made([cache.add(describe(export, recipe, made), made_from)], (), frozenset({recipe.name}))


def describe(export: StudentExport, recipe: Int8Recipe, made: Quantization) -> Artifact:
    """Return the artifact of a file that is kept, with its parity with PyTorch."""
    logits = run_and_close(recipe.runner(export.folder / recipe.file), export.pixels)
    return describe_artifact(
        export.folder,
        recipe.file,
        name=recipe.name,
        format=recipe.format,
        precision="int8",
        backend=recipe.runtime,
        executed=True,
        note=None,
        parity=compare(export.reference_logits, logits, precision="int8"),
        quantization=made,
        export_options=recipe.export_options,
    )

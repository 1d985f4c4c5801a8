"""Other classes for a bundle with an open vocabulary: the teacher reads their names, and nothing is trained."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from prgkit.config.prompts import canonical
from prgkit.config.recipe import Recipe, validate
from prgkit.errors import ExportError, ParityError, RunError
from prgkit.export.bundle.artifact_cache import (
    RELABELLED,
    alone_in,
    building,
    files_of,
    link,
    put_back,
    remove,
    require_elsewhere,
)
from prgkit.export.bundle.bundle import (
    Bundle,
    fp32_onnx,
    open_bundle,
    output_spec,
)
from prgkit.export.bundle.checksums import checksums, require_unchanged
from prgkit.export.bundle.engine_metadata import builds_of
from prgkit.export.bundle.manifest import (
    EMBEDDING,
    ENGINE,
    NCHW,
    ONNX,
    OPENVINO_QDQ,
    PARTS,
    QDQ,
    VECTORS,
    Artifact,
    ClassScoring,
    Manifest,
    Quantization,
    exports_of,
)
from prgkit.export.formats.open_vocabulary import Matrix, agreement_sentence, scored, write_classes
from prgkit.export.readme import README, write_manifest
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.parity import GOLDEN_TOLERANCE
from prgkit.progress import Progress
from prgkit.storage.atomic import sha256
from prgkit.storage.find import find_bundle, find_run
from prgkit.storage.locks import locked
from prgkit.storage.reproducible import read_array, read_png, write_array
from prgkit.storage.run import Run
from prgkit.teacher.answers import both_logits
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import as_learned, averaged, computed_as, open_targets
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment

OPEN = "prgkit export --open-vocabulary"
# Of an INT8 file: all else of how it was quantised was found with the old classes; bench judges it by the new ones.
OF_THE_NETWORK = {"name", "layout", "calibration_images", "margin", "clip_quantile"}
REWRITTEN = (ONNX, QDQ, OPENVINO_QDQ, NCHW)  # the formats whose files are given other class vectors
UNCOMPARED = "its network was compared with PyTorch when it was exported, with other classes"


def relabel(folder: Path, classes: Sequence[str], *, run: Run | None, progress: Progress) -> Manifest:
    """Give the bundle in ``folder`` other classes and return its new manifest.

    ``run`` is the run that the bundle lies in, if any: its target store keeps what the teacher has read. The bundle is
    replaced by a whole one. Its engines are left behind, since they are of the old classes; so are its labels where
    one of them is no class any more.

    Raises:
        ExportError: the bundle's classes are fixed, or the teacher at hand is another one.
        TeacherError: the teacher cannot be loaded.
        ParityError: the FP32 file does not give the logits that the stored features have by the new vectors.
    """
    with locked(run.folder, "run") if run else contextlib.nullcontext(), alone_in(folder):
        bundle = open_bundle(folder)
        scoring = require_open(bundle)
        for part in PARTS:
            require_unchanged(folder, part)
        recipe = validate(bundle.manifest.recipe, where=folder)
        answers = read_names(bundle, recipe, classes, run, progress)
        with building(folder, RELABELLED) as new:
            shutil.copytree(folder, new, copy_function=link, dirs_exist_ok=True)
            manifest = write_relabelled(bundle, new, scoring, answers, classes, progress)
    if recipe.targets.corrects:
        progress.note("the teacher's answers to the new classes are its own: the run's correction is of the old ones")
    return manifest


def settled_bundle(given: Path | None) -> tuple[Path, Run | None]:
    """Find a bundle as `find_bundle` does, also one that a kill left without its name.

    Raises:
        RunError: there is none.
        ExportError: it is the folder that the user stands in.
    """
    if given is not None and not given.exists():
        put_back(given.resolve())
    with contextlib.suppress(RunError):
        lost = find_run(given)
        if not lost.bundle.exists():
            with locked(lost.folder, "run"):  # not between the two names that an export is giving
                put_back(lost.bundle.resolve())
    bundle, run = find_bundle(given)
    folder = bundle.resolve()
    fix = f"cd {shlex.quote(str(folder.parent))}, and there: prgkit relabel --classes FILE --run {folder.name}"
    require_elsewhere(folder, "relabel", fix=fix)
    return bundle, run


def require_open(bundle: Bundle) -> ClassScoring:
    """Return how a bundle's classes are scored; one whose classes are fixed is refused."""
    if bundle.manifest.open_vocabulary is None:
        raise ExportError(
            "the classes of this bundle are fixed: its network ends in a class head",
            where=bundle.folder,
            fix=f"export it again where the student was trained: {OPEN}",
        )
    return bundle.manifest.open_vocabulary


def read_names(
    bundle: Bundle, recipe: Recipe, classes: Sequence[str], run: Run | None, progress: Progress
) -> ZeroShotClassifier:
    """Return what turns features into answers about ``classes``: their names as the teacher reads them."""

    teacher = teacher_loader(progress)  # asked only where the store does not hold these names
    with store_of(run) as root:
        wanted = bundle.manifest.teacher.fingerprint
        settled = as_learned(recipe, run, root) if run else computed_as(recipe, root, wanted)
        targets = open_targets(settled, root, teacher)
        if targets.facts().fingerprint != wanted:
            raise ExportError(
                f"the teacher here is not the one that this student learned from: {recipe.teacher_name}",
                where=bundle.folder,
                fix="relabel where the teacher's own files are",
            )
        prompts = targets.prompts(classes, recipe.templates, teacher, progress)
    classifier = ZeroShotClassifier(prompts, targets.logit_scale, recipe.prompt_weighting, no_adjustment(len(classes)))
    return averaged(classifier, targets, recipe)


@contextlib.contextmanager
def store_of(run: Run | None) -> Iterator[Path]:
    """Give the folder of a run's target stores, or one that does not stay."""
    if run is not None:
        yield run.target_stores[0].parent
        return
    with tempfile.TemporaryDirectory() as work:
        yield Path(work)


def write_relabelled(
    bundle: Bundle,
    new: Path,
    scoring: ClassScoring,
    answers: ZeroShotClassifier,
    classes: Sequence[str],
    progress: Progress,
) -> Manifest:
    """Change everything in ``new``, a copy of the bundle, that says something of its classes; return the manifest."""
    vectors: Matrix = answers.class_vectors().numpy()  # [C, D]
    write_array(new / VECTORS, vectors)
    with_images = bundle.manifest.evaluation.images > 0  # it may have been published without
    artifacts = [  # an embedding knows no classes
        one if one.format == EMBEDDING else relabelled(new, one, vectors, classes, checked=with_images)
        for one in bundle.artifacts
        if one.format in (*REWRITTEN, EMBEDDING)
    ]
    leave_engines(bundle, new, progress)
    leave_converted(bundle, new, progress)
    labelled = with_images and relabel_images(bundle, new, answers, classes, progress)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest = bundle.manifest.model_copy(
        update={
            "classes": tuple(classes),
            "output": output_spec(classes),
            "artifacts": tuple(artifacts),
            "not_kept": (),
            "evaluation": bundle.manifest.evaluation.model_copy(update={"labelled": labelled}),
            "confidence": None,  # it is of the old classes
            "open_vocabulary": scoring.model_copy(update={"relabelled": now}),
            "checksums": checksums(new),
        }
    )
    (new / README).unlink(missing_ok=True)  # a published card tells the old classes' figures
    write_manifest(new, manifest)
    return manifest


def relabelled(new: Path, artifact: Artifact, vectors: Matrix, classes: Sequence[str], *, checked: bool) -> Artifact:
    """Write the new classes into an ONNX file and return what is known of it; an export takes nothing of it over.

    Whether the FP32 file is ``checked`` afterwards is said of it.
    """
    write_classes(new / artifact.file, new / artifact.file, vectors, classes)
    notes = [part for part in (artifact.note or "").split("; ") if part not in ("", UNCOMPARED)]
    quantization = artifact.quantization
    if quantization:
        quantization = Quantization(**quantization.model_dump(include=OF_THE_NETWORK, exclude_unset=True))
    path = new / artifact.file
    return artifact.model_copy(
        update={
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "executed": (artifact.format, artifact.precision) == ("onnx", "fp32") and checked,
            "note": "; ".join([*notes, UNCOMPARED]),
            "parity": None,
            "quantization": quantization,
            "made_from": None,
        }
    )


def leave_engines(bundle: Bundle, new: Path, progress: Progress) -> None:
    """Remove what was built from the old classes, and say how it is built again."""
    engines = [artifact for artifact in bundle.artifacts if artifact.format == "engine"]
    for engine in engines:
        for path in files_of(new, engine):
            path.unlink(missing_ok=True)
    for backend in dict.fromkeys(engine.backend for engine in engines):
        own = [engine for engine in engines if engine.backend == backend]
        names = ", ".join(engine.file for engine in own)
        (built,), made = builds_of(bundle.folder, own), {engine.precision for engine in own}
        kinds = [f"--{precision}" for precision in ("fp16", "int8") if precision in made]
        again = shlex.join(["prgkit", "export", "--trt", *kinds, *built, "--run", str(bundle.folder)])
        progress.note(f"{names}: of the old classes, and removed; {again} builds them again")


def leave_converted(bundle: Bundle, new: Path, progress: Progress) -> None:
    """Remove what was converted for other runtimes with the old classes, and say how it is made again."""
    converted = [artifact for artifact in bundle.artifacts if artifact.format not in (*REWRITTEN, EMBEDDING, ENGINE)]
    for artifact in converted:
        for path in files_of(new, artifact):
            remove(path)
    if converted:
        names = ", ".join(artifact.file for artifact in converted)
        again = "; ".join(" ".join([OPEN, *options]) for options in exports_of(converted))
        progress.note(f"{names}: of the old classes, and removed; {again} makes them, with the run's classes")


def relabel_images(
    bundle: Bundle, new: Path, answers: ZeroShotClassifier, classes: Sequence[str], progress: Progress
) -> bool:
    """Answer the bundle's images anew, and check the FP32 file by them; return whether they have labels."""
    for part in PARTS:
        features = read_array(new / part / "features.npy")
        write_array(new / part / "logits.npy", scored(features, answers.class_vectors().numpy(), answers.logit_scale))
    evaluation = new / "evaluation"
    weighted, uniform = both_logits(answers, torch.from_numpy(read_array(evaluation / "teacher_features.npy")))
    write_array(evaluation / "teacher_logits.npy", weighted)
    write_array(evaluation / "teacher_uniform_logits.npy", uniform)
    require_same(new, fp32_onnx(bundle))
    progress.note(agreement_sentence(read_array(evaluation / "logits.npy"), weighted))
    return move_labels(evaluation / "labels.npy", bundle.classes, classes, progress)


def move_labels(path: Path, before: Sequence[str], classes: Sequence[str], progress: Progress) -> bool:
    """Rewrite labels [n] for other classes by their names; where one is no class any more, remove them all."""
    if not path.exists():
        return False
    labels: NDArray[np.int64] = read_array(path)
    places = {canonical(name): place for place, name in enumerate(classes)}
    moved = np.array([places.get(canonical(name), -1) for name in before])[labels]
    if (moved >= 0).all():
        write_array(path, moved.astype(np.int64))
        return True
    lost = len(np.unique(labels[moved < 0]))
    path.unlink()
    progress.note(f"the evaluation images have no labels any more: {lost} of their classes are not among the new ones")
    return False


def require_same(new: Path, fp32: Artifact) -> None:
    """Assert that the FP32 file gives the golden logits on the prepared golden inputs."""
    golden = new / "golden"
    expected: Matrix = read_array(golden / "logits.npy")
    inputs = np.stack([read_png(golden / f"{number:02}.input.png") for number in range(len(expected))])
    runner = OnnxRunner(new / fp32.file, name=fp32.name, spin=False)
    try:
        difference = float(np.abs(expected - runner.run(inputs)).max())
    finally:
        runner.close()
    allowed = GOLDEN_TOLERANCE["fp32"] * max(1.0, float(np.abs(expected).max()))  # the features are another machine's
    if not difference <= allowed:
        raise ParityError(
            f"{fp32.file} differs from what the stored features have by the new class vectors: by {difference:.3g}, "
            f"allowed {allowed:.3g}",
            where=new,
            fix="copy the bundle again, or export it again",
        )

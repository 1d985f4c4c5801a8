"""The folder that travels to the device: models, images to check and measure them with, and a manifest of it all."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ExportError
from prgkit.export.bundle.checksums import require_unchanged
from prgkit.export.bundle.manifest import VECTORS, Artifact, Manifest, TensorSpec, read_manifest
from prgkit.storage.atomic import sha256, write_bytes, write_text, writing
from prgkit.storage.reproducible import Pixels, as_pixels, member, png, read_array, write_array

STUDENT_BATCH = 32

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: everything a device needs to run, check and measure the student."""

    folder: Path
    manifest: Manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.manifest.classes

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes an input."""
        return self.manifest.preprocessing

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The files that run the student."""
        return self.manifest.artifacts


@dataclass(frozen=True)
class Evaluation:
    """Held-out images at the student's input size, with what teacher and student say of them."""

    pixels: Pixels  # [n, S, S, 3]
    teacher_logits: Logits  # [n, classes], weighted prompts
    teacher_uniform_logits: Logits  # [n, classes], every prompt counting the same
    logits: Logits  # [n, classes], of the FP32 ONNX student
    labels: NDArray[np.int64] | None  # [n]
    keys: tuple[str, ...]  # n content keys


def open_bundle(folder: Path, *, verify: Sequence[str] | None = None) -> Bundle:
    """Open a bundle and verify that its artifacts, or those of the formats in ``verify``, are what its manifest says.

    Raises:
        ExportError: there is no bundle, or something in it is missing, truncated or changed; names what remakes it.
    """
    manifest = read_manifest(folder)
    for artifact in manifest.artifacts:
        if verify is None or artifact.format in verify:
            verify_artifact(folder, artifact)
    require_unchanged(folder, VECTORS)
    return Bundle(folder, manifest)


def fp32_onnx(bundle: Bundle) -> Artifact:
    """Return the entry of the FP32 ONNX file, the one that every bundle has.

    Raises:
        ExportError: this one has none.
    """
    for artifact in bundle.artifacts:
        if (artifact.format, artifact.precision) == ("onnx", "fp32"):
            return artifact
    raise ExportError("the bundle has no fp32 ONNX file", where=bundle.folder, fix="export again: prgkit export")


def verify_artifact(folder: Path, artifact: Artifact) -> None:
    """Compare the size and hash of a file, or of a folder's files together, with the manifest's."""
    path = folder / artifact.file
    command = " ".join(["prgkit export", *artifact.export_options])
    fix = f"copy the bundle again, or make the file again: {command}"
    if not path.exists():
        raise ExportError(f"{path.name} is missing from the bundle", where=folder, fix=fix)
    size = size_of(path)
    if size != artifact.bytes:
        is_short = "truncated" if size < artifact.bytes else "not the file that was exported"
        raise ExportError(f"{path.name} is {is_short}: {size} of {artifact.bytes} bytes", where=path, fix=fix)
    if digest_of(path) != artifact.sha256:
        raise ExportError(f"{path.name} is damaged: its content is not what was exported", where=path, fix=fix)


def write_golden(folder: Path, pictures: Sequence[Image.Image], prepared: Pixels, logits: Logits) -> None:
    """Write the golden images: source picture, prepared input [n, S, S, 3] and expected logits [n, classes]."""
    golden = folder / "golden"
    for number, (picture, pixels) in enumerate(zip(pictures, prepared, strict=True)):
        write_bytes(golden / f"{number:02}.png", png(picture))
        write_bytes(golden / f"{number:02}.input.png", png(Image.fromarray(pixels)))
    write_array(golden / "logits.npy", logits.astype(np.float32))


def write_evaluation(
    folder: Path,
    prepared: Iterable[Pixels],
    *,
    teacher_logits: Logits,
    teacher_uniform_logits: Logits,
    labels: NDArray[np.int64] | None,
    keys: Sequence[str],
    student: Callable[[Pixels], Logits],
) -> Logits:
    """Write the held-out images, what the teacher says of them, and what ``student`` says, which is returned.

    ``prepared`` gives [S, S, 3] images in the order of the logits; it is read once, a batch at a time.
    """
    evaluation = folder / "evaluation"
    logits: list[Logits] = []
    size = 0
    with (
        writing(evaluation / "images.zip") as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for batch in batches(prepared, STUDENT_BATCH):
            for pixels in batch:
                archive.writestr(member(f"{size:05}.png"), png(Image.fromarray(pixels)))
                size += 1
            logits.append(student(batch))
    if size != len(teacher_logits):
        raise ExportError(f"{size} evaluation images were given, and teacher logits for {len(teacher_logits)}")
    student_logits = np.concatenate(logits)
    write_array(evaluation / "teacher_logits.npy", teacher_logits.astype(np.float32))
    write_array(evaluation / "teacher_uniform_logits.npy", teacher_uniform_logits.astype(np.float32))
    write_array(evaluation / "logits.npy", student_logits)
    if labels is not None:
        write_array(evaluation / "labels.npy", labels.astype(np.int64))
    write_text(evaluation / "keys.txt", "".join(f"{key}\n" for key in keys))
    return student_logits


def read_evaluation(folder: Path, *, limit: int | None = None) -> Evaluation:
    """Read a bundle's evaluation images, the first ``limit`` of them or all; none where it was published without.

    Raises:
        ExportError: a file is missing or damaged.
    """
    evaluation = folder / "evaluation"
    if not evaluation.exists() and (manifest := read_manifest(folder)).evaluation.images == 0:
        none = np.zeros((0, len(manifest.classes)), np.float32)
        pixels = np.zeros((0, *sides(manifest.preprocessing.image_size), 3), np.uint8)
        return Evaluation(pixels, none, none, none, None, ())
    try:
        with zipfile.ZipFile(evaluation / "images.zip") as archive:
            pixels = np.stack([as_pixels(archive.read(name)) for name in archive.namelist()[:limit]])
        keys = tuple((evaluation / "keys.txt").read_text("ascii", "replace").split()[:limit])
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, SyntaxError, zlib.error) as error:
        raise ExportError(
            f"the evaluation images cannot be read: {error}",
            where=evaluation,
            fix="copy the bundle again, or make it again: prgkit export",
        ) from error
    teacher, uniform, student = (
        read_array(evaluation / f"{name}.npy")[:limit]
        for name in ("teacher_logits", "teacher_uniform_logits", "logits")
    )
    labels_path = evaluation / "labels.npy"
    labels = read_array(labels_path)[:limit] if labels_path.exists() else None
    counts = {len(values) for values in (pixels, teacher, uniform, student, labels, keys) if values is not None}
    if len(counts) != 1:
        raise ExportError(
            "the evaluation's images, keys, logits and labels differ in number", where=evaluation, fix="prgkit export"
        )
    require_unchanged(folder, "evaluation")
    return Evaluation(pixels, teacher, uniform, student, labels, keys)


def noise(bundle: Bundle, count: int) -> Pixels:
    """Return images [count, S, S, 3] that stand in for those of a bundle that was published without."""
    shape = (count, *sides(bundle.preprocessing.image_size), 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def batches(images: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """Stack images [S, S, 3] into batches [size, S, S, 3]."""
    waiting = iter(images)
    while batch := list(islice(waiting, size)):
        yield np.stack(batch)


def describe_artifact(folder: Path, file: str, **facts: Any) -> Artifact:
    """Return the manifest's entry for a file, or a folder of files, that lies in ``folder``.

    ``facts`` are the other fields of `Artifact`.
    """
    path = folder / file
    return Artifact(file=file, bytes=size_of(path), sha256=digest_of(path), **facts)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in files_in(path))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of its files' names and their SHA-256."""
    if not path.is_dir():
        return sha256(path)
    listed = "".join(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n" for file in files_in(path))
    return hashlib.sha256(listed.encode()).hexdigest()


def files_in(path: Path) -> list[Path]:
    """Return the files of an artifact: itself, or what lies in its folder, however deep."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def input_spec(preprocessing: Preprocessing) -> TensorSpec:
    """Return what goes into the network: pixels, as they are."""
    shape = ("batch", *sides(preprocessing.image_size), 3)
    return TensorSpec(name="pixels", dtype="uint8", layout="NHWC", shape=shape)


def output_spec(classes: Sequence[str]) -> TensorSpec:
    """Return what comes out of it."""
    return TensorSpec(name="logits", dtype="float32", shape=("batch", len(classes)))

"""Find the images of a gallery that a picture is like: the student's embedding among the teacher's stored vectors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ExportError, ImagesError, PrgkitError
from prgkit.evaluate.pictures import Pictures, open_pictures, prepared_ahead
from prgkit.evaluate.predict import Prediction
from prgkit.export.bundle.bundle import open_bundle, verify_artifact
from prgkit.export.bundle.manifest import EMBEDDING
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.storage.atomic import write_bytes


@dataclass(frozen=True)
class Neighbours:
    """The images of a gallery that a picture is like; of one that cannot be read only why."""

    image: str
    artifact: str  # the file of the bundle that answered
    nearest: tuple[tuple[str, float], ...] = ()  # names and cosines, the most alike first
    error: PrgkitError | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as ``prgkit predict --gallery --json`` prints it."""
        if self.error is not None:
            return Prediction(self.image, error=self.error).to_json()
        return {"image": self.image, "artifact": self.artifact, "nearest": self.nearest}


def search(
    folder: Path,
    images: Pictures,
    gallery: Path,
    *,
    top_k: int,
    note: Callable[[str], None],
    fps: float | None = None,
    live: bool = False,
) -> Iterator[Neighbours]:
    """Yield for each picture the ``top_k`` nearest images of a gallery; ``fps`` and ``live`` are `open_pictures`'.

    Raises:
        PrgkitError: the bundle has no embedding, or the gallery is not of its teacher.
    """
    bundle, known = open_bundle(folder, verify=()), load_gallery(gallery)
    artifact = next((one for one in bundle.artifacts if one.format == EMBEDDING), None)
    if artifact is None:
        fix = "export it again where the student was trained: prgkit export --embedding"
        raise ExportError("the bundle has no file that gives an embedding", where=folder, fix=fix)
    if known.teacher != bundle.manifest.teacher.fingerprint:
        fix = "write it by the recipe of this student: prgkit targets RECIPE --gallery FILE"
        raise ExportError("the gallery's vectors are of another teacher than the student's", where=gallery, fix=fix)
    verify_artifact(folder, artifact)
    runner = OnnxRunner(folder / artifact.file, name=artifact.name)
    try:
        pictures = open_pictures(images, bundle.preprocessing.grey_range, note, fps=fps, live=live)
        for picture, pixels, error in prepared_ahead(pictures, bundle.preprocessing):
            if pixels is None:
                yield Neighbours(picture.name, artifact.name, error=error)
                continue
            nearest = known.nearest(runner.run(pixels[None])[0], top_k)
            yield Neighbours(picture.name, artifact.name, tuple(nearest))
    finally:
        runner.close()


class Gallery(NamedTuple):
    """What a device searches."""

    names: Sequence[str]  # n
    vectors: NDArray[np.float32]  # [n, D], of unit length
    teacher: str  # its fingerprint, as a bundle's manifest says it

    def nearest(self, embedding: NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """Return the ``count`` images nearest to a unit vector [D], each with its cosine."""
        cosines = self.vectors @ embedding
        best = np.argsort(-cosines, kind="stable")[:count]
        return [(self.names[place], round(float(cosines[place]), 4)) for place in best]


def save_gallery(path: Path, gallery: Gallery) -> None:
    """Write a gallery as .npz, its vectors in float16."""
    buffer = io.BytesIO()
    names, vectors = np.array(gallery.names, dtype=np.str_), gallery.vectors.astype(np.float16)
    np.savez(buffer, names=names, vectors=vectors, teacher=np.array(gallery.teacher))
    write_bytes(path, buffer.getvalue())


def load_gallery(path: Path) -> Gallery:
    """Read what `save_gallery` wrote.

    Raises:
        ImagesError: the file is missing or no gallery.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            vectors = stored["vectors"].astype(np.float32)
            names, teacher = [str(name) for name in stored["names"]], str(stored["teacher"])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        fix = f"write one: prgkit targets RECIPE --gallery {path.name}"
        raise ImagesError(f"{path.name} is no gallery that can be read", where=path, fix=fix) from error
    return Gallery(names, vectors / lengths.clip(min=1e-12), teacher)

"""Where images come from: one way to open, read, list and prepare them, whatever they lie in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.datasets import open_demo, open_hub, open_torchvision
from prgkit.decoding import UnreadableImage, decode, known_formats, reduced, to_rgb, upright_rgb
from prgkit.errors import ImagesError
from prgkit.labels import class_indices, read_label_table
from prgkit.pictures import Adder, Pictures
from prgkit.sizes import Size, sides, size_of
from prgkit.sources import Source, open_path, read_span, require

__all__ = [
    "Catalogue",
    "Images",
    "Preprocessing",
    "Unreadable",
    "UnreadableImage",
    "catalogue",
    "load_image",
    "match_labels",
    "open_images",
]

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
IMAGES_PER_TASK = 32  # small pictures decode faster than a task is handed over
ENOUGH = 512  # pixels of the shorter side that crops are cut from; it can be up to twice as many


def open_images(spec: str, *, labels: Path | None = None) -> Images:
    """Open a folder, a .zip, tar shards, ``torchvision:NAME/split``, ``hf:owner/name/split`` or ``demo:digits/split``.

    ``labels`` is a CSV of ``file,label`` rows; without it, labels are those the source itself carries.

    Raises:
        ImagesError: there is nothing to open, or no image in it.
    """
    kind, _, rest = spec.partition(":")
    openers: dict[str, Callable[[str], Source]] = {"torchvision": open_torchvision, "hf": open_hub, "demo": open_demo}
    source = openers[kind](rest) if kind in openers else open_path(spec)
    if len(source) == 0:
        raise ImagesError(f"{spec} holds no images", fix="name another split or source")
    return Images(spec, source, read_label_table(labels.expanduser(), source) if labels else None)


class Images:
    """Numbered images of one source; threads, forks and pickled copies may read at once."""

    def __init__(self, spec: str, source: Source, labels: Mapping[int, str] | None) -> None:
        self.spec = spec
        self._source = source
        self._labels = labels

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Return the image's name for people: its path below the source."""
        return self._source.name(index)

    def label(self, index: int) -> str | int | None:
        """Return the image's class name or number, or None; only evaluation asks."""
        return self._labels.get(index) if self._labels is not None else self._source.label(index)

    def read(self, index: int, *, enough: int | None = None) -> Image.Image:
        """Return the image as upright RGB, reduced where ``enough`` [pixels] allows it, or raise UnreadableImage."""
        return decoded(self._source.fetch(index), self.name(index), enough)

    def key(self, index: int) -> str:
        """Return 32 hex digits that depend on the image's content alone."""
        return content_key(self._source.fetch(index))

    def read_with_key(self, index: int, wanted: Callable[[str], bool]) -> tuple[str, Image.Image | None]:
        """Return key and reduced image, fetching once; an image whose key is not ``wanted`` is not decoded."""
        fetched = self._source.fetch(index)
        key = content_key(fetched)
        return key, decoded(fetched, self.name(index), ENOUGH) if wanted(key) else None


@dataclass(frozen=True)
class Unreadable:
    """An image that was skipped."""

    name: str
    reason: str


@dataclass(frozen=True)
class Catalogue:
    """The readable, distinct images of a source in the order of their keys, so that names and places change nothing."""

    images: Images
    indices: NDArray[np.int64]  # [readable], into images
    keys: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]
    duplicates: int
    pictures: Pictures | None = None  # some of them, decoded already

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> Image.Image:
        """Return the image at a position in the catalogue, whole."""
        stored = self._stored(position)
        if stored is not None and min(stored.shape[:2]) < ENOUGH:  # a reduced one would be larger
            return Image.fromarray(stored)
        return self.images.read(int(self.indices[position]))

    def read_enough(self, position: int) -> NDArray[np.uint8]:
        """Return the pixels [height, width, 3] to cut crops from: reduced, the shorter side no less than `ENOUGH`."""
        stored = self._stored(position)
        return np.asarray(self.images.read(int(self.indices[position]), enough=ENOUGH)) if stored is None else stored

    def _stored(self, position: int) -> NDArray[np.uint8] | None:
        return self.pictures.get(self.keys[position]) if self.pictures is not None else None


def catalogue(
    images: Images,
    *,
    workers: int,
    progress: Callable[[int], None] | None = None,
    known: Container[str] = (),
    pictures: Pictures | None = None,
) -> Catalogue:
    """Read every image once; list what cannot be decoded and drop exact copies.

    Args:
        images: what to read.
        workers: how many threads decode.
        progress: called with how many more are done.
        known: keys of images that were decoded before, and need not be decoded again to know that they can be.
        pictures: keeps what is decoded.

    Raises:
        ImagesError: no image can be read.
    """
    known_formats()  # loads Pillow's plugins before threads would do it all at once
    keys: dict[str, int] = {}
    unreadable: list[Unreadable] = []
    pool = ThreadPoolExecutor(max(1, workers))
    with pictures.adding() if pictures is not None else nullcontext() as adder:

        def wanted(key: str) -> bool:
            return key not in known or (adder is not None and adder.wants(key))

        try:
            starts = range(0, len(images), IMAGES_PER_TASK)
            examined = pool.map(lambda start: examine(images, start, wanted, adder), starts)
            for start, outcomes in zip(starts, examined, strict=True):
                for index, outcome in enumerate(outcomes, start):
                    if isinstance(outcome, Unreadable):
                        unreadable.append(outcome)
                    else:
                        keys.setdefault(outcome, index)
                if progress:
                    progress(len(outcomes))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    if not keys:
        raise none_readable(images, unreadable)
    ordered = sorted(keys)
    return Catalogue(
        images=images,
        indices=np.array([keys[key] for key in ordered], dtype=np.int64),
        keys=tuple(ordered),
        unreadable=tuple(unreadable),
        duplicates=len(images) - len(unreadable) - len(keys),
        pictures=pictures,
    )


def examine(images: Images, start: int, wanted: Callable[[str], bool], adder: Adder | None) -> list[str | Unreadable]:
    """Decode one task's images and return nothing but their keys, so that memory holds one picture a worker."""
    outcomes: list[str | Unreadable] = []
    for index in range(start, min(start + IMAGES_PER_TASK, len(images))):
        try:
            key, picture = images.read_with_key(index, wanted)
        except UnreadableImage as error:
            outcomes.append(Unreadable(error.name, error.reason))
            continue
        if adder is not None and picture is not None:
            adder.add(key, np.asarray(picture))
        outcomes.append(key)
    return outcomes


def none_readable(images: Images, unreadable: Sequence[Unreadable]) -> ImagesError:
    """Build the error for images of which none can be read, with the first reasons."""
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in unreadable[:3])
    return ImagesError(
        f"none of the {len(images)} images in {images.spec} can be read ({reasons})",
        where=images.spec,
        fix="open one of them in an image viewer; copy or download the images again if they are damaged",
    )


def match_labels(catalogue: Catalogue, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class index of every image in the catalogue [images].

    Raises:
        ImagesError: an image has no label, or a label is no class.
    """
    images = catalogue.images
    indices = [int(index) for index in catalogue.indices]
    labels = [images.label(index) for index in indices]
    return class_indices(labels, class_names, names=[images.name(index) for index in indices], where=images.spec)


def load_image(image: str | os.PathLike[str] | bytes) -> Image.Image:
    """Read one image file, or its bytes, as upright RGB.

    Raises:
        ImagesError: there is no such file, or it is no readable image.
    """
    if isinstance(image, bytes):
        return decode(image, "the image")
    path = Path(image).expanduser()
    return decode(read_span(require(path, str(image), fix="give the path of an image file"), str(image)), str(image))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input; mean and std are applied inside the models."""

    image_size: Size
    crop: float  # share of the resized shorter side that the centre crop keeps (timm's crop_pct)
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False  # resize both sides to theirs whatever the shape, as SigLIP does; crop then plays no part

    def __post_init__(self) -> None:
        if min(sides(self.image_size)) < 1 or not 0 < self.crop <= 1 or self.interpolation not in INTERPOLATIONS:
            raise ImagesError(
                f"cannot prepare images with image_size {self.image_size}, crop {self.crop}, {self.interpolation!r}",
                fix=f"image_size from 1, crop in (0, 1], interpolation one of {', '.join(INTERPOLATIONS)}",
            )

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize until it covers the crop, crop the centre: [H, W, 3], pixel for pixel as torchvision and timm do."""
        rgb = image if image.mode == "RGB" else to_rgb(image)
        height, width = sides(self.image_size)
        if self.squash:
            return np.array(rgb.resize((width, height), INTERPOLATIONS[self.interpolation]))
        size = self.scaled(*rgb.size)
        if size != rgb.size:
            rgb = rgb.resize(size, INTERPOLATIONS[self.interpolation])
        left, top = round((rgb.width - width) / 2), round((rgb.height - height) / 2)
        box = (left, top, left + width, top + height)
        return np.array(rgb.crop(box))  # a copy: torch wants memory it may write to

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which a picture of these is resized before it is cropped."""
        tall, wide = (math.floor(side / self.crop) for side in sides(self.image_size))  # so 224 / 0.95 is 235
        if tall == wide:
            short = min(width, height)
            return int(tall * width / short), int(tall * height / short)
        ratio = min(height / tall, width / wide)  # timm and open_clip round here, and floor there
        return round(width / ratio), round(height / ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        size = self.image_size if isinstance(self.image_size, int) else list(self.image_size)
        return asdict(self) | {"image_size": size, "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Preprocessing:
        """Rebuild what ``to_dict`` returned.

        Raises:
            ImagesError: a value is missing or has the wrong kind.
        """
        try:
            mean, std = (tuple(float(value) for value in values[key]) for key in ("mean", "std"))
            (red, green, blue), (red_std, green_std, blue_std) = mean, std
            return Preprocessing(
                image_size=size_of(values["image_size"]),
                crop=float(values["crop"]),
                interpolation=str(values["interpolation"]),
                mean=(red, green, blue),
                std=(red_std, green_std, blue_std),
                squash=bool(values.get("squash", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"the preprocessing is damaged: {error!r}"
            raise ImagesError(what, fix="export the run again: prgkit export") from error


def decoded(fetched: bytes | Image.Image, name: str, enough: int | None = None) -> Image.Image:
    """Turn what a source hands out into RGB."""
    return decode(fetched, name, enough=enough) if isinstance(fetched, bytes) else reduced(upright_rgb(fetched), enough)


def content_key(fetched: bytes | Image.Image) -> str:
    """Hash the encoded bytes of a file, or the size and pixels of a picture that never had any."""
    if isinstance(fetched, bytes):
        return hashlib.blake2b(fetched, digest_size=16).hexdigest()
    rgb = upright_rgb(fetched)
    return hashlib.blake2b(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes(), digest_size=16).hexdigest()

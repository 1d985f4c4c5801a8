"""Where images come from: one way to open, read, list and prepare them, whatever they lie in."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.recipe import Recipe
from prgkit.data.cache import Adder, DecodedImageCache
from prgkit.data.decode import (
    ENOUGH,
    SIXTEEN_BITS,
    GreyRange,
    UnreadableImage,
    known_formats,
)
from prgkit.data.labels import class_indices
from prgkit.data.sources import DeepGreys, ImageSource, Ungauged, gauge, open_images
from prgkit.errors import ImagesError, some
from prgkit.progress import Progress, silent
from prgkit.workers import default_workers

if TYPE_CHECKING:
    pass

IMAGES_PER_TASK = 32  # small pictures decode faster than a task is handed over
LOOKED_AT = 32  # images, to say before training what is wrong with most
NEARLY_BLACK = 15  # of 255: what is left of 12 bits where a format of 16 keeps its upper byte


@dataclass(frozen=True)
class Unreadable:
    """An image that was skipped."""

    name: str
    reason: str


@dataclass(frozen=True)
class ImageIndex:
    """The readable, distinct images of a source in the order of their keys, so that names and places change nothing."""

    images: ImageSource
    indices: NDArray[np.int64]  # [readable], into images
    keys: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]
    copies: NDArray[np.int64]  # [duplicates, (position, index into images)] of each exact copy that was dropped
    pictures: DecodedImageCache | None = None  # some of them, decoded already
    deep: DeepGreys | None = None  # where their range was found here

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def duplicates(self) -> int:
        """How many exact copies were dropped."""
        return len(self.copies)

    def part(self, positions: NDArray[np.int64]) -> ImageIndex:
        """Return the images at ascending positions, and their copies."""
        if len(positions) == len(self):
            return self
        copies = self.copies[np.isin(self.copies[:, 0], positions)]
        copies[:, 0] = np.searchsorted(positions, copies[:, 0])
        keys = tuple(self.keys[position] for position in positions)
        return replace(self, indices=self.indices[positions], keys=keys, copies=copies)

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


def index_images(
    images: ImageSource,
    *,
    workers: int,
    advance: Callable[[int], None] | None = None,
    known: Container[str] = (),
    pictures: DecodedImageCache | None = None,
) -> ImageIndex:
    """Read every image once; list what cannot be decoded and drop exact copies.

    Args:
        images: what to read.
        workers: how many threads decode.
        advance: called with how many more are done.
        known: keys of images that were decoded before, and need not be decoded again to know that they can be.
        pictures: keeps what is decoded.

    Raises:
        ImagesError: no image can be read.
    """
    known_formats()  # loads Pillow's plugins before threads would do it all at once
    keys: dict[str, int] = {}
    copies: list[tuple[str, int]] = []
    unreadable: list[Unreadable] = []
    deep = None
    pool = ThreadPoolExecutor(max(1, workers))
    with pictures.adding() if pictures is not None else nullcontext() as adder:

        def wanted(key: str) -> bool:
            return key not in known or (adder is not None and adder.wants(key))

        def take_in(images: ImageSource, indices: Sequence[int]) -> list[tuple[str, int]]:
            """Note key or reason of each image; return the digests of those that have to wait, with their indices."""
            waiting: list[tuple[str, int]] = []
            parts = [indices[start : start + IMAGES_PER_TASK] for start in range(0, len(indices), IMAGES_PER_TASK)]
            for part, outcomes in zip(
                parts, pool.map(lambda part: examine(images, part, wanted, adder), parts), strict=True
            ):
                before = len(waiting)
                for index, outcome in zip(part, outcomes, strict=True):
                    if isinstance(outcome, Unreadable):
                        unreadable.append(outcome)
                    elif isinstance(outcome, Ungauged):
                        waiting.append((outcome.digest, index))
                    elif keys.setdefault(outcome, index) != index:
                        copies.append((outcome, index))
                if advance:
                    advance(len(outcomes) - (len(waiting) - before))
            return waiting

        try:
            if waiting := take_in(images, range(len(images))):
                waiting.sort()  # by content: which of them are looked at depends on nothing else
                deep = gauge(images, [index for _, index in waiting], pool.map)
                images = images.with_grey(deep.grey if deep else SIXTEEN_BITS)
                take_in(images, [index for _, index in waiting])
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    if not keys:
        raise none_readable(images, unreadable)
    ordered = sorted(keys)
    positions = {key: position for position, key in enumerate(ordered)}
    return ImageIndex(
        images=images,
        indices=np.array([keys[key] for key in ordered], dtype=np.int64),
        keys=tuple(ordered),
        unreadable=tuple(unreadable),
        copies=np.array([(positions[key], index) for key, index in copies], dtype=np.int64).reshape(-1, 2),
        pictures=pictures,
        deep=deep,
    )


def examine(
    images: ImageSource, indices: Sequence[int], wanted: Callable[[str], bool], adder: Adder | None
) -> list[str | Unreadable | Ungauged]:
    """Decode one task's images and return nothing but their keys, so that memory holds one picture a worker."""
    outcomes: list[str | Unreadable | Ungauged] = []
    for index in indices:
        try:
            found = images.read_with_key(index, wanted)
        except UnreadableImage as error:
            outcomes.append(Unreadable(error.name, error.reason))
            continue
        if isinstance(found, Ungauged):
            outcomes.append(found)
            continue
        key, picture = found
        if adder is not None and picture is not None:
            adder.add(key, np.asarray(picture))
        outcomes.append(key)
    return outcomes


def nearly_black(images: ImageIndex) -> bool:
    """Tell whether half of the images looked at or more are black but for a bright value in a thousand."""
    return half_are(images, lambda pixels: bool(np.percentile(pixels, 99.9) <= NEARLY_BLACK))


def plain(images: ImageIndex) -> bool:
    """Tell whether half of the images looked at or more are of one colour throughout."""
    return half_are(images, lambda pixels: bool((pixels == pixels[:1, :1]).all()))


def half_are(images: ImageIndex, test: Callable[[NDArray[np.uint8]], bool]) -> bool:
    """Tell whether half of some images or more, taken from all over the catalogue, pass a test of their pixels."""
    places = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int)).tolist()
    return bool(np.mean([test(images.read_enough(place)) for place in places]) >= 0.5)


def none_readable(images: ImageSource, unreadable: Sequence[Unreadable]) -> ImagesError:
    """Build the error for images of which none can be read, with the first reasons."""
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in unreadable[:3])
    return ImagesError(
        f"none of the {len(images)} images in {images.spec} can be read ({reasons})",
        where=images.spec,
        fix="open one of them in an image viewer; copy or download the images again if they are damaged",
    )


def labelled(
    image_index: ImageIndex, class_names: Sequence[str], *, note: Callable[[str], None] = silent
) -> tuple[ImageIndex, NDArray[np.int64]]:
    """Return the images that have one class, and its index [images]; one whose copies are of two is left out, and said.

    Raises:
        ImagesError: an image has no label, a label is no class or could be several, or no image is left.
    """
    images = image_index.images
    places = [*enumerate(image_index.indices.tolist()), *map(tuple, image_index.copies.tolist())]
    labels = images.labels([index for _, index in places], class_names, note=note)
    known = {position for (position, _), label in zip(places, labels, strict=True) if label is not None}
    # A copy without a label takes that of another.
    told = [pair for pair in zip(places, labels, strict=True) if pair[1] is not None or pair[0][0] not in known]
    found = class_indices(
        [label for _, label in told],
        class_names,
        names=[images.name(index) for (_, index), _ in told],
        where=images.spec,
        first_number=images.first_number,
        note=note,
    )
    classes: list[dict[int, str]] = [{} for _ in image_index.keys]  # by image, those of its copies and one that says so
    for ((position, index), _), label in zip(told, found.tolist(), strict=True):
        classes[position].setdefault(label, f"{images.name(index)} ({class_names[label]})")
    two = [" is also ".join(copies.values()) for copies in classes if len(copies) > 1]
    if two:
        count = "1 image has" if len(two) == 1 else f"{len(two)} images have"
        note(f"{count} two labels, and {'is' if len(two) == 1 else 'are'} left out: {some(two)}")
    if len(two) == len(classes):
        raise ImagesError(f"every image has two labels: {some(two)}", where=images.spec, fix="keep one copy of each")
    kept = np.flatnonzero([len(copies) == 1 for copies in classes])
    return image_index.part(kept), np.array([next(iter(classes[position])) for position in kept], dtype=np.int64)


def match_labels(
    image_index: ImageIndex, class_names: Sequence[str], *, note: Callable[[str], None] = silent
) -> NDArray[np.int64]:
    """Return the class index of every image in the catalogue [images].

    Raises:
        ImagesError: an image has no label or, by its copies, two; or a label is no class or could be several.
    """
    kept, labels = labelled(image_index, class_names, note=note)
    if len(kept) < len(image_index):
        what = (
            f"{len(image_index) - len(kept)} of {len(image_index)} images have two labels, one by each of their copies"
        )
        raise ImagesError(what, where=image_index.images.spec, fix="keep the copy whose label is right")
    return labels


def read_image_index(
    spec: str,
    recipe: Recipe,
    progress: Progress,
    *,
    known: Container[str] = (),
    pictures: DecodedImageCache | None = None,
    grey: GreyRange | None = None,
) -> ImageIndex:
    """Read every image of ``spec`` once: which are readable, which are the same, and the content key of each.

    An image that is ``known``, since the teacher has seen it, is not decoded; what is decoded is kept in ``pictures``.
    ``grey`` is the range of deep greys where other images have settled it.
    """
    data = recipe.data
    labels = {data.labelled: data.labelled_labels, data.evaluation: data.evaluation_labels}.get(spec)
    table = Path(labels) if labels else None
    images = open_images(spec, labels=table, label_format=data.label_format, note=progress.note).with_grey(grey)
    progress.start("images", len(images), "img")
    found = index_images(images, workers=default_workers(), advance=progress.advance, known=known, pictures=pictures)
    if found.unreadable:
        first = found.unreadable[0]
        progress.note(
            f"{len(found.unreadable)} of {len(images)} images are unreadable, e.g. {first.name}: {first.reason}"
        )
    return found

"""The images of a source that can be read, each once, in an order that depends on their content alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.sections import ImageSpec
from prgkit.config.shard import WHOLE, Shard
from prgkit.data.cache import CacheWriter, DecodedImageCache
from prgkit.data.decode import REDUCED_SIDE, SIXTEEN_BITS, GreyRange, UnreadableImage, known_formats
from prgkit.data.labels import class_indices
from prgkit.data.sources import DeepGreys, ImageSource, UnmeasuredGrey, measure_deep_greys, open_images
from prgkit.errors import ImagesError, some
from prgkit.progress import Progress, silent
from prgkit.storage.run_card import SkippedFile
from prgkit.workers import default_workers

Measured = Literal["measured"]  # of the deep greys among the images themselves
IMAGES_PER_TASK = 32  # small pictures decode faster than a task is handed over
IMAGES_LOOKED_AT = 32  # to say before training what is wrong with most
NEARLY_BLACK = 15  # of 255: what is left of 12 bits where a format of 16 keeps its upper byte


@dataclass(frozen=True)
class ImageIndex:
    """The readable, distinct images of a source in the order of their keys, so that names and places change nothing."""

    source: ImageSource
    indices: NDArray[np.int64]  # [images], into the source
    keys: tuple[str, ...]  # [images], of their content
    unreadable: tuple[SkippedFile, ...]
    copies: NDArray[np.int64]  # [duplicates, (position, index into the source)] of each exact copy that was dropped
    cache: DecodedImageCache | None = None  # of images that are decoded already
    deep_greys: DeepGreys | None = None  # where their range was found here

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def duplicates(self) -> int:
        """How many exact copies were dropped."""
        return len(self.copies)

    def subset(self, positions: NDArray[np.int64]) -> ImageIndex:
        """Return the images at ascending positions, and their copies."""
        if len(positions) == len(self):
            return self
        copies = self.copies[np.isin(self.copies[:, 0], positions)]
        copies[:, 0] = np.searchsorted(positions, copies[:, 0])
        keys = tuple(self.keys[position] for position in positions)
        return replace(self, indices=self.indices[positions], keys=keys, copies=copies)

    def read(self, position: int) -> Image.Image:
        """Return the image at a position, whole."""
        cached = self._cached(position)
        if cached is not None and min(cached.shape[:2]) < REDUCED_SIDE:  # a reduced one would be larger
            return Image.fromarray(cached)
        return self.source.read(int(self.indices[position]))

    def read_reduced(self, position: int) -> NDArray[np.uint8]:
        """Return the pixels [height, width, 3] to cut crops from: the shorter side no less than `REDUCED_SIDE`."""
        if (cached := self._cached(position)) is not None:
            return cached
        return np.asarray(self.source.read(int(self.indices[position]), min_side=REDUCED_SIDE))

    def _cached(self, position: int) -> NDArray[np.uint8] | None:
        return self.cache.get(self.keys[position]) if self.cache is not None else None


def read_image_index(
    spec: ImageSpec,
    progress: Progress,
    *,
    known: Container[str] = (),
    cache: DecodedImageCache | None = None,
    grey: GreyRange | Measured | None = "measured",
    shard: Shard = WHOLE,
) -> ImageIndex:
    """Open a source and read every image once: which are readable, which are the same, and the key of each.

    An image that is ``known``, since the teacher has seen it, is not decoded; what is decoded goes into ``cache``.
    ``grey`` is the range of deep greys where other images have settled it, and None where those have no deep grey, so
    that each goes by its own values. Of a ``shard`` there may be none.
    """
    source = open_images(spec, note=progress.note, shard=shard)
    if grey != "measured":
        source = source.with_grey(grey)
    chosen = source.share(shard)
    progress.start("images", len(chosen), "img")
    index = index_images(
        source, workers=default_workers(), advance=progress.advance, known=known, cache=cache, chosen=chosen
    )
    if index.unreadable:
        first, count = index.unreadable[0], len(index.unreadable)
        progress.note(f"{count} of {len(chosen)} images are unreadable, e.g. {first.name}: {first.reason}")
    return index


def index_images(
    source: ImageSource,
    *,
    workers: int,
    advance: Callable[[int], None] = lambda count: None,
    known: Container[str] = (),
    cache: DecodedImageCache | None = None,
    chosen: NDArray[np.int64] | None = None,
) -> ImageIndex:
    """Read every image once, in so many threads; list what cannot be decoded and drop exact copies.

    ``known`` are keys of images that were decoded before, and need not be again to know that they can be; ``cache``
    keeps what is decoded. Of a part, those ``chosen``, maybe none can be read.

    Raises:
        ImagesError: no image of the whole source can be read.
    """
    wanted_indices = range(len(source)) if chosen is None else chosen.tolist()
    is_part = len(wanted_indices) < len(source) or source.is_part
    known_formats()  # loads Pillow's plugins before threads would do it all at once
    outcomes, deep_greys = Outcomes(), None
    pool = ThreadPoolExecutor(max(1, workers))
    with cache.adding() if cache is not None else nullcontext() as writer:

        def wanted(key: str) -> bool:
            return key not in known or (writer is not None and writer.wants(key))

        def examine_all(source: ImageSource, indices: Sequence[int]) -> None:
            tasks = [indices[start : start + IMAGES_PER_TASK] for start in range(0, len(indices), IMAGES_PER_TASK)]
            results = pool.map(lambda task: examine(source, task, wanted, writer), tasks)
            for task, examined in zip(tasks, results, strict=True):
                advance(sum(map(outcomes.add, task, examined)))

        try:
            examine_all(source, wanted_indices)
            if outcomes.unmeasured:
                waiting = [index for _, index in sorted(outcomes.unmeasured)]  # by content: what is measured first
                whole = source.whole()
                measured = deep_greys_of(whole, pool.map) if is_part else waiting  # every part finds the same range
                deep_greys = measure_deep_greys(whole, measured, pool.map)
                source = source.with_grey(deep_greys.grey if deep_greys else SIXTEEN_BITS)
                examine_all(source, waiting)
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    if not outcomes.indices and not is_part:
        raise none_readable(source, outcomes.unreadable)
    keys = sorted(outcomes.indices)
    indices = np.array([outcomes.indices[key] for key in keys], dtype=np.int64)
    unreadable, copies = tuple(outcomes.unreadable), outcomes.copies_of(keys)
    return ImageIndex(source, indices, tuple(keys), unreadable, copies, cache, deep_greys)


@dataclass
class Outcomes:
    """What came of reading each image."""

    indices: dict[str, int] = field(default_factory=dict)  # by key, of the first image that has it
    copies: list[tuple[str, int]] = field(default_factory=list)  # key and index of the others
    unreadable: list[SkippedFile] = field(default_factory=list)
    unmeasured: list[tuple[str, int]] = field(default_factory=list)  # digest and index of deep greys that have to wait

    def add(self, index: int, outcome: str | SkippedFile | UnmeasuredGrey) -> bool:
        """Note one image's key, or why it has none; return whether it is done with."""
        if isinstance(outcome, UnmeasuredGrey):
            self.unmeasured.append((outcome.digest, index))
            return False
        if isinstance(outcome, SkippedFile):
            self.unreadable.append(outcome)
        elif self.indices.setdefault(outcome, index) != index:
            self.copies.append((outcome, index))
        return True

    def copies_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return each copy's position among ``keys`` and its index [copies, 2]."""
        positions = {key: position for position, key in enumerate(keys)}
        return np.array([(positions[key], index) for key, index in self.copies], dtype=np.int64).reshape(-1, 2)


def examine(
    source: ImageSource, indices: Sequence[int], wanted: Callable[[str], bool], writer: CacheWriter | None
) -> list[str | SkippedFile | UnmeasuredGrey]:
    """Decode one task's images and return nothing but their keys, so that memory holds one picture a worker."""
    outcomes: list[str | SkippedFile | UnmeasuredGrey] = []
    for index in indices:
        try:
            result = source.read_with_key(index, wanted)
        except UnreadableImage as error:
            outcomes.append(SkippedFile(name=error.name, reason=error.reason))
            continue
        if isinstance(result, UnmeasuredGrey):
            outcomes.append(result)
            continue
        key, image = result
        if writer is not None and image is not None:
            writer.add(key, np.asarray(image))
        outcomes.append(key)
    return outcomes


def grey_of_whole(source: ImageSource) -> GreyRange | None:
    """Return the range of the deep greys of a whole source, of which this may be a part; None where it has none."""
    whole = source.whole()
    with ThreadPoolExecutor(default_workers()) as pool:
        places = deep_greys_of(whole, pool.map)
        found = measure_deep_greys(whole, places, pool.map)
    return found.grey if found else SIXTEEN_BITS if places else None


def deep_greys_of(source: ImageSource, mapper: Callable[..., Iterable[str]]) -> list[int]:
    """Return the deep greys of a whole source, in the order of their content."""

    def digest_of(index: int) -> str:
        try:
            result = source.read_with_key(index, lambda _: False)
        except UnreadableImage:
            return ""
        return result.digest if isinstance(result, UnmeasuredGrey) else ""

    digests = mapper(digest_of, range(len(source)))
    return [index for digest, index in sorted(zip(digests, range(len(source)), strict=True)) if digest]


def held_out_places(keys: Sequence[str]) -> NDArray[np.float64]:
    """Return where each image [n] stands between 0 and 1, by its content: those below a share are held out."""
    return np.array([int(key[-8:], 16) / 2**32 for key in keys])


def none_readable(source: ImageSource, unreadable: Sequence[SkippedFile]) -> ImagesError:
    """Build the error for images of which none can be read, with the first reasons."""
    reasons = "; ".join(f"{image.name}: {image.reason}" for image in unreadable[:3])
    return ImagesError(
        f"none of the {len(source)} images in {source.spec} can be read ({reasons})",
        where=source.spec,
        fix="open one of them in an image viewer; copy or download the images again if they are damaged",
    )


def nearly_black(image_index: ImageIndex) -> bool:
    """Tell whether half of the images looked at or more are black but for a bright value in a thousand."""
    return half_are(image_index, lambda pixels: bool(np.percentile(pixels, 99.9) <= NEARLY_BLACK))


def of_one_colour(image_index: ImageIndex) -> bool:
    """Tell whether half of the images looked at or more are of one colour throughout."""
    return half_are(image_index, lambda pixels: bool((pixels == pixels[:1, :1]).all()))


def half_are(image_index: ImageIndex, test: Callable[[NDArray[np.uint8]], bool]) -> bool:
    """Tell whether half of some images or more, taken from all over the index, pass a test of their pixels."""
    positions = np.unique(np.linspace(0, len(image_index) - 1, IMAGES_LOOKED_AT).astype(int)).tolist()
    return bool(np.mean([test(image_index.read_reduced(position)) for position in positions]) >= 0.5)


def select_labelled(
    image_index: ImageIndex, class_names: Sequence[str], *, note: Callable[[str], None] = silent
) -> tuple[ImageIndex, NDArray[np.int64]]:
    """Return the images that have one class, and its index [images]; one whose copies are of two is left out, and said.

    Raises:
        ImagesError: an image has no label, a label is no class or could be several, or no image is left.
    """
    source = image_index.source
    places = [*enumerate(image_index.indices.tolist()), *map(tuple, image_index.copies.tolist())]  # (position, index)
    labels = source.labels([index for _, index in places], class_names, note=note)
    known = {position for (position, _), label in zip(places, labels, strict=True) if label is not None}
    # A copy without a label takes that of another.
    used = [
        pair
        for pair in zip(places, labels, strict=True)
        if pair[1] is not None or not (pair[0][0] in known or source.partly_labelled)
    ]
    indices = class_indices(
        [label for _, label in used],
        class_names,
        names=[source.name(index) for (_, index), _ in used],
        where=source.spec,
        first_number=source.first_number,
        note=note,
    )
    classes: list[dict[int, str]] = [{} for _ in image_index.keys]  # by image, those of its copies and one that says so
    for ((position, index), _), label in zip(used, indices.tolist(), strict=True):
        classes[position].setdefault(label, f"{source.name(index)} ({class_names[label]})")
    two = [" is also ".join(copies.values()) for copies in classes if len(copies) > 1]
    if two:
        count = "1 image has" if len(two) == 1 else f"{len(two)} images have"
        note(f"{count} two labels, and {'is' if len(two) == 1 else 'are'} left out: {some(two)}")
    if len(two) == len(classes):
        raise ImagesError(f"every image has two labels: {some(two)}", where=source.spec, fix="keep one copy of each")
    positions = np.flatnonzero([len(copies) == 1 for copies in classes])
    labelled = np.array([next(iter(classes[position])) for position in positions], dtype=np.int64)
    return image_index.subset(positions), labelled

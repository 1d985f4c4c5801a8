"""Where images come from: one way to open, read, list and prepare them, whatever they lie in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.image_size import Size, sides, size_of
from prgkit.config.recipe import Recipe
from prgkit.data.cache import Adder, DecodedImageCache
from prgkit.data.decode import (
    DEPTHS,
    SIXTEEN_BITS,
    GreyRange,
    UnreadableImage,
    decode,
    extremes,
    formats_for,
    grey_range,
    holds_deep_grey,
    is_deep,
    known_formats,
    reduced,
    to_rgb,
    upright_rgb,
)
from prgkit.data.hub import open_demo, open_hub, open_torchvision
from prgkit.data.label_table import LabelTable, read_label_table
from prgkit.data.labels import Label, class_indices
from prgkit.data.sources import Source, open_path, read_span, require
from prgkit.data.workers import default_workers
from prgkit.errors import ImagesError, some
from prgkit.progress import Progress, silent

if TYPE_CHECKING:
    from prgkit.config.recipe import LabelFormat

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
IMAGES_PER_TASK = 32  # small pictures decode faster than a task is handed over
ENOUGH = 512  # pixels of the shorter side that crops are cut from; it can be up to twice as many
GREYS_LOOKED_AT = 256  # of a set's deep greys, to find the range they are in
LOOKED_AT = 32  # images, to say before training what is wrong with most
NEARLY_BLACK = 15  # of 255: what is left of 12 bits where a format of 16 keeps its upper byte
LONGEST = 100  # times the shorter side that is resized: 1 pixel by 60,000 would be scaled to 224 by 13 million


LIBRARIES: dict[str, Callable[[str], Source]] = {"torchvision": open_torchvision, "hf": open_hub, "demo": open_demo}


def lies_in_files(spec: str) -> bool:
    """Tell whether images lie in files that people put there, and not in a library's dataset."""
    return spec.partition(":")[0] not in LIBRARIES


def open_images(
    spec: str,
    *,
    labels: Path | None = None,
    label_format: LabelFormat | None = None,
    note: Callable[[str], None] = silent,
) -> ImageSource:
    """Open a folder, a .zip, tar shards, ``torchvision:NAME/split``, ``hf:owner/name/split`` or ``demo:digits/split``.

    ``labels`` is a table such as a CSV of ``file,label`` rows; without it, labels are those the source itself carries.
    ``label_format`` says how to read them where they do not say it themselves. ``note`` is told of what takes a while.

    Raises:
        ImagesError: there is nothing to open, or no image in it.
    """
    kind, _, rest = spec.partition(":")
    source = LIBRARIES[kind](rest) if kind in LIBRARIES else open_path(spec, note)
    if len(source) == 0:
        raise ImagesError(f"{spec} holds no images", fix="name another split or source")
    table = read_label_table(Path(os.path.expanduser(labels)), spec, source, label_format) if labels else None
    return ImageSource(spec, source, table, label_format.first_number if label_format is not None else None)


class ImageSource:
    """Numbered images of one source; threads, forks and pickled copies may read at once."""

    def __init__(self, spec: str, source: Source, table: LabelTable | None, first_number: int | None = None) -> None:
        self.spec = spec
        self.grey: GreyRange | None = None  # of its deep greys, black and white; None: each by its own values
        self._source = source
        self._table = table
        self.first_number = first_number  # of labels that are numbers; None: found from them

    def __len__(self) -> int:
        return len(self._source)

    @property
    def left_out(self) -> str:
        """What the source passed over, in words; empty where that is nothing."""
        return str(getattr(self._source, "left_out", ""))

    def with_grey(self, grey: GreyRange | None) -> ImageSource:
        """Return the same images with the values of a deep grey that are black and white in all of them."""
        ranged = copy(self)
        ranged.grey = grey
        return ranged

    def name(self, index: int) -> str:
        """Return the image's name for people: its path below the source."""
        return self._source.name(index)

    def label(self, index: int) -> str | int | None:
        """Return the image's class name or number as it is written, or None; only evaluation asks."""
        return self._table.plain_labels.get(index) if self._table is not None else self._source.label(index)

    def labels(
        self, indices: Sequence[int], class_names: Sequence[str], *, note: Callable[[str], None] = silent
    ) -> list[Label | None]:
        """Return the labels of images as they are written, and say how a table of them is read.

        Raises:
            ImagesError: it is not certain which column of the table holds them, or an image has two.
        """
        found = self._table.labels(class_names, note=note) if self._table is not None else None
        return [self._source.label(index) if found is None else found.get(index) for index in indices]

    def files(self, *, dated: bool = False) -> list[int]:
        """Return a number for each image's name and size in bytes, and its date where asked; none is read for it."""
        size, date = (getattr(self._source, name, lambda _: 0) for name in ("size", "date"))
        indices = range(len(self))
        told = (f"{size(one)} {date(one) if dated else ''} {self.name(one)}".encode() for one in indices)
        return [int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "little") for one in told]

    def read(self, index: int, *, enough: int | None = None) -> Image.Image:
        """Return the image as upright RGB, reduced where ``enough`` [pixels] allows it, or raise UnreadableImage."""
        return decoded(self._source.fetch(index), self.name(index), enough, self.grey)

    def key(self, index: int) -> str:
        """Return 32 hex digits that depend on the image's content alone, and for a deep grey on how it is read."""
        fetched = self._source.fetch(index)
        return content_key(fetched, self.grey if is_deep_grey(fetched, self.name(index)) else None)

    def read_with_key(self, index: int, wanted: Callable[[str], bool]) -> tuple[str, Image.Image | None] | Ungauged:
        """Return key and reduced image, fetching once; an image whose key is not ``wanted`` is not decoded.

        Nor is a deep grey as long as its range is not known.
        """
        fetched, name = self._source.fetch(index), self.name(index)
        deep = is_deep_grey(fetched, name)
        if deep and self.grey is None:
            return Ungauged(content_key(fetched))
        key = content_key(fetched, self.grey if deep else None)
        return key, decoded(fetched, name, ENOUGH, self.grey) if wanted(key) else None

    def values(self, index: int) -> tuple[float, float, bool] | None:
        """Return a deep grey's least and largest value and whether all are whole; None of any other image."""
        try:
            fetched = self._source.fetch(index)
            if not is_deep_grey(fetched, self.name(index)):
                return None
            with opened(fetched, self.name(index)) as image:
                return *extremes(np.asarray(image).astype(np.float32)), image.mode != "F"
        except Exception:  # an unreadable one is told of where it is read
            return None


class Ungauged(NamedTuple):
    """A deep grey of which it is not known yet which values are black and white."""

    digest: str  # of its content


class DeepGreys(NamedTuple):
    """What was found of the deep greys of a set."""

    images: int
    looked_at: int
    values: tuple[float, float]  # the least and the largest seen
    grey: GreyRange

    def __str__(self) -> str:
        low, high = self.grey
        bits = f" ({DEPTHS[high]} bits)" if low == 0 and high in DEPTHS else ""
        return (
            f"{self.images:,} images are deep grey; the values of the {self.looked_at} looked at go from "
            f"{self.values[0]:,.6g} to {self.values[1]:,.6g}, so {low:,.6g} to {high:,.6g}{bits} is black to white"
        )


def gauge(images: ImageSource, indices: Sequence[int], run: Callable[..., Iterable[Any]] = map) -> DeepGreys | None:
    """Find which values of the deep greys at ``indices`` are black and white, from the first that can be read."""
    seen = [values for values in run(images.values, indices[:GREYS_LOOKED_AT]) if values is not None]
    if not seen:
        return None
    low, high = min(values[0] for values in seen), max(values[1] for values in seen)
    whole = all(values[2] for values in seen)
    return DeepGreys(len(indices), len(seen), (low, high), grey_range(low, high, whole=whole))


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


def load_image(image: str | os.PathLike[str] | bytes, *, grey: GreyRange | None = None) -> Image.Image:
    """Read one image file, or its bytes, as upright RGB; of a deep grey, ``grey`` is black and white.

    Raises:
        ImagesError: there is no such file, or it is no readable image.
    """
    if isinstance(image, bytes):
        return decode(image, "the image", grey=grey)
    path = Path(os.path.expanduser(image))
    data = read_span(require(path, str(image), fix="give the path of an image file"), str(image))
    return decode(data, str(image), grey=grey)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input; mean and std are applied inside the models."""

    image_size: Size
    crop: float  # share of the resized shorter side that the centre crop keeps (timm's crop_pct)
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False  # resize both sides to theirs whatever the shape, as SigLIP does; crop then plays no part
    grey_range: GreyRange | None = None  # of deep greys, black and white; None: each by its own values

    def __post_init__(self) -> None:
        if min(sides(self.image_size)) < 1 or not 0 < self.crop <= 1 or self.interpolation not in INTERPOLATIONS:
            raise ImagesError(
                f"cannot prepare images with image_size {self.image_size}, crop {self.crop}, {self.interpolation!r}",
                fix=f"image_size from 1, crop in (0, 1], interpolation one of {', '.join(INTERPOLATIONS)}",
            )

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize until it covers the crop, crop the centre: [H, W, 3], pixel for pixel as torchvision and timm do.

        Of a picture that is more than `LONGEST` times as long as it is short, the middle is resized.
        """
        rgb = trimmed(image if image.mode == "RGB" else to_rgb(image, self.grey_range))
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
        grey = list(self.grey_range) if self.grey_range else None
        own = {"image_size": size, "mean": list(self.mean), "std": list(self.std), "grey_range": grey}
        return asdict(self) | own

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
                grey_range=as_grey_range(values.get("grey_range")),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"the preprocessing is damaged: {error!r}"
            raise ImagesError(what, fix="export the run again: prgkit export") from error


def as_grey_range(pair: Any) -> GreyRange | None:
    """Return what JSON made of a range."""
    if pair is None:
        return None
    low, high = pair
    return float(low), float(high)


def trimmed(image: Image.Image) -> Image.Image:
    """Return the middle of a picture, no more than `LONGEST` times as long as it is short: nearly always all of it."""
    left, top = margins(image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def margins(size: tuple[int, int]) -> tuple[int, int]:
    """Return how much `trimmed` cuts off on the left and right, and at the top and bottom."""
    left, top = (max(0, side - LONGEST * min(size)) // 2 for side in size)
    return left, top


def decoded(
    fetched: bytes | Image.Image, name: str, enough: int | None = None, grey: GreyRange | None = None
) -> Image.Image:
    """Turn what a source hands out into RGB."""
    if isinstance(fetched, bytes):
        return decode(fetched, name, enough=enough, grey=grey)
    return reduced(upright_rgb(fetched, grey), enough)


def opened(fetched: bytes | Image.Image, name: str) -> AbstractContextManager[Image.Image]:
    """Open what a source hands out, without decoding it yet."""
    return (
        Image.open(BytesIO(fetched), formats=formats_for(name)) if isinstance(fetched, bytes) else nullcontext(fetched)
    )


def is_deep_grey(fetched: bytes | Image.Image, name: str) -> bool:
    """Tell of what a source hands out whether it is grey of more than 8 bits."""
    return holds_deep_grey(fetched, name) if isinstance(fetched, bytes) else is_deep(fetched)


def content_key(fetched: bytes | Image.Image, grey: GreyRange | None = None) -> str:
    """Hash the encoded bytes of a file, or the size and pixels of a picture that never had any.

    A deep grey is another picture where other values are black and white.
    """
    if isinstance(fetched, bytes):
        read_as = b"" if grey in (None, SIXTEEN_BITS) else repr(grey).encode()
        return hashlib.blake2b(fetched + read_as, digest_size=16).hexdigest()
    rgb = upright_rgb(fetched, grey)
    return hashlib.blake2b(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes(), digest_size=16).hexdigest()


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

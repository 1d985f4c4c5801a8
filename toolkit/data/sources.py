"""Where images come from: one way to open, read and name them, whatever they lie in."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.config.sections import ImageSpec
from prgkit.config.shard import BLOCK_IMAGES, WHOLE, Shard
from prgkit.data.archives import TAR, TarSource, ZipSource, expand_braces
from prgkit.data.decode import (
    DEPTHS,
    REDUCED_SIDE,
    GreyRange,
    content_key,
    decoded,
    extremes,
    formats_for,
    grey_range,
    image_suffixes,
    is_deep_grey,
    is_picture,
    suffix_of,
)
from prgkit.data.files import KINDS, FolderSource, Source, read_head, require
from prgkit.data.hub import open_demo, open_hub, open_torchvision
from prgkit.data.label_table import read_label_table
from prgkit.data.labels import Label, LabelTable
from prgkit.errors import ImagesError
from prgkit.progress import silent
from prgkit.storage.atomic import as_on_disk, composed
from prgkit.storage.remote import is_url, look_up

MOST_BYTES_AT_HAND = 64 << 30  # of tars that are read in any order; more are read one after the other
WINDOW_BYTES = 8 << 30  # of those tars among which an epoch is shuffled then
MOST_TARS = 100_000  # that a URL with braces may name
MOST_GREYS_MEASURED = 256  # of a source's deep greys, to find the range they are in
LIBRARIES: dict[str, Callable[[str], Source]] = {"torchvision": open_torchvision, "hf": open_hub, "demo": open_demo}


def open_images(images: str | ImageSpec, *, note: Callable[[str], None] = silent, shard: Shard = WHOLE) -> ImageSource:
    """Open a folder, a .zip, tar shards, ``torchvision:NAME/split``, ``hf:owner/name/split`` or ``demo:digits/split``.

    Without a table of labels in an `ImageSpec`, labels are those the source itself carries. ``note`` is told of what
    takes a while. Of tars, those that a ``shard`` does not need may be left unopened, and labels with them.

    Raises:
        ImagesError: there is nothing to open, or no image in it.
    """
    spec = ImageSpec(images) if isinstance(images, str) else images
    kind, colon, rest = spec.source.partition(":")
    source = LIBRARIES[kind](rest) if colon and kind in LIBRARIES else open_path(spec.source, note, shard)
    if isinstance(source, TarSource) and source.is_part:
        return ImageSource(spec.source, source)
    if len(source) == 0:
        raise ImagesError(f"{spec.source} holds no images", fix="name another split or source")
    table = read_label_table(Path(os.path.expanduser(spec.labels)), spec, source) if spec.labels else None
    return ImageSource(spec.source, source, table, spec.label_format.first_number)


def open_path(spec: str, note: Callable[[str], None], shard: Shard) -> Source:
    """Open a folder, a .zip, a .tar or several tars named with braces; ``~`` and ``$VARIABLES`` are expanded.

    Raises:
        ImagesError: there is nothing there, it is damaged, or it holds no images.
    """
    if is_url(spec):
        return open_url(spec, note, shard)
    expanded = os.path.expandvars(os.path.expanduser(spec))
    if not expanded:  # as a path it would be the current folder
        raise ImagesError(f"the images have no name: {spec!r}", fix=f"give {KINDS}; is a variable not set?")
    path = Path(expanded)
    try:
        path = as_on_disk(path)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ImagesError(f"{spec[:80]} cannot be opened: {error.strerror}", fix=f"give {KINDS}") from error
    if path.is_dir():
        return FolderSource(spec, path)
    if TAR.search(path.name):
        shards = [str(path)] if path.exists() else expand_braces(str(path))  # ends at the first that is missing
        return TarSource(spec, [require(Path(one), spec) for one in shards], note, shard)
    require(path, spec)
    if path.suffix.lower() == ".zip":
        return ZipSource(spec, path)
    if suffix_of(path.name) in image_suffixes() or is_picture(read_head(path), path.name):
        raise ImagesError(f"{spec} is a single image", where=path, fix="give the folder that holds it")
    fix = "decompress it to a plain .tar" if re.search(r"\.tar\.\w+$", path.name.lower()) else f"give {KINDS}"
    raise ImagesError(f"{spec} is neither a folder nor an archive that can be read", where=path, fix=fix)


def open_url(spec: str, note: Callable[[str], None], shard: Shard) -> TarSource:
    """Open tar shards by their URL, such as ``s3://bucket/shards-{000000..000999}.tar``."""
    urls = list(islice(expand_braces(spec), MOST_TARS))
    if not all(TAR.search(re.split(r"[?#]", url)[0]) for url in urls):
        fix = "pack the pictures into tar files: https://host/shards-{000..004}.tar"
        raise ImagesError(f"{spec} is no tar file", fix=fix)
    with ThreadPoolExecutor(8) as pool:
        return TarSource(spec, list(pool.map(look_up, urls)), note, shard)


def lies_in_files(spec: str) -> bool:
    """Tell whether images lie in files that people put there, and not in a library's dataset."""
    kind, colon, _ = spec.partition(":")
    return not (colon and kind in LIBRARIES) and not is_url(spec)


def number_of(state: bytes) -> int:
    """Return a number of 64 bits that changes with any byte."""
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")


class ImageSource:
    """Numbered images of one source; threads, forks and pickled copies may read at once."""

    def __init__(
        self, spec: str, source: Source, table: LabelTable | None = None, first_number: int | None = None
    ) -> None:
        self.spec = spec
        self.grey: GreyRange | None = None  # of its deep greys, black and white; None: each by its own values
        self.grey_is_settled = False
        self.first_number = first_number  # of labels that are numbers; None: found from them
        self._source = source
        self._table = table

    def __len__(self) -> int:
        return len(self._source)

    @property
    def left_out(self) -> str:
        """What the source passed over, in words; empty where that is nothing."""
        return str(getattr(self._source, "left_out", ""))

    def with_grey(self, grey: GreyRange | None) -> ImageSource:
        """Return the same images with the values of a deep grey that are black and white in all of them."""
        ranged = copy(self)
        ranged.grey, ranged.grey_is_settled = grey, True
        return ranged

    def name(self, index: int) -> str:
        """Return the image's name for people: its path below the source."""
        return self._source.name(index)

    def path(self, index: int) -> str:
        """Return the image's name with the path of the source before it, as it can be opened from here.

        In a folder it is the file's own name, whatever its accents are made of, unless that cannot be shown.
        """
        name = self.name(index)
        if not lies_in_files(self.spec):
            return name
        if isinstance(self._source, FolderSource) and composed(self._source.paths[index]) == name:
            name = self._source.paths[index]
        place = Path(os.path.expandvars(os.path.expanduser(self.spec)))
        # A shard's name is part of its images' names.
        return str((place.parent if TAR.search(place.name) else place) / name)

    def labels(
        self, indices: Sequence[int], class_names: Sequence[str], *, note: Callable[[str], None] = silent
    ) -> list[Label | None]:
        """Return the labels of images as they are written, and say how a table of them is read.

        Raises:
            ImagesError: it is not certain which column of the table holds them, or an image has two.
        """
        if self._table is None:
            return [self._source.label(index) for index in indices]
        labels = self._table.labels(class_names, note=note)
        return [labels.get(index) for index in indices]

    @property
    def partly_labelled(self) -> bool:
        """Whether its labels are those of a sheet, on which some images stand and the others have none."""
        return self._table is not None and self._table.is_sheet

    def file_digests(self, *, dated: bool = False) -> list[int]:
        """Return a number for each image's name and size in bytes, and its date if ``dated``; no image is read."""
        size, date = (getattr(self._source, name, lambda _: 0) for name in ("size", "date"))
        states = (f"{size(i)} {date(i) if dated else ''} {self.name(i)}".encode() for i in range(len(self)))
        return [number_of(state) for state in states]

    @property
    def is_part(self) -> bool:
        """Whether tars that another shard reads were not opened."""
        return isinstance(self._source, TarSource) and self._source.is_part

    def whole(self) -> ImageSource:
        """Return the images of all shards."""
        whole = copy(self)
        if isinstance(self._source, TarSource):
            whole._source = self._source.whole()
        return whole

    def share(self, shard: Shard) -> NDArray[np.int64]:
        """Return the images of a shard."""
        return np.flatnonzero(self.shard_numbers(shard.total) == shard.number) if shard.total else np.arange(len(self))

    def shard_numbers(self, total: int) -> NDArray[np.int64]:
        """Return of each image in which of ``total`` shards it is: whole tars in turn, else blocks of neighbours.

        So a shard follows from the listing alone, and reads what lies side by side.
        """
        source = self._source
        units = np.arange(len(self)) // min(BLOCK_IMAGES, math.ceil(len(self) / total))
        if isinstance(source, TarSource) and len(source.shards) >= total:
            units = source.places[:, 0]
        return units % total

    def windows(self, indices: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64] | None:
        """Return for each of ``indices`` [n] in which part of an epoch its tar is read; None where all fit the disk.

        Tars come in random order and are read once an epoch, WINDOW_BYTES of them at a time: a shuffle buffer.
        """
        source = self._source
        if not isinstance(source, TarSource) or source.bytes_of_tars.sum() <= MOST_BYTES_AT_HAND:
            return None
        order = generator.permutation(len(source.shards))
        window = np.empty(len(order), np.int64)
        window[order] = np.cumsum(source.bytes_of_tars[order]) // WINDOW_BYTES
        windows: NDArray[np.int64] = window[source.places[indices, 0]]
        return windows

    @property
    def tars(self) -> int:
        """How many tars the images lie in; 0 where they lie in none."""
        return len(self._source.given) if isinstance(self._source, TarSource) else 0

    def listing(self) -> tuple[int, str]:
        """Return how many images there are, or tars of them, and 16 hex digits that change with the name of any."""
        source, names = self._source, hashlib.blake2b(digest_size=8)
        for name in source.states() if isinstance(source, TarSource) else map(self.name, range(len(self))):
            names.update(name.encode() + b"\n")
        return self.tars or len(self), names.hexdigest()

    def read(self, index: int, *, min_side: int | None = None) -> Image.Image:
        """Return the image as upright RGB, reduced towards ``min_side`` [pixels], or raise UnreadableImage."""
        return decoded(self._source.fetch(index), self.name(index), min_side, self.grey)

    def key(self, index: int) -> str:
        """Return 32 hex digits that depend on the image's content alone, and for a deep grey on how it is read."""
        fetched = self._source.fetch(index)
        return content_key(fetched, self.grey, deep=is_deep_grey(fetched, self.name(index)))

    def read_with_key(
        self, index: int, wanted: Callable[[str], bool]
    ) -> tuple[str, Image.Image | None] | UnmeasuredGrey:
        """Return key and reduced image, fetching once; an image whose key is not ``wanted`` is not decoded.

        Nor is a deep grey as long as its range is not known.
        """
        fetched, name = self._source.fetch(index), self.name(index)
        deep = is_deep_grey(fetched, name)
        if deep and not self.grey_is_settled:
            return UnmeasuredGrey(content_key(fetched))
        key = content_key(fetched, self.grey, deep=deep)
        return key, decoded(fetched, name, REDUCED_SIDE, self.grey) if wanted(key) else None

    def measure(self, index: int) -> GreyValues | None:
        """Return the extremes of a deep grey; None of any other image."""
        try:
            fetched, name = self._source.fetch(index), self.name(index)
            if not is_deep_grey(fetched, name):
                return None
            image = Image.open(BytesIO(fetched), formats=formats_for(name)) if isinstance(fetched, bytes) else fetched
            return GreyValues(*extremes(np.asarray(image).astype(np.float32)), whole=image.mode != "F")
        except Exception:  # an unreadable one is told of where it is read
            return None


class UnmeasuredGrey(NamedTuple):
    """A deep grey of which it is not known yet which values are black and white."""

    digest: str  # of its content


class GreyValues(NamedTuple):
    """The least and the largest value of a deep grey, and whether all are whole numbers."""

    low: float
    high: float
    whole: bool


class DeepGreys(NamedTuple):
    """The deep greys of a source, and the range that those which were measured are in."""

    image_count: int
    measured_count: int
    low: float  # the least value seen
    high: float
    grey: GreyRange  # what is black and white

    def __str__(self) -> str:
        black, white = self.grey
        bits = f" ({DEPTHS[white]} bits)" if black == 0 and white in DEPTHS else ""
        return (
            f"{self.image_count:,} images are deep grey; the values of the {self.measured_count} looked at go from "
            f"{self.low:,.6g} to {self.high:,.6g}, so {black:,.6g} to {white:,.6g}{bits} is black to white"
        )


Measured = Iterable[GreyValues | None]


def measure_deep_greys(
    source: ImageSource,
    indices: Sequence[int],
    mapper: Callable[[Callable[[int], GreyValues | None], Sequence[int]], Measured] = map,
) -> DeepGreys | None:
    """Find which values of the deep greys at ``indices`` are black and white, from the first that can be read."""
    seen = [values for values in mapper(source.measure, indices[:MOST_GREYS_MEASURED]) if values is not None]
    if not seen:
        return None
    low, high = min(values.low for values in seen), max(values.high for values in seen)
    grey = grey_range(low, high, whole=all(values.whole for values in seen))
    return DeepGreys(len(indices), len(seen), low, high, grey)

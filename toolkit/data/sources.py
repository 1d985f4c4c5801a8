"""Where images come from: one way to open, read and name them, whatever they lie in."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from prgkit.data.archives import TAR, TarSource, ZipSource, expand_braces
from prgkit.data.decode import (
    DEPTHS,
    ENOUGH,
    GreyRange,
    content_key,
    decoded,
    extremes,
    grey_range,
    image_suffixes,
    is_deep_grey,
    is_picture,
    opened,
    suffix_of,
)
from prgkit.data.files import KINDS, FolderSource, Source, read_head, require
from prgkit.data.hub import open_demo, open_hub, open_torchvision
from prgkit.data.label_table import read_label_table
from prgkit.data.labels import Label, LabelTable
from prgkit.errors import ImagesError
from prgkit.progress import silent
from prgkit.storage.atomic import as_on_disk

if TYPE_CHECKING:
    from prgkit.config.recipe import LabelFormat


GREYS_LOOKED_AT = 256  # of a set's deep greys, to find the range they are in

LIBRARIES: dict[str, Callable[[str], Source]] = {"torchvision": open_torchvision, "hf": open_hub, "demo": open_demo}


def open_path(spec: str, note: Callable[[str], None] = silent) -> Source:
    """Open a folder, a .zip, a .tar or several tars named with braces; ``~`` and ``$VARIABLES`` are expanded.

    Raises:
        ImagesError: there is nothing there, it is damaged, or it holds no images.
    """
    path = Path(os.path.expandvars(os.path.expanduser(spec)))
    try:
        path = as_on_disk(path)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ImagesError(f"{spec[:80]} cannot be opened: {error.strerror}", fix=f"give {KINDS}") from error
    if path.is_dir():
        return FolderSource(spec, path)
    if TAR.search(path.name):
        shards = [str(path)] if path.exists() else expand_braces(str(path))
        return TarSource(
            spec, [require(Path(shard), spec) for shard in shards], note
        )  # ends at the first that is missing
    require(path, spec)
    if path.suffix.lower() == ".zip":
        return ZipSource(spec, path)
    if suffix_of(path.name) in image_suffixes() or is_picture(read_head(path), path.name):
        raise ImagesError(f"{spec} is a single image", where=path, fix="give the folder that holds it")
    fix = "decompress it to a plain .tar" if re.search(r"\.tar\.\w+$", path.name.lower()) else f"give {KINDS}"
    raise ImagesError(f"{spec} is neither a folder nor an archive that can be read", where=path, fix=fix)


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

"""Seeded views of an image: the same crop and flip for teacher and student, each resized for itself."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from prgkit.config.image_size import Size, sides
from prgkit.config.sections import Views
from prgkit.data.decode import REDUCED_SIDE, UnreadableImage
from prgkit.data.index import ImageIndex
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ImagesError
from prgkit.workers import default_workers, work_ahead


@dataclass(frozen=True)
class View:
    """A crop as shares of the image's width and height, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


def seeded_view(key: str, number: int, width: int, height: int, views: Views) -> View:
    """Return view ``number`` >= 1 of the image with content ``key``: a function of (seed, image, view) alone.

    A random resized crop (Szegedy et al., 2015) in closed form: the area's share is uniform in ``crop_scale``, the
    aspect ratio log-uniform in [3/4, 4/3] times ``aspect``, and a side that would leave the image is cut to it.
    """
    digest = hashlib.blake2b(f"{views.seed}/{key}/{number}".encode(), digest_size=40).digest()
    area_at, ratio_at, x_at, y_at, flip_at = (np.frombuffer(digest, dtype="<u8") / 2.0**64).tolist()
    low, high = views.crop_scale
    area = (low + (high - low) * area_at) * width * height
    ratio = (views.aspect or 1.0) * math.exp((2 * ratio_at - 1) * math.log(4 / 3))
    crop_width = min(math.sqrt(area * ratio), width) / width
    crop_height = min(math.sqrt(area / ratio), height) / height
    left, top = x_at * (1 - crop_width), y_at * (1 - crop_height)
    return View(left, top, left + crop_width, top + crop_height, views.flip and flip_at < 0.5)


def render(picture: NDArray[np.uint8], view: View, size: Size, interpolation: str) -> NDArray[np.uint8]:
    """Cut ``view`` out of ``picture`` [height, width, 3], to the pixel, and resize it to [H, W, 3] of ``size``."""
    height, width = picture.shape[:2]
    left, top = min(round(view.left * width), width - 1), min(round(view.top * height), height - 1)
    right, bottom = max(round(view.right * width), left + 1), max(round(view.bottom * height), top + 1)
    # With the strides of channels-last: torch resizes these faster, and its result needs no transposing.
    crop = torch.from_numpy(np.array(picture[None, top:bottom, left:right])).permute(0, 3, 1, 2)  # [1, 3, h, w]
    # Several times as fast as Pillow's resize, and the same to one level of grey.
    mode, antialias = ("nearest-exact", False) if interpolation == "nearest" else (interpolation, True)
    resized = F.interpolate(crop, size=sides(size), mode=mode, antialias=antialias)
    return (resized.flip(3) if view.flip else resized)[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class MixedIndex(ImageIndex):
    """The images of an index and, after them, mixtures of two of them, each with a key as if it were an image.

    Function matching (Beyer et al., CVPR 2022, arXiv 2106.05237) asks the teacher about what the student sees, mixed
    images too. A mixture is share * one + (1 - share) * other, the other in the one's size, and follows from both
    images' content.
    """

    pairs: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))  # [mixtures, 2] positions
    shares: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # [mixtures], of the first of each

    def read(self, position: int) -> Image.Image:
        """Return the image or the mixture at a position, whole."""
        if position < len(self.indices):
            return super().read(position)
        mixture = position - len(self.indices)
        one, other = (super(MixedIndex, self).read(int(place)).convert("RGB") for place in self.pairs[mixture])
        return Image.blend(other.resize(one.size), one, float(self.shares[mixture]))


def mix(images: ImageIndex, positions: NDArray[np.int64], count: int, seed: int) -> MixedIndex:
    """Return the images with ``count`` mixtures of each of those at ``positions``, in their order.

    The partner is the image of ``positions`` whose key follows on a hash of (seed, image, mixture), so that images that
    are added change few of the pairs; the share is uniform in [0.5, 1], as a ~ Beta(1, 1) and max(a, 1 - a).
    """
    keys = [images.keys[position] for position in positions]
    pairs, shares, mixed = [], [], []
    for place, key in enumerate(keys):
        for number in range(count):
            digest = hashlib.blake2b(f"{seed}/{key}/mixed {number}".encode(), digest_size=24).digest()
            partner = bisect.bisect_left(keys, digest[:16].hex()) % len(keys)
            partner = (partner + 1) % len(keys) if partner == place else partner
            share = int.from_bytes(digest[16:], "little") / 2**64
            pairs.append((positions[place], positions[partner]))
            shares.append(max(share, 1 - share))
            content = f"{key} {keys[partner]} {shares[-1]!r}"
            mixed.append(hashlib.blake2b(content.encode(), digest_size=16).hexdigest())
    facts = {one.name: getattr(images, one.name) for one in fields(images)}
    return MixedIndex(**{**facts, "keys": (*images.keys, *mixed)}, pairs=np.array(pairs), shares=np.array(shares))


class Batch(NamedTuple):
    """Views of some images: pixels [images, views, S, S, 3] uint8, and where they come from."""

    pixels: torch.Tensor
    positions: torch.Tensor  # [images], in the index
    views: torch.Tensor  # [images, views]


Item = tuple[int, Sequence[int]]  # a position in the index, and which views of its image


class MultiViewDataset:
    """The views of indexed images as one model wants them."""

    def __init__(self, image_index: ImageIndex, preprocessing: Preprocessing, views: Views) -> None:
        self.image_index = image_index
        self.preprocessing = preprocessing
        self.views = views

    def shape(self, items: Sequence[Item]) -> tuple[int, ...]:
        """Return [images, views, H, W, 3] of some images that are all wanted in as many views."""
        return len(items), len(items[0][1]), *sides(self.preprocessing.image_size), 3

    def fill(self, items: Sequence[Item], pixels: NDArray[np.uint8]) -> None:
        """Render ``items`` into ``pixels`` of their shape."""
        for into, (position, numbers) in zip(pixels, items, strict=True):
            self.render_into(into, position, numbers)

    def batch(self, items: Sequence[Item]) -> Batch:
        """Render ``items`` here and now."""
        pixels = np.empty(self.shape(items), dtype=np.uint8)
        self.fill(items, pixels)
        return batch_of(items, torch.from_numpy(pixels))

    def render_into(self, into: NDArray[np.uint8], position: int, numbers: Sequence[int]) -> None:
        """Write the views ``numbers`` of one image into [views, S, S, 3]; it is decoded once for all of them."""
        preprocessing, key = self.preprocessing, self.image_index.keys[position]
        picture: NDArray[np.uint8] | None = None
        for place, number in enumerate(numbers):
            if number == 0:  # the evaluation view
                image = self.image_index.read(position)
                into[place] = preprocessing.prepare(image)
                picture = np.asarray(image) if min(image.size) < 2 * REDUCED_SIDE else None  # not reduced any further
                continue
            if picture is None:
                picture = self.image_index.read_reduced(position)
            view = seeded_view(key, number, picture.shape[1], picture.shape[0], self.views)
            into[place] = render(picture, view, preprocessing.image_size, preprocessing.interpolation)


def make_dataloader(
    dataset: MultiViewDataset,
    batches: Iterable[Sequence[Item]],
    *,
    workers: int | None = None,
    stop: Sequence[int] = (),
) -> Iterator[Batch]:
    """Decode and render ``batches`` in worker processes, in order and ahead of their use.

    Once ``stop`` holds something, a batch that is not ready yet is not waited for, and none comes any more.

    Raises:
        ImagesError: an image can no longer be read.
        WorkerError: a worker was killed.
    """
    count, on_gpu = default_workers() if workers is None else workers, torch.cuda.is_available()
    try:
        if count == 0:
            yield from map(dataset.batch, batches)
            return
        for items, made in work_ahead(dataset.fill, dataset.shape, batches, workers=count, stop=stop):
            pixels = torch.empty(made.shape, dtype=torch.uint8, pin_memory=on_gpu)
            yield batch_of(items, pixels.copy_(torch.from_numpy(made)))
    except UnreadableImage as error:
        raise ImagesError(
            f"{error.name} could be read before and no longer can: {error.reason}",
            where=dataset.image_index.source.spec,
            fix="put it back, or start a new run without it",
        ) from error


def batch_of(items: Sequence[Item], pixels: torch.Tensor) -> Batch:
    """Put pixels together with what they show."""
    positions, views = zip(*items, strict=True)
    return Batch(pixels, torch.tensor(positions), torch.tensor([list(numbers) for numbers in views]))


def evaluation_views(
    image_index: ImageIndex, preprocessing: Preprocessing, positions: NDArray[np.int64], *, workers: int | None
) -> Iterator[Batch]:
    """Render the evaluation view of ``positions``, 256 images at a time."""
    parts = (positions[start : start + 256] for start in range(0, len(positions), 256))
    plan = [[(int(position), [0]) for position in part] for part in parts]
    return make_dataloader(MultiViewDataset(image_index, preprocessing, Views()), plan, workers=workers)

"""Seeded views of an image: the same crop and flip for teacher and student, each resized for itself."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from prgkit.errors import ImagesError
from prgkit.images import ENOUGH, Catalogue, Preprocessing, UnreadableImage
from prgkit.recipe import Views
from prgkit.sizes import Size, sides


@dataclass(frozen=True)
class View:
    """A crop as shares of the image's width and height, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


def seeded_view(key: str, number: int, width: int, height: int, page: Views) -> View:
    """Return view ``number`` >= 1 of the image with content ``key``: a function of (seed, image, view) alone.

    A random resized crop (Szegedy et al., 2015) in closed form: the area's share is uniform in ``crop_scale``, the
    aspect ratio log-uniform in [3/4, 4/3] times ``aspect``, and a side that would leave the image is cut to it.
    """
    digest = hashlib.blake2b(f"{page.seed}/{key}/{number}".encode(), digest_size=40).digest()
    area_at, ratio_at, x_at, y_at, flip_at = (np.frombuffer(digest, dtype="<u8") / 2.0**64).tolist()
    low, high = page.crop_scale
    area = (low + (high - low) * area_at) * width * height
    ratio = (page.aspect or 1.0) * math.exp((2 * ratio_at - 1) * math.log(4 / 3))
    crop_width = min(math.sqrt(area * ratio), width) / width
    crop_height = min(math.sqrt(area / ratio), height) / height
    left, top = x_at * (1 - crop_width), y_at * (1 - crop_height)
    return View(left, top, left + crop_width, top + crop_height, page.flip and flip_at < 0.5)


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


class Batch(NamedTuple):
    """Views of some images: pixels [images, views, S, S, 3] uint8, and where they come from."""

    pixels: torch.Tensor
    positions: torch.Tensor  # [images], in the catalogue
    views: torch.Tensor  # [images, views]


class Rendered(Dataset[Any]):
    """The views of catalogued images as one model wants them; an item is (position in the catalogue, its views)."""

    def __init__(self, catalogue: Catalogue, preprocessing: Preprocessing, page: Views) -> None:
        self.catalogue = catalogue
        self.preprocessing = preprocessing
        self.page = page

    def __getitems__(self, items: Sequence[tuple[int, Sequence[int]]]) -> Batch | UnreadableImage:
        """Render a batch in one piece; all its images are wanted in as many views."""
        shape = (*sides(self.preprocessing.image_size), 3)
        pixels = torch.empty(len(items), len(items[0][1]), *shape, dtype=torch.uint8)
        try:
            for into, (position, numbers) in zip(pixels.numpy(), items, strict=True):
                self.render_into(into, position, numbers)
        except UnreadableImage as error:  # returned, since a worker's exception arrives as a text with its traceback
            return error
        positions, views = zip(*items, strict=True)
        return Batch(pixels, torch.tensor(positions), torch.tensor([list(numbers) for numbers in views]))

    def render_into(self, into: NDArray[np.uint8], position: int, numbers: Sequence[int]) -> None:
        """Write the views ``numbers`` of one image into [views, S, S, 3]; it is decoded once for all of them."""
        preprocessing, key = self.preprocessing, self.catalogue.keys[position]
        picture: NDArray[np.uint8] | None = None
        for place, number in enumerate(numbers):
            if number == 0:  # the evaluation view
                image = self.catalogue.read(position)
                into[place] = preprocessing.prepare(image)
                picture = np.asarray(image) if min(image.size) < 2 * ENOUGH else None  # not reduced any further
                continue
            if picture is None:
                picture = self.catalogue.read_enough(position)
            view = seeded_view(key, number, picture.shape[1], picture.shape[0], self.page)
            into[place] = render(picture, view, preprocessing.image_size, preprocessing.interpolation)


def load_batches(
    rendered: Rendered, batches: Iterable[Sequence[tuple[int, Sequence[int]]]], *, workers: int | None = None
) -> Iterator[Batch]:
    """Decode and render ``batches`` of (position, views) in worker processes, in order and ahead of their use."""
    count = default_workers() if workers is None else workers
    loader = DataLoader(
        rendered,
        batch_sampler=cast(Any, batches),
        num_workers=count,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if count and hasattr(os, "fork") else None,
        collate_fn=_as_it_is,
    )
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            raise ImagesError(
                f"{batch.name} could be read before and no longer can: {batch.reason}",
                where=rendered.catalogue.images.spec,
                fix="put it back, or start a new run without it",
            )
        yield batch


def evaluation_views(
    catalogue: Catalogue, preprocessing: Preprocessing, positions: NDArray[np.int64], *, workers: int | None
) -> Iterator[Batch]:
    """Render the evaluation view of ``positions``, 256 images at a time."""
    parts = (positions[start : start + 256] for start in range(0, len(positions), 256))
    plan = [[(int(position), [0]) for position in part] for part in parts]
    return load_batches(Rendered(catalogue, preprocessing, Views()), plan, workers=workers)


def _as_it_is(batch: Any) -> Any:
    return batch  # a lambda could not be sent to a worker that is spawned


def default_workers() -> int:
    """Return how many processes decode: half the cores, since the other half trains where there is no GPU."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C, and often SIGTERM, reach the whole process group; the training process alone decides what they mean, and
    # a worker that died of one would take the checkpoint with it. Workers end when they are told or left alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

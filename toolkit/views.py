"""Seeded views of an image: the same crop and flip for teacher and student, each resized for itself."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from prgkit.errors import ImagesError
from prgkit.images import Catalogue, Preprocessing, UnreadableImage
from prgkit.recipe import Views


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
    aspect ratio log-uniform in [3/4, 4/3], and a side that would leave the image is cut to it.
    """
    digest = hashlib.blake2b(f"{page.seed}/{key}/{number}".encode(), digest_size=40).digest()
    area_at, ratio_at, x_at, y_at, flip_at = (np.frombuffer(digest, dtype="<u8") / 2.0**64).tolist()
    low, high = page.crop_scale
    area = (low + (high - low) * area_at) * width * height
    ratio = math.exp((2 * ratio_at - 1) * math.log(4 / 3))
    crop_width = min(math.sqrt(area * ratio), width) / width
    crop_height = min(math.sqrt(area / ratio), height) / height
    left, top = x_at * (1 - crop_width), y_at * (1 - crop_height)
    return View(left, top, left + crop_width, top + crop_height, page.flip and flip_at < 0.5)


def render(image: Image.Image, view: View, size: int, interpolation: str) -> NDArray[np.uint8]:
    """Cut ``view`` out of ``image`` and resize it to [size, size, 3] uint8 in one step."""
    box = (view.left * image.width, view.top * image.height, view.right * image.width, view.bottom * image.height)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    picture = image.resize((size, size), resample=Image.Resampling[interpolation.upper()], box=box)
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


class Rendered(Dataset[Any]):
    """The views of catalogued images as one model wants them; an item is (position in the catalogue, its views)."""

    def __init__(self, catalogue: Catalogue, preprocessing: Preprocessing, page: Views) -> None:
        self.catalogue = catalogue
        self.preprocessing = preprocessing
        self.page = page

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> tuple[torch.Tensor, int, torch.Tensor] | UnreadableImage:
        position, numbers = item
        try:
            image = self.catalogue.read(position)
        except UnreadableImage as error:  # returned, since a worker's exception arrives as a text with its traceback
            return error
        pictures = np.stack([self._view(image, position, number) for number in numbers])
        return torch.from_numpy(pictures), position, torch.tensor(list(numbers))

    def _view(self, image: Image.Image, position: int, number: int) -> NDArray[np.uint8]:
        if number == 0:  # the evaluation view
            return self.preprocessing.prepare(image)
        view = seeded_view(self.catalogue.keys[position], number, image.width, image.height, self.page)
        return render(image, view, self.preprocessing.image_size, self.preprocessing.interpolation)


@dataclass(frozen=True)
class Batch:
    """Views of some images: pixels [images, views, S, S, 3] uint8, and where they come from."""

    pixels: torch.Tensor
    positions: torch.Tensor  # [images], in the catalogue
    views: torch.Tensor  # [images, views]


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
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            raise ImagesError(
                f"{batch.name} could be read before and no longer can: {batch.reason}",
                where=rendered.catalogue.images.spec,
                fix="put it back, or start a new run without it",
            )
        yield Batch(*batch)


def _collate(items: list[Any]) -> Any:
    """Stack a batch's items; one that could not be read stands for the whole batch."""
    unreadable = next((item for item in items if isinstance(item, UnreadableImage)), None)
    return unreadable or default_collate(items)


def default_workers() -> int:
    """Return how many processes decode: half the cores, since the other half trains where there is no GPU."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C, and often SIGTERM, reach the whole process group; the training process alone decides what they mean, and
    # a worker that died of one would take the checkpoint with it. Workers end when they are told or left alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

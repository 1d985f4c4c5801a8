"""How a picture becomes a model's input: decoded, resized, cropped at its centre."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BeforeValidator, JsonValue, TypeAdapter

from prgkit.config.image_size import Size, sides, size_of
from prgkit.data.decode import GreyRange, decode, to_rgb
from prgkit.data.files import read_span, require
from prgkit.errors import ImagesError
from prgkit.storage.atomic import as_on_disk

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LONGEST = 100  # times the shorter side that is resized: 1 pixel by 60,000 would be scaled to 224 by 13 million


def load_image(image: str | os.PathLike[str] | bytes, *, grey: GreyRange | None = None) -> Image.Image:
    """Read one image file, or its bytes, as upright RGB; of a deep grey, ``grey`` is black and white.

    Raises:
        ImagesError: there is no such file, or it is no readable image.
    """
    if isinstance(image, bytes):
        return decode(image, "the image", grey=grey)
    path = as_on_disk(Path(os.path.expanduser(image)))
    data = read_span(require(path, str(image), fix="give the path of an image file"), str(image))
    return decode(data, str(image), grey=grey)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input; mean and std are applied inside the models."""

    image_size: Annotated[Size, BeforeValidator(size_of)]
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

    def to_dict(self) -> dict[str, JsonValue]:
        """Return plain values for JSON."""
        values: dict[str, JsonValue] = TypeAdapter(Preprocessing).dump_python(self, mode="json")
        return values


def trimmed(image: Image.Image) -> Image.Image:
    """Return the middle of a picture, no more than `LONGEST` times as long as it is short: nearly always all of it."""
    left, top = margins(image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def margins(size: tuple[int, int]) -> tuple[int, int]:
    """Return how much `trimmed` cuts off on the left and right, and at the top and bottom."""
    left, top = (max(0, side - LONGEST * min(size)) // 2 for side in size)
    return left, top

"""What would change if images were prepared with OpenCV in place of Pillow, where OpenCV is at hand."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.config.image_size import sides
from prgkit.data.preprocessing import Preprocessing, margins
from prgkit.export.bundle.bundle import Bundle
from prgkit.export.runtimes.base import Runner
from prgkit.storage.reproducible import read_png

FLAGS = {"nearest": "INTER_NEAREST", "bilinear": "INTER_LINEAR", "bicubic": "INTER_CUBIC"}


def opencv_notes(bundle: Bundle, runner: Runner) -> list[str]:
    """Say by how much OpenCV's preparation of the golden images differs, and how many answers that changes.

    A program in C++ has OpenCV and not Pillow, so its author must know. Without cv2 there is nothing to say.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError:
        return []
    golden = bundle.folder / "golden"
    names = [path.name[:2] for path in sorted(golden.glob("*.input.png"))]
    ours = np.stack([read_png(golden / f"{name}.input.png") for name in names])  # [n, S, S, 3], by Pillow
    theirs = np.stack([prepare(cv2, read_png(golden / f"{name}.png"), bundle.preprocessing) for name in names])
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    if not difference.any():
        return [f"OpenCV {cv2.__version__} prepares the {len(names)} golden images as Pillow does, to the bit."]
    changed = int((runner.run(ours).argmax(axis=1) != runner.run(theirs).argmax(axis=1)).sum())
    return [
        f"Prepared with OpenCV {cv2.__version__} ({FLAGS[bundle.preprocessing.interpolation]}) in place of Pillow, the "
        f"{len(names)} golden images differ by up to {difference.max()} of 255 ({difference.mean():.1f} in the mean), "
        f"and {changed} of {len(names)} answers change."
    ]


def prepare(cv2: Any, picture: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop a picture [height, width, 3] to [H, W, 3] as `Preprocessing.prepare` does, with cv2.resize."""
    flag = getattr(cv2, FLAGS[preprocessing.interpolation])
    left, top = margins((picture.shape[1], picture.shape[0]))
    picture = picture[top : picture.shape[0] - top, left : picture.shape[1] - left]
    height, width = sides(preprocessing.image_size)
    if preprocessing.squash:
        return np.asarray(cv2.resize(picture, (width, height), interpolation=flag), dtype=np.uint8)
    scaled = preprocessing.scaled(picture.shape[1], picture.shape[0])
    if scaled != (picture.shape[1], picture.shape[0]):
        picture = cv2.resize(picture, scaled, interpolation=flag)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return np.asarray(picture[top : top + height, left : left + width], dtype=np.uint8)

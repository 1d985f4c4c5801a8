"""What OpenCV would change: measured on the golden images where it is installed, and not spoken of where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
from prgkit.evaluate.accuracy.opencv import opencv_notes, prepare

PREPROCESSING = Preprocessing(32, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Brightness:
    """Stands for a student with two classes: is the red of an image more than 100 in the mean?"""

    def run(self, pixels: Any) -> Any:
        red = pixels[..., 0].reshape(len(pixels), -1).mean(axis=1)
        return np.stack([red - 100, 100 - red], axis=1)


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    """Four golden images with a mean red of 92, 96, 104 and 108."""
    (tmp_path / "golden").mkdir()
    for number, red in enumerate((92, 96, 104, 108)):
        picture = Image.new("RGB", (80, 60), (red, 0, 0))
        picture.save(tmp_path / "golden" / f"{number:02}.png")
        Image.fromarray(PREPROCESSING.prepare(picture)).save(tmp_path / "golden" / f"{number:02}.input.png")
    return SimpleNamespace(folder=tmp_path, preprocessing=PREPROCESSING)


def stand_in(change: int) -> Any:
    """Return an OpenCV that resizes as Pillow does and makes everything brighter."""

    def resize(picture: Any, size: tuple[int, int], *, interpolation: int) -> Any:
        assert interpolation == 2
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)) + np.uint8(change)

    return SimpleNamespace(__version__="5.0", INTER_CUBIC=2, resize=resize)


def test_without_opencv_nothing_is_said(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert opencv_notes(bundle, Brightness()) == []  # type: ignore[arg-type]


def test_a_difference_is_counted_in_levels_and_in_answers(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", stand_in(6))
    assert opencv_notes(bundle, Brightness()) == [  # type: ignore[arg-type]
        "Prepared with OpenCV 5.0 (INTER_CUBIC) in place of Pillow, the 4 golden images differ by up to 6 of 255 "
        "(6.0 in the mean), and 1 of 4 answers change."
    ]


def test_no_difference_is_said_as_well(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", stand_in(0))
    assert opencv_notes(bundle, Brightness()) == [  # type: ignore[arg-type]
        "OpenCV 5.0 prepares the 4 golden images as Pillow does, to the bit."
    ]


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (36, 36), (33, 200), (2, 500), (900, 4)])
@pytest.mark.parametrize("squash", [False, True])
def test_the_same_part_of_the_picture_is_cut_out(size: tuple[int, int], squash: bool) -> None:
    preprocessing = Preprocessing(32, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), squash=squash)
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    cut = prepare(stand_in(0), np.asarray(picture), preprocessing)
    np.testing.assert_array_equal(cut, preprocessing.prepare(picture))


def test_with_the_real_one(bundle: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    smooth = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (60, 1, 3)))
    difference = prepare(cv2, np.asarray(smooth), PREPROCESSING).astype(int) - PREPROCESSING.prepare(smooth)
    assert np.abs(difference).max() <= 4  # of a slope, another filter makes little; another crop would make much

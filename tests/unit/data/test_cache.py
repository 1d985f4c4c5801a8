"""Kept pictures: the same pixels as from the file, in bounds of space, whole or decoded again."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prgkit.data import cache, decode
from prgkit.data.cache import DecodedImageCache
from prgkit.data.index import index_images
from prgkit.data.sources import ImageSource, open_images
from prgkit.storage.locks import locked


@pytest.fixture
def photos(tmp_path: Path) -> ImageSource:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return open_images(str(folder))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    upright = decode.upright_rgb

    def count(image: Image.Image, *grey: decode.GreyRange | None) -> Image.Image:
        names.append(str(image.size))
        return upright(image, *grey)

    monkeypatch.setattr(decode, "upright_rgb", count)
    return names


def fill(photos: ImageSource, folder: Path) -> DecodedImageCache:
    index_images(photos, workers=2, cache=DecodedImageCache(folder))
    return DecodedImageCache(folder)


def test_what_is_kept_is_the_picture_and_is_decoded_once(
    photos: ImageSource, tmp_path: Path, decoded: list[str]
) -> None:
    kept = fill(photos, tmp_path / "kept")
    assert len(decoded) == len(kept) == 9
    for copy in (kept, pickle.loads(pickle.dumps(kept))):
        for index in range(9):
            found = copy.get(photos.key(index))
            assert found is not None
            np.testing.assert_array_equal(found, np.asarray(photos.read(index)))
    decoded.clear()
    found = index_images(photos, workers=2, cache=kept, known=kept)
    assert [found.read(position).size for position in range(9)] == [found.read(position).size for position in range(9)]
    assert decoded == []


def test_a_known_image_is_decoded_for_keeping_only(photos: ImageSource, tmp_path: Path, decoded: list[str]) -> None:
    known = [photos.key(index) for index in range(9)]
    assert len(index_images(photos, workers=1, known=known)) == 9
    assert decoded == []
    index_images(photos, workers=1, known=known, cache=DecodedImageCache(tmp_path / "kept"))
    assert len(decoded) == 9


def test_there_is_a_limit(
    photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 5 * 30 * 30 * 3)
    kept = fill(photos, tmp_path / "kept")
    assert 4 <= len(kept) < 9
    assert (tmp_path / "kept" / "pictures.u8").stat().st_size <= 5 * 30 * 30 * 3
    decoded.clear()
    index_images(photos, workers=1, cache=kept, known=[photos.key(index) for index in range(9)])
    assert decoded == []  # what found no room is not decoded in vain


def test_a_flipped_byte_is_named_and_its_block_decoded_again(
    photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 5000)  # two or three pictures
    folder = tmp_path / "kept"
    fill(photos, folder)
    content = bytearray((folder / "pictures.u8").read_bytes())
    content[-1] ^= 1
    (folder / "pictures.u8").write_bytes(content)
    found = DecodedImageCache(folder)
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith("pictures.u8, ")
    assert 5 < len(found) < 9
    mended = fill(photos, folder)
    for index in range(9):
        assert np.array_equal(mended.get(photos.key(index)), np.asarray(photos.read(index)))


def test_a_torn_tail_loses_one_block(photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 5000)
    folder = tmp_path / "kept"
    fill(photos, folder)
    with open(folder / "journal.jsonl", "rb+") as journal:
        journal.truncate((folder / "journal.jsonl").stat().st_size - 20)
    found = DecodedImageCache(folder)
    assert 5 < len(found) < 9
    assert found.damaged == []
    assert len(fill(photos, folder)) == 9


def test_a_full_disk_and_a_second_process_only_cost_time(
    photos: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path / "kept", "picture store"):
        assert len(fill(photos, tmp_path / "kept")) == 0
    fsync = os.fsync

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(index_images(photos, workers=1, cache=DecodedImageCache(tmp_path / "kept"))) == 9
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(DecodedImageCache(tmp_path / "kept")) == 0
    assert len(fill(photos, tmp_path / "kept")) == 9

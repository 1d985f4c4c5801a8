"""Pictures that are made ready ahead of the network."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import ImagesError
from prgkit.evaluate.live import frames
from prgkit.evaluate.pictures import NamedPicture, prepared_ahead

PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("given", "live", "ahead"), [({}, False, 8), ({"ahead": 32}, False, 32), ({"ahead": 32}, True, 0)]
)
def test_pictures_are_read_ahead_but_a_camera_waits_for_none(given: dict[str, int], live: bool, ahead: int) -> None:
    taken = []

    def pictures() -> Iterator[NamedPicture]:
        for number in range(100):
            taken.append(number)
            yield NamedPicture(str(number), lambda number=number: Image.new("RGB", (9, 9), (number, 0, 0)), live)

    ready = prepared_ahead(pictures(), PREPROCESSING, **given)
    first = next(ready)
    assert len(taken) == ahead + 1
    rest = list(ready)
    assert [one.picture.name for one in (first, *rest)] == [str(number) for number in range(100)]
    assert [int(one.pixels[0, 0, 0]) for one in (first, *rest) if one.pixels is not None] == list(range(100))


EVEN = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
UNEVEN = [0, 100, 200, 1000, 1025, 1050, 1075, 1100, 1125, 3000]  # milliseconds, of a telephone's video
NTSC = [1001 * place / 30 for place in range(10)]


@pytest.mark.parametrize(
    ("told_ms", "rate", "fps", "times_ms"),
    [
        (EVEN, 10.0, None, EVEN),
        (EVEN, 10.0, 10, EVEN),
        (EVEN, 10.0, 4, [0, 300, 500, 800]),
        (UNEVEN, 3.0, None, UNEVEN),
        (UNEVEN, 3.0, 20, [0, 100, 200, 1000, 1050, 1100, 3000]),
        (UNEVEN, 3.0, 1, [0, 1000, 3000]),
        (UNEVEN, 3.0, float("inf"), UNEVEN),
        ([round(ms) for ms in NTSC], 30 / 1.001, 30, NTSC),  # Matroska rounds them to milliseconds
        ([0] * 10, 10.0, None, EVEN),  # where no times are known
        ([0] * 10, 10.0, 4, [0, 300, 500, 800]),
        ([0] * 4, 0.0, None, [0, 40, 80, 120]),
        ([-80, 40, 40, 120], 25.0, None, [0, 40, 41, 120]),  # no two of one name
    ],
)
def test_the_frames_of_a_video_have_its_times(
    monkeypatch: pytest.MonkeyPatch, told_ms: list[float], rate: float, fps: float | None, times_ms: list[float]
) -> None:
    class Video:
        place = -1

        def __init__(self, source: str) -> None:
            assert source == "a.mp4"

        def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
            return True

        def grab(self) -> bool:
            self.place += 1
            return self.place < len(told_ms)

        def get(self, what: str) -> float:
            return rate if what == "rate" else told_ms[self.place]

        def retrieve(self) -> tuple[bool, Any]:
            return True, np.full((2, 2, 3), self.place, np.uint8)

        def release(self) -> None:
            pass

    cv2 = SimpleNamespace(VideoCapture=Video, CAP_PROP_FPS="rate", CAP_PROP_POS_MSEC="time")
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    found = [name for name, _ in frames("a.mp4", fps, lambda _: None)]
    assert found == [f"a.mp4/{ms / 1000:08.3f}s" for ms in times_ms]


def test_a_video_without_a_frame_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    video = SimpleNamespace(isOpened=lambda: True, grab=lambda: False, get=lambda _: 0.0, release=lambda: None)
    cv2 = SimpleNamespace(VideoCapture=lambda _: video, CAP_PROP_FPS="rate", CAP_PROP_POS_MSEC="time")
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    with pytest.raises(ImagesError, match=r"a\.mp4 has no frame that can be read"):
        list(frames("a.mp4", None, lambda _: None))


def test_a_video_of_two_rates_is_read_by_its_times(tmp_path: Path) -> None:
    """Ten frames of 10 a second, then ten of 40 a second: a table in the file says how long each lasts."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "two.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
    for place in range(20):
        writer.write(np.full((64, 64, 3), 12 * place, np.uint8))
    writer.release()
    data = bytearray(path.read_bytes())
    table = data.find(b"stts")
    size, _, _, entries, _, lasts = struct.unpack_from(">I4sIIII", data, table - 4)
    assert entries == 1
    if data.find(b"moov") < data.find(b"mdat"):
        pytest.skip("a longer table would move the frames")
    longer = struct.pack(">I4sIIIIII", 32, b"stts", 0, 2, 10, lasts, 10, lasts // 4)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        start = data.find(box) - 4
        struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + len(longer) - size)
    data[table - 4 : table - 4 + size] = longer
    path.write_bytes(data)
    found = {name: int(np.asarray(read())[0, 0, 0]) for name, read in frames(str(path), None, lambda _: None)}
    times = [*(place / 10 for place in range(10)), *(1 + place / 40 for place in range(10))]
    assert list(found) == [f"{path}/{seconds:08.3f}s" for seconds in times]
    assert list(found.values()) == pytest.approx([12 * place for place in range(20)], abs=6)

"""Pictures that are made ready ahead of the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from prgkit.data.preprocessing import Preprocessing
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

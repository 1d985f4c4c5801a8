"""The files that answers are kept in: with any name that a file system allows, they are gone on with."""

import os
from pathlib import Path

import pytest
from PIL import Image

from prgkit.evaluate.answers import open_answers
from prgkit.evaluate.pictures import open_pictures
from prgkit.evaluate.predict import Prediction

NAMES = [b"\xff.png", "a\u2028b.png".encode(), "c\x85d.png".encode(), b"e\nf.png", b'g,"h.png']


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_of_any_name_is_answered_once(tmp_path: Path, suffix: str) -> None:
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in NAMES]
    for path in paths:
        with open(path, "wb") as file:
            Image.new("RGB", (4, 4)).save(file, "PNG")
    given = list(map(os.fsdecode, paths))
    for picture in open_pictures(given):
        assert picture.read().size == (4, 4)
        open_answers(tmp_path / f"answers.{suffix}").add(Prediction(picture.name, label="one", probability=0.5))
    known = open_answers(tmp_path / f"answers.{suffix}")
    assert list(open_pictures(given, skip=known)) == []

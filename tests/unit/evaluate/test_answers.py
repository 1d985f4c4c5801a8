"""The files that answers are kept in: with any name that a file system allows, they are gone on with."""

import os
from pathlib import Path

import pytest
from PIL import Image

from prgkit.errors import ImagesError
from prgkit.evaluate.answers import open_answers, place_below, save_picture
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
    one = open_answers(tmp_path / f"one.{suffix}")
    one.add(Prediction("a.png", label="one", probability=0.5))
    assert ("a.png" in one, "b.png" in one) == (True, False)
    for picture in open_pictures(given):
        assert picture.read().size == (4, 4)
        open_answers(tmp_path / f"answers.{suffix}").add(Prediction(picture.name, label="one", probability=0.5))
    known = open_answers(tmp_path / f"answers.{suffix}")
    assert list(open_pictures(given, skip=known)) == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_line_that_a_kill_cut_short_is_written_anew(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"answers.{suffix}"
    open_answers(path).add(Prediction("a.png", label="one", probability=0.5))
    whole = path.read_bytes()
    open_answers(path).add(Prediction("ü.png", label="one", probability=0.5))
    cut = path.read_bytes().find("ü".encode()) + 1  # within a letter
    path.write_bytes(path.read_bytes()[:cut])
    known = open_answers(path)
    assert ("a.png" in known, "ü.png" in known, path.read_bytes()) == (True, False, whole)
    path.write_bytes(whole[:5])  # of the first line
    assert "a.png" not in open_answers(path)
    assert not path.read_bytes().startswith(b'{"ima')


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_failed_is_asked_again_and_no_answer_is_lost(tmp_path: Path, suffix: str) -> None:
    path, again = tmp_path / f"answers.{suffix}", tmp_path / f"again.{suffix}"
    good = [Prediction(name, label="one", probability=0.5) for name in ("a.png", 'g,"h.png', "z.png")]
    bad = Prediction("cut.png", error=ImagesError("cut.png cannot be read, and\nmore"))
    for answer in (good[0], bad, *good[1:]):
        open_answers(path).add(answer)
    first = open_answers(path)
    assert [name in first for name in ("a.png", "cut.png", 'g,"h.png', "z.png")] == [True, False, True, True]
    for answer in good:
        open_answers(again).add(answer)
    assert path.read_bytes() == again.read_bytes()
    first.add(bad)
    assert "cut.png" not in first
    assert path.read_text().count("cut.png cannot be read") == 1


def test_a_kill_while_failures_are_dropped_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "answers.csv"
    for answer in (Prediction("a.png", label="one"), Prediction("cut.png", error=ImagesError("cut"))):
        open_answers(path).add(answer)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_answers(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("latin.csv", "image,class\nübung.png,Tür\n".encode("latin-1")),
        ("notes.jsonl", b"my notes"),  # no line of it is whole
        ("notes.csv", b"\xff"),
        ("zero.csv", b"image\0\n"),
        ("list.jsonl", b"[1]\n"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, name: str, held: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(held)
    with pytest.raises(ImagesError, match="the file holds something else than answers"):
        open_answers(path)
    assert path.read_bytes() == held


def test_a_folder_that_is_called_like_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.csv").mkdir()
    with pytest.raises(ImagesError, match=r"answers go to a \.csv file, and this is a folder"):
        open_answers(tmp_path / "answers.csv")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a/1.jpg", "a/1.jpg.jpg"),
        ("/a/1.jpg", "a/1.jpg.jpg"),
        ("../a/1.jpg", "_/a/1.jpg.jpg"),
        ("..", "_.jpg"),
        (".", "picture.jpg"),
        ("/", "picture.jpg"),
    ],
)
def test_a_copy_lies_below_its_folder(name: str, place: str) -> None:
    assert place_below(Path("out"), name) == Path("out") / place


def test_a_picture_that_is_too_long_for_jpeg_is_made_smaller(tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (66_000, 40)), tmp_path / "long.jpg")
    with Image.open(tmp_path / "long.jpg") as saved:
        assert saved.size == (65_500, 40)

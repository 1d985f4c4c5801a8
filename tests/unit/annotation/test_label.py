"""The teacher's answers as a table: a row for every file, figures by hand, and a CSV that is read back as labels."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import torch

from prgkit.annotation.label import ImageLabel, answers_of, as_csv, as_json_lines, describe_labels, label_images
from prgkit.config.recipe import Recipe, validate
from prgkit.config.sections import ImageSpec
from prgkit.data.index import read_image_index, select_labelled
from prgkit.demo.digits import load_digits
from prgkit.progress import NullProgress
from prgkit.teacher.zero_shot import LogitAdjustment, ZeroShotClassifier, no_adjustment
from tests.conftest import PrgkitCommand

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGES = 40


@pytest.fixture
def photos(empty_folder: Path) -> Path:
    """Digits in two folders: an exact copy, a near one, one that is cut off, and one with a name for CSV to quote."""
    folder = empty_folder / "photos"
    (folder / "deep").mkdir(parents=True)
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(folder / ("deep" if number % 2 else "") / f"{number:03}.png")
    shutil.copy("photos/000.png", "photos/deep/a copy, of zero.png")
    near = np.asarray(Image.open("photos/deep/001.png")).copy()
    near[0, 0] += 1
    Image.fromarray(near).save("photos/near.png")
    Path("photos/cut.png").write_bytes(Path("photos/002.png").read_bytes()[:60])
    return folder


def recipe_for(images: str = "photos", **targets: Any) -> Recipe:
    raw = {
        "data": {"images": images, "classes": CLASSES, "prompts": ["the digit {}"], "keep": {"min_confidence": 0.99}},
        "teacher": {"model": "demo:digits", "batch_size": 8},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0},
        "targets": targets,
    }
    return validate(raw, where="test").resolved()


def rows_of(recipe: Recipe) -> dict[str, ImageLabel]:
    return {row.path: row for row in label_images(recipe, Path("targets"), NullProgress())}


def test_every_file_has_its_row(photos: Path) -> None:
    rows = rows_of(recipe_for(debias=1.0))
    assert list(rows) == [f"photos/{path.relative_to(photos)}" for path in sorted(photos.rglob("*.png"))]
    assert not Path("runs").exists()
    original, copy = rows["photos/000.png"], rows["photos/deep/a copy, of zero.png"]
    assert (original.near_copy, copy.near_copy, copy.note) == (copy.path, original.path, "exact copy")
    assert (copy.class_name, copy.confidence, copy.outlier) == (
        original.class_name,
        original.confidence,
        original.outlier,
    )
    near, other = rows["photos/near.png"], rows["photos/deep/001.png"]
    assert (near.near_copy, other.near_copy, near.note) == (other.path, near.path, None)
    assert rows["photos/cut.png"] == ImageLabel(path="photos/cut.png", note="unreadable: truncated")
    told = describe_labels(list(rows.values()))
    assert told.startswith(f"{IMAGES + 3} files; ")
    assert told.endswith(", 1 unreadable")
    assert "4 with a near copy (1 exact copies of another)" in told


def test_one_image_is_enough(photos: Path) -> None:
    Path("one").mkdir()
    shutil.copy("photos/000.png", "one")
    (row,) = rows_of(recipe_for("one")).values()
    assert (row.path, row.class_name, row.corrected, row.near_copy, row.outlier) == (
        "one/000.png",
        "six",
        False,
        None,
        False,
    )


def test_answers_by_hand() -> None:
    """W = 2 I T of two classes; the prior takes 1 off the first: 1.2 against 1.6 becomes 0.2 against 1.6."""
    features = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    prompts = torch.eye(2)[None]
    classifier = ZeroShotClassifier(prompts, 2.0, "mean", LogitAdjustment(torch.tensor([1.0, 0.0]), 1.0))
    store = SimpleNamespace(features=lambda rows, views: features[rows])
    dataset: Any = SimpleNamespace(image_index=range(3), rows=np.arange(3), store=store, classifier=classifier)
    answers = answers_of(dataset, NullProgress())
    assert answers.classes.tolist() == [[1, 0], [1, 0], [0, 1]]  # 0.6 against 1.2; 1.0 against 0.0
    assert answers.corrected.tolist() == [False, True, False]
    np.testing.assert_allclose(answers.probabilities[:, 0], 1 / (1 + np.exp([-1.4, -0.6, -1.0])), rtol=1e-6)
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(answers.cosines, [0.8, 0.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize("average", [None, "probabilities", "confidence"])
def test_cosines_of_two_equal_teachers_are_those_of_one(average: Any) -> None:
    features = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    joint, prompts = features.repeat(1, 2) / 2**0.5, torch.eye(2).repeat(1, 2)[None] / 2**0.5
    classifier = ZeroShotClassifier(prompts, 2.0, "mean", no_adjustment(2), average=average, widths=(2, 2))
    store = SimpleNamespace(features=lambda rows, views: joint[rows])
    dataset: Any = SimpleNamespace(image_index=range(3), rows=np.arange(3), store=store, classifier=classifier)
    answers = answers_of(dataset, NullProgress())
    np.testing.assert_allclose(answers.cosines, [0.8, 0.8, 1.0], rtol=1e-6)
    assert not answers.corrected.any()


def test_csv_and_json_lines_hold_the_same() -> None:
    row = ImageLabel(
        path="a, b.png",
        class_name="cat",
        confidence=0.9312,
        second_class="dog",
        margin=0.9,
        corrected=True,
        outlier=False,
    )
    lost = ImageLabel(path="c.png", note="unreadable: truncated")
    assert as_csv([row, lost]) == (
        "path,class,confidence,second_class,margin,corrected,near_copy,outlier,note\n"
        '"a, b.png",cat,0.9312,dog,0.9000,true,,false,\n'
        "c.png,,,,,,,,unreadable: truncated\n"
    )
    first, second = map(json.loads, as_json_lines([row, lost]).splitlines())
    assert (first["class"], first["confidence"], first["corrected"], first["near_copy"]) == ("cat", 0.9312, True, None)
    assert second == {**dict.fromkeys(first), "path": "c.png", "note": "unreadable: truncated"}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_csv_is_read_back_as_labels(photos: Path, kind: str) -> None:
    source = (
        "photos"
        if kind == "folder"
        else str(Path(shutil.make_archive("packed", kind, "photos")).relative_to(Path.cwd()))
    )
    rows = label_images(recipe_for(source), Path("targets"), NullProgress())
    Path("labels.csv").write_text(as_csv(rows))
    said: list[str] = []
    index = read_image_index(ImageSpec(source, Path("labels.csv")), NullProgress())
    labelled, found = select_labelled(index, CLASSES, note=said.append)
    by_path = {row.path: row.class_name for row in rows}
    paths = [index.source.path(place) for place in labelled.indices.tolist()]
    assert [CLASSES[place] for place in found] == [by_path[path] for path in paths]
    assert len(found) == len(rows) - 2  # a copy, and one that cannot be read
    assert said == ["labels.csv: images by column 'path', labels by column 'class'"]


def test_label_prints_or_writes(prgkit: PrgkitCommand, photos: Path) -> None:
    Path("names.txt").write_text("\n".join(CLASSES))
    line = "label --images photos --classes names.txt"
    sets = ["--set", "teacher={model: demo:digits}", "--set", "training.workers=0"]
    printed = prgkit(line, *sets)
    assert printed.code == 0
    rows = list(csv.DictReader(printed.out.splitlines()))
    assert len(rows) == IMAGES + 3
    assert "43 files; 0 answers corrected, " in printed.err
    written = prgkit(line, *sets, "--out", "new/labels.csv")
    assert Path("new/labels.csv").read_text() == printed.out
    assert written.out.startswith("new/labels.csv: 43 files; ")
    document = prgkit(line, *sets, "--out", "labels.jsonl", "--json").json["label"]
    assert document["out"] == "labels.jsonl"
    assert document["labels"] == [json.loads(row) for row in Path("labels.jsonl").read_text().splitlines()]
    assert not Path("runs").exists()
    refused = prgkit(line, "--out", "labels.txt")
    assert (refused.code, "name a .csv or a .jsonl, not 'labels.txt'." in refused.err) == (2, True)

"""Which images to label: farthest-first by hand, and a sheet that is read back as the labels of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from prgkit.annotation.suggest import farthest_first, suggest_labels
from prgkit.config.recipe import Recipe, save_recipe, validate
from prgkit.data.index import read_image_index, select_labelled
from prgkit.data.ticks import read_ticks, write_ticks
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import ImagesError, RunError
from prgkit.progress import NullProgress
from prgkit.storage.run import Run
from prgkit.training.prepare import prepare
from tests.conftest import PrgkitCommand

POOL = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.9, 0.1, 0]], dtype=np.float32)
IMAGES = 30


class Told(NullProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_farthest_first_by_hand() -> None:
    first = np.array([True, False, False, False])
    assert farthest_first(POOL, POOL[:1], 3, barred=first) == [1, 2, 3]  # sqrt(2), sqrt(2), 0.1414
    assert farthest_first(POOL, POOL[:1], 9, barred=first) == [1, 2, 3]  # never what is labelled, and no more than all
    assert farthest_first(POOL[::-1], POOL[:1], 2, barred=first[::-1]) == [1, 2]  # a tie goes to the lower number
    assert farthest_first(POOL, POOL[:0], 2) == [3, 2]  # nothing is labelled: near the mean first
    assert farthest_first(np.ones((3, 2), dtype=np.float32), POOL[:0, :2], 2) == [0, 1]


@pytest.fixture
def recipe(empty_folder: Path) -> Recipe:
    (empty_folder / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(empty_folder / "photos" / f"{number:03}.png")
    raw = {
        "data": {"images": "photos", "classes": list(CLASSES), "prompts": ["the digit {}"]},
        "teacher": {"model": "demo:digits", "batch_size": 8},
        "views": {"count": 1},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"workers": 0},
    }
    return validate(raw, where="test").resolved()


def test_what_is_ticked_is_kept_learned_from_and_suggested_no_more(recipe: Recipe) -> None:
    table, quiet = Path("suggested/mine.csv"), NullProgress()
    found = suggest_labels(recipe, table, Path("targets"), count=8, student=None, progress=quiet)
    assert (found.suggested, found.labelled, found.images) == (8, 0, IMAGES)
    rows = read_ticks(table, CLASSES)
    page = Path(found.sheet).read_text()
    assert page.count('class="card"') == 8
    assert "data.labelled_labels=&#39;suggested/mine.csv" in page or "data.labelled_labels='suggested/mine.csv'" in page

    data = recipe.data.model_copy(update={"labelled": "photos", "labelled_labels": str(table)})
    assert data.labelled_spec is not None
    with pytest.raises(ImagesError, match=r"nothing is ticked in mine\.csv"):
        read_image_index(data.labelled_spec, quiet)
    other = "one" if rows[1].teacher != "one" else "two"
    ticks = [replace(rows[0], right=True), replace(rows[1], right=False, named=other), replace(rows[2], right=False)]
    write_ticks(table, [*ticks, *rows[3:]])
    images, labels = select_labelled(read_image_index(data.labelled_spec, quiet), CLASSES)
    told = {key: CLASSES[label] for key, label in zip(images.keys, labels, strict=True)}
    assert told == {rows[0].key: rows[0].teacher, rows[1].key: other}

    again = suggest_labels(recipe, table, Path("targets"), count=4, student=None, progress=quiet)
    assert (again.suggested, again.labelled) == (4, 3)
    after = read_ticks(table, CLASSES)
    assert [(tick.key, tick.right, tick.named) for tick in after[:3]] == [(t.key, t.right, t.named) for t in ticks]
    assert len({tick.key for tick in after}) == 7


def test_ticks_of_images_that_are_not_here_are_kept_beside_the_table(recipe: Recipe) -> None:
    table, told = Path("mine.csv"), Told()
    suggest_labels(recipe, table, Path("targets"), count=8, student=None, progress=told)
    ticks = [replace(tick, right=True) for tick in read_ticks(table, CLASSES)]
    write_ticks(table, ticks)
    for number in range(0, IMAGES, 2):  # half of a mount is missing
        Path(f"photos/{number:03}.png").unlink()
    there = [tick for tick in ticks if Path("photos", tick.file).exists()]
    assert 0 < len(there) < 8
    again = suggest_labels(recipe, table, Path("targets"), count=2, student=None, progress=told)
    assert (again.suggested, again.labelled) == (2, len(there))
    assert read_ticks(Path("mine-1.csv"), CLASSES) == ticks
    assert [tick.key for tick in read_ticks(table, CLASSES)[: len(there)]] == [tick.key for tick in there]
    lost = f"{8 - len(there)} of the 8 ticks so far are of images that are not here: kept in mine-1.csv"
    assert lost in told.notes
    suggest_labels(recipe, table, Path("targets"), count=2, student=None, progress=told)
    assert not Path("mine-2.csv").exists()  # nothing was lost


def test_a_student_of_other_classes_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    swapped = {"classes": (CLASSES[1], CLASSES[0], *CLASSES[2:])}
    save_recipe(recipe.model_copy(update={"data": recipe.data.model_copy(update=swapped)}), run.recipe_file)
    with pytest.raises(RunError, match="the student knows other classes"):
        suggest_labels(recipe, Path("mine.csv"), Path("targets"), count=2, student=run, progress=NullProgress())


def test_dho_learns_from_the_sheet(recipe: Recipe) -> None:
    table, quiet = Path("mine.csv"), NullProgress()
    suggest_labels(recipe, table, Path("targets"), count=8, student=None, progress=quiet)
    write_ticks(table, [replace(tick, right=True) for tick in read_ticks(table, CLASSES)])
    raw = recipe.model_dump(mode="json")
    raw["data"] |= {"labelled": "photos", "labelled_labels": str(table)}
    learner = validate({**raw, "objective": {"name": "dho"}}, where="test").resolved()
    dataset = prepare(learner, Path("targets"), quiet)
    assert dataset.labelled is not None
    assert len(dataset.labelled.labels) == 8


def test_the_command_writes_both_files(recipe: Recipe, prgkit: PrgkitCommand) -> None:
    save_recipe(recipe, Path("mine.yaml"))
    told = prgkit("suggest-labels mine.yaml -n 5 --json").json["suggest-labels"]
    assert (told["suggested"], told["table"]) == (5, "suggested/mine.csv")
    assert Path("suggested/mine.html").exists()
    assert "the run has no student yet" in prgkit("suggest-labels mine.yaml --by student").err

"""The audit: a fair sample, a sheet that loses no tick, and shares with the intervals they have by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from prgkit.annotation.audit import AuditReport, audit, draw
from prgkit.config.recipe import load_recipe
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.data.ticks import Tick, read_ticks, ticked, write_ticks
from prgkit.errors import ImagesError
from prgkit.evaluate.accuracy.ticked import audit_section as report_on
from prgkit.evaluate.accuracy.ticked import teacher_share
from prgkit.evaluate.report.schema import Row
from prgkit.export.bundle.bundle import Evaluation
from prgkit.export.from_run import evaluation_positions
from prgkit.progress import NullProgress
from prgkit.storage.locks import locked
from prgkit.storage.run import Run, start_run
from prgkit.training.prepare import hold_out

CLASSES = ["one", "two", "three"]


def population(count: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 7, count) * 3, generator.random(count)  # classes 0, 3, 6, ...: some never occur


# Sampling.


@pytest.mark.parametrize(("total", "count"), [(7, 3), (12, 8), (20, 5)])
def test_every_image_is_drawn_equally_often(total: int, count: int) -> None:
    labels, confidence = population(total)
    unsure, drawn, together = confidence < np.median(confidence), np.zeros(total, int), np.zeros(count + 1, int)
    for seed in range(4000):
        chosen = draw(labels, confidence, count, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == count
        drawn[chosen] += 1
        together[unsure[chosen].sum()] += 1
    share = count / total
    assert np.abs(drawn / 4000 - share).max() < 4 * np.sqrt(share * (1 - share) / 4000)
    # What is asked varies less than in independent draws: the theorem on which the interval stands.
    of_all = unsure.mean()
    counts = np.arange(count + 1)
    variance = (together * (counts / count - of_all) ** 2).sum() / 4000
    assert variance < of_all * (1 - of_all) / count


def test_every_class_and_every_band_of_confidence_has_its_share() -> None:
    labels, confidence = population(1000)
    for seed in range(20):
        chosen = draw(labels, confidence, 100, np.random.default_rng(seed))
        up_to_now = 0
        for label in np.unique(labels):
            of_class = np.flatnonzero(labels == label)
            up_to_now += len(of_class)
            assert abs((labels[chosen] <= label).sum() - up_to_now / 10) < 1
            for band in np.array_split(of_class[np.argsort(confidence[of_class])], 3):
                assert abs(len(np.intersect1d(band, chosen)) - len(band) / 10) < 2


def test_the_sample_is_its_seed_s_and_none_or_all_can_be_drawn() -> None:
    labels, confidence = population(1001)
    once, again, other = (draw(labels, confidence, 50, np.random.default_rng(seed)).tolist() for seed in (7, 7, 8))
    assert once == again
    assert once != other
    assert draw(labels, confidence, 0, np.random.default_rng(0)).tolist() == []
    assert draw(labels, confidence, 1001, np.random.default_rng(0)).tolist() == list(range(1001))
    assert len(draw(labels, confidence, 1000, np.random.default_rng(0))) == 1000


# Estimates.


def ticks(rights: list[bool | None], teacher: str = "one", named: str | None = None) -> list[Tick]:
    return [
        Tick(n, f"{n}.jpg", f"{n:032x}", teacher, "90.0", right, named if right is False else None)
        for n, right in enumerate(rights, start=1)
    ]


def test_the_teacher_s_share_has_wilson_s_interval() -> None:
    found = teacher_share(ticks([True] * 8 + [False] * 2))
    assert (found.images, found.right, found.top1) == (10, 8, 80.0)
    # (0.8 + 3.8415/20 ± 1.96·√(0.8·0.2/10 + 3.8415/400)) / (1 + 3.8415/10), by hand
    assert found.top1_interval == pytest.approx((49.016, 94.332), abs=1e-3)


def evaluation(count: int) -> Evaluation:
    """The bundle's images are the ticks' of the same number, in reverse; the teacher always says "one"."""
    teacher = np.tile(np.float32([2, 1, 0]), (count, 1))
    names = tuple(f"{n:032x}" for n in range(count, 0, -1))
    return Evaluation(np.zeros((count, 2, 2, 3), np.uint8), teacher, teacher, teacher, None, names)


def logits(answers: list[int]) -> Any:
    return np.eye(3, dtype=np.float32)[answers[::-1]]


KEY: dict[str, Any] = {"artifact": "onnx-fp32", "backend": "onnxruntime", "device": "cpu"}
ROW = Row(**KEY, file=None, precision="fp32", threads=1, status="measured")


def test_a_student_is_right_where_it_says_the_truth_and_bounded_where_nobody_knows_it() -> None:
    answers = [0, 1, 0, 1, 2, 0]
    known = ticks([True, True, False, False, False, None], named="two")
    known[4] = replace(known[4], named=None)  # the student says three: who knows
    section, notes = report_on(
        known, evaluation(6), CLASSES, [(ROW, logits(answers)), (ROW.model_copy(update={"status": "failed"}), None)]
    )
    assert section is not None
    assert (section.images, section.ticked) == (6, 5)
    assert section.teacher.top1 == 40.0
    (row,) = section.rows
    assert (row.images, row.right, row.unknown, row.top1, row.top1_at_most) == (5, 2, 1, 40.0, 60.0)
    assert row.top1_interval == pytest.approx((11.762, 88.238), abs=1e-3)  # Wilson's low of 2 of 5, high of 3 of 5
    assert notes == [
        "Audit: 5 of 6 ticked, in the sheet's order, which is drawn by chance: fair, with a wider interval.",
        "Audit: where the teacher is wrong and no right class is given, an artifact that says something else counts as "
        "wrong in the lower bound and as right in the upper (1 of its images at most).",
    ]
    known[4] = replace(known[4], teacher="one", named=None)
    repeats = report_on(known, evaluation(6), CLASSES, [(ROW, logits([0, 1, 0, 1, 0, 0]))])[0]
    assert repeats is not None
    assert repeats.rows[0].unknown == 0  # it repeats a wrong answer


def test_passing_over_pictures_is_said_with_what_it_may_hide() -> None:
    _, notes = report_on(ticks([True, None, True, None, True, True, None]), evaluation(7), CLASSES, [])
    assert notes == [
        "Audit: 4 of 7 ticked, and 2 passed over among the first 6. Ticking only the easy ones flatters: with all of "
        "those ticked the teacher would be right on 66.7 to 100.0 % of them."
    ]
    assert report_on(ticks([None, None]), evaluation(1), CLASSES, []) == (None, [])


def test_why_no_artifact_has_a_figure_is_said() -> None:
    def said(found: Evaluation) -> list[str]:
        section, notes = report_on(ticks([True]), found, CLASSES, [(ROW, logits([0]))])
        assert section is not None
        assert section.rows == []
        return notes

    elsewhere = replace(evaluation(1), keys=("f" * 32,))
    assert "no ticked image is among those that the artifacts are evaluated on" in said(elsewhere)[0]
    assert "not among the labelled ones" in said(replace(elsewhere, labels=np.zeros(1, np.int64)))[0]


def test_ticks_of_another_teacher_are_noticed() -> None:
    _, notes = report_on(ticks([True, True], teacher="two"), evaluation(2), CLASSES, [(ROW, logits([0, 0]))])
    assert notes[0].startswith("Audit: on 2 of 2 images the teacher's answer on the sheet is not the bundle's;")


# The sheet and the CSV of a run.


class Listener(NullProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def photos(folder: Path, count: int, *, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}-{number:02}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 pictures that a teacher has seen, with a fresh audit of 20."""
    folder = tmp_path_factory.mktemp("audit")
    photos(folder / "photos", 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        look(count=20)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def look(*, count: int | None = None) -> tuple[AuditReport, list[str]]:
    sets = ["data.images=photos", "data.classes=[one, two, three]", "data.prompts=['a {}', 'the digit {}']",
            "data.held_out=0.2", "teacher={model: 'demo:digits', batch_size: 8}", "views={count: 1, flip: false}",
            "student={model: test_efficientnet, image_size: 32}"]  # fmt: skip
    progress = Listener()
    found = audit(
        load_recipe("custom", overrides=sets), Path("runs/a"), Path("targets"), count=count, progress=progress
    )
    return found, progress.said


def test_a_fresh_audit_holds_what_it_says(place: Path) -> None:
    run = Run(Path("runs/a"))
    rows = read_ticks(run.ticks_file, CLASSES)
    keys = index_images(open_images("photos"), workers=1).keys
    held_out = {keys[position] for position in hold_out(keys, 0.2)}
    assert 0 < len(held_out) < 20
    assert held_out < {tick.key for tick in rows} < set(keys)
    assert [tick.number for tick in rows] == list(range(1, 21))
    assert len({tick.key for tick in rows}) == 20
    assert [tick.key for tick in rows] == sorted(tick.key for tick in rows)
    assert ticked(rows) == []
    sample = json.loads(run.sample_file.read_text())
    assert [image["key"] for image in sample["images"]] == [tick.key for tick in rows]
    page = run.sheet_file.read_text()
    assert page.count('<li class="card"') == 20
    assert page.count("data:image/png") == 20
    found, _ = look()
    assert (found.images, found.drawn_from, found.held_out) == (20, 60, len(held_out))
    assert (found.ticked, found.teacher) == (0, None)


def tick_some(path: Path, count: int) -> list[Tick]:
    rows = read_ticks(path, CLASSES)
    rows[:count] = [replace(row, right=bool(row.number % 4)) for row in rows[:count]]
    write_ticks(path, rows)
    return rows


def test_a_second_audit_leaves_the_ticks_as_they_are_and_shows_them(place: Path) -> None:
    run = Run(Path("runs/a"))
    rows = tick_some(run.ticks_file, 12)
    text = run.ticks_file.read_bytes().replace(b",y,", b", Right ,")  # as a spreadsheet may leave it
    run.ticks_file.write_bytes(text)
    found, said = look()
    assert run.ticks_file.read_bytes() == text
    assert not any("kept as" in line for line in said)
    assert (found.ticked, found.teacher.right) == (12, 9)
    page = run.sheet_file.read_text()
    assert (page.count('data-right="y" data-class'), page.count('data-right="n" data-class')) == (9, 3)
    run.ticks_file.unlink()
    assert look()[0].ticked == 0
    assert [tick.key for tick in read_ticks(run.ticks_file, CLASSES)] == [row.key for row in rows]


def test_more_images_are_added_and_fewer_lose_no_tick(place: Path) -> None:
    run = Run(Path("runs/a"))
    rows = tick_some(run.ticks_file, 20)
    _, said = look(count=40)
    grown = read_ticks(run.ticks_file, CLASSES)
    assert len({tick.key for tick in grown}) == 40
    assert grown[:20] == rows
    assert ticked(grown) == rows
    assert not any("kept as" in line for line in said)
    assert look()[0].images == 40
    old = run.ticks_file.read_bytes()
    _, said = look(count=5)
    assert read_ticks(run.ticks_file, CLASSES) == rows[:5]
    assert run.ticks_file.with_name("ticks-1.csv").read_bytes() == old
    told = "the 20 ticks so far are kept as ticks-1.csv, and 5 of them hold on the new sheet"
    assert f"fewer images were asked for: {told}" in said


def test_other_images_make_another_sheet_and_lose_no_tick(place: Path) -> None:
    run = Run(Path("runs/a"))
    rows = tick_some(run.ticks_file, 20)
    old = run.ticks_file.read_bytes()
    photos(place / "photos", 6, seed=1)
    found, said = look()
    assert (found.images, found.drawn_from) == (20, 66)
    assert run.ticks_file.with_name("ticks-1.csv").read_bytes() == old
    before = {row.key: row.right for row in rows}
    carried = ticked(read_ticks(run.ticks_file, CLASSES))
    assert carried
    assert all(tick.right == before[tick.key] for tick in carried)
    assert found.ticked == len(carried)
    assert any(
        line.startswith("the images or the teacher's answers have changed: the 20 ticks so far") for line in said
    )


def test_a_mistake_in_the_ticks_is_told_and_nothing_is_touched(place: Path) -> None:
    run = Run(Path("runs/a"))
    run.ticks_file.write_text(run.ticks_file.read_text("utf-8-sig").replace(",,\n", ",maybe,\n", 1))
    before = {path: path.read_bytes() for path in run.ticks_file.parent.iterdir() if path.name != ".lock"}
    with pytest.raises(ImagesError, match=r"right is 'maybe', neither yes nor no\n  where: .*ticks\.csv, line 2"):
        look()
    assert {path: path.read_bytes() for path in before} == before


def test_an_audit_of_a_training_run_does_not_disturb_it(place: Path) -> None:
    card = (place / "runs/a/card.json").read_bytes()
    with locked(place / "runs/a", "run"):
        look()
    assert (place / "runs/a/card.json").read_bytes() == card


def test_the_audited_images_travel_before_others(place: Path) -> None:
    recipe = start_run(Path("runs/a"), Run(Path("runs/a")).recipe).recipe
    images = index_images(open_images("photos"), workers=1)
    held_out = evaluation_positions(images, recipe)
    page = recipe.model_copy(update={"export": recipe.export.model_copy(update={"evaluation_images": 3})})
    last = [images.keys[position] for position in held_out[-2:]]
    assert evaluation_positions(images, page).tolist() == held_out[:3].tolist()
    assert evaluation_positions(images, page, first=last).tolist() == [held_out[0], *held_out[-2:]]

"""Mixtures of images as further views: what they are made of, that the teacher saw the same, and when they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prgkit.config.recipe import Recipe, validate
from prgkit.data.augment import MultiViewDataset, mix
from prgkit.data.index import index_images
from prgkit.data.sources import open_images
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.device import best_device
from prgkit.progress import NullProgress
from prgkit.teacher.clip import load_teacher
from prgkit.training import prepare as preparing
from prgkit.training.batches import StepPlan, step_items
from prgkit.training.dataset import Process
from prgkit.training.distill import distill
from prgkit.training.dry_run import estimate
from prgkit.training.prepare import prepare

IMAGES = 20


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:IMAGES]):
        image.save(tmp_path / "photos" / f"{number:03}.png")
    raw = {
        "data": {
            "images": str(tmp_path / "photos"),
            "classes": list(CLASSES),
            "prompts": ["the digit {}"],
            "held_out": 0.2,
        },
        "teacher": {"model": "demo:digits", "batch_size": 8},
        "views": {"count": 2, "flip": False, "mixed": 3},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "crd"},
        "training": {"epochs": 5, "batch_size": 8, "workers": 0, "precision": "fp32"},
    }
    return validate(raw, where="test").resolved()


def test_a_mixture_is_its_share_of_two_images_and_follows_from_their_content(recipe: Recipe) -> None:
    images = index_images(open_images(recipe.data.images), workers=1)
    learned = np.arange(0, IMAGES, 2)
    mixed = mix(images, learned, 3, seed=0)
    assert (len(mixed), len(set(mixed.keys))) == (IMAGES + 30, IMAGES + 30)
    assert np.isin(mixed.pairs, learned).all()
    assert (mixed.pairs[:, 0] == np.repeat(learned, 3)).all()
    assert (mixed.pairs[:, 0] != mixed.pairs[:, 1]).all()
    assert ((mixed.shares >= 0.5) & (mixed.shares <= 1)).all()
    assert mix(images, learned, 3, seed=0).keys == mixed.keys
    assert not set(mix(images, learned, 3, seed=1).keys[IMAGES:]) & set(mixed.keys)
    one, other = (np.asarray(images.read(int(place)).convert("RGB"), dtype=float) for place in mixed.pairs[4])
    share = mixed.shares[4]
    np.testing.assert_allclose(np.asarray(mixed.read(IMAGES + 4)), share * one + (1 - share) * other, atol=1)
    whole = replace(mixed, shares=np.ones(30))
    assert np.array_equal(np.asarray(whole.read(IMAGES + 4)), one)
    fewer = mix(images, learned[:-1], 3, seed=0)
    assert len(set(fewer.keys) & set(mixed.keys)) >= IMAGES + 20  # an image more changes few of the others' pairs


def test_the_teacher_saw_what_the_student_sees_and_is_asked_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepare(recipe, tmp_path / "targets", NullProgress())
    assert dataset.mixed is not None
    learned = len(dataset.train_indices)
    assert dataset.mixtures_an_image == 3
    assert len(dataset.rows) == IMAGES + 3 * learned
    places = np.arange(IMAGES, IMAGES + 8)
    output = dataset.teacher_output(places, np.zeros(8, dtype=int), torch.device("cpu"))
    assert output.images.tolist() == dataset.mixed.pairs[:8, 0].tolist()  # numbers below N, as crd's bank has them
    teacher = load_teacher(recipe.teacher[0], best_device())
    rendered = MultiViewDataset(dataset.mixed, teacher.preprocessing, recipe.views)
    seen = teacher.embed_images(rendered.batch([(int(place), [0]) for place in places]).pixels[:, 0]).cpu()
    torch.testing.assert_close(output.features, seen, atol=2e-3, rtol=0)

    monkeypatch.setattr(preparing, "teacher_loader", lambda _: lambda _: pytest.fail("nothing is new to the teacher"))
    again = prepare(recipe, tmp_path / "targets", NullProgress())
    assert np.array_equal(again.rows, dataset.rows)
    plain = recipe.model_copy(update={"views": recipe.views.model_copy(update={"mixed": None})})
    assert prepare(plain, tmp_path / "targets", NullProgress()).mixed is None  # in the same store


def test_a_rehearsal_counts_mixtures(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    found = estimate(recipe, tmp_path / "run", tmp_path / "targets", NullProgress())
    assert found.mixtures == 48  # 3 of each of the 16 images that are not held out
    assert [one.views_missing for one in found.teachers] == [20 * 3 + 48]
    assert found.targets_bytes == 2 * 64 * (20 * 3 + 48)
    assert found.summary["teacher"].startswith("demo:digits, 3 views an image, 48 mixtures at most, about ")


def test_mixtures_come_after_the_crops_in_turn(recipe: Recipe, tmp_path: Path) -> None:
    dataset = prepare(recipe, tmp_path / "targets", NullProgress())
    learned = len(dataset.train_indices)
    plan = StepPlan(batch_size=learned, steps_per_epoch=1, steps=5, warmup_steps=0)
    turns: dict[int, list[tuple[int, int]]] = {}
    for items in step_items(dataset, recipe.training, 2, plan, range(5), Process(0, 1)):
        for position, (view,) in items:
            image = int(dataset.image_of(np.array([position]))[0])
            turns.setdefault(image, []).append((position, view))
    assert sorted(turns) == dataset.train_indices.tolist()
    for place, image in enumerate(dataset.train_indices.tolist()):
        first = IMAGES + 3 * place
        assert sorted(turns[image]) == [(image, 1), (image, 2), *((first + number, 0) for number in range(3))]


def test_a_run_learns_from_mixtures(recipe: Recipe, tmp_path: Path) -> None:
    run = distill(recipe, tmp_path / "run", tmp_path / "targets", NullProgress())
    assert run.finished

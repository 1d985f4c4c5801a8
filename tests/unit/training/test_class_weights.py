"""training.class_weights: the weights by hand, what they multiply, and a run that learns by them."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import Recipe, validate
from prgkit.demo.digits import CLASSES, load_digits
from prgkit.errors import RecipeError
from prgkit.interrupt import Interrupted
from prgkit.objectives import build_loss
from prgkit.outputs import cross_entropy, kl_divergence
from prgkit.progress import NullProgress
from prgkit.storage.run import Run
from prgkit.storage.tensors import load_tensors
from prgkit.training.distill import distill
from prgkit.training.pseudo_labels import class_weights
from tests.unit.objectives.test_objectives import BATCH, SPACE, sides


def test_balanced_by_hand() -> None:
    """E(3) = 1 + 0.999 + 0.998001 = 2.997001 and E(1) = 1; the four images count (3 / E(3) + 1) * scale = 4."""
    scale = 4 / (3 / 2.997001 + 1)
    weights = class_weights("balanced", np.array([0, 0, 0, 1]), None, classes=3)
    np.testing.assert_allclose(weights, [scale / 2.997001, scale, 1], rtol=1e-6)
    half = class_weights("balanced", np.array([0, 0, 1]), np.array([0.5, 0.5, 1], np.float32), classes=2)
    np.testing.assert_allclose(half, [1, 1], rtol=1e-6)  # an image in half of the epochs is half an image


def test_of_very_many_images_more_change_nothing() -> None:
    weights = class_weights("balanced", np.repeat([0, 1], [90_000, 10_000]), None, classes=2)
    np.testing.assert_allclose(weights, [1, 1], atol=1e-4)


def test_given_weights_keep_their_ratios_and_count_one_on_average() -> None:
    weights = class_weights({"a": 2.0, "b": 1.0, "c": 0.0}, np.array([0, 0, 1, 1]), None, classes=3)
    np.testing.assert_allclose(weights, [4 / 3, 2 / 3, 0], rtol=1e-6)
    with pytest.raises(RecipeError, match="names none of the classes that have a weight above 0"):
        class_weights({"a": 0.0, "b": 0.0, "c": 1.0}, np.array([0, 1]), None, classes=3)


def test_the_weighted_mean_by_hand() -> None:
    logits, weights = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0.5, 1.5])
    # The cross-entropies are ln 2 and ln 4.
    loss = cross_entropy(logits, torch.tensor([0, 1]), weights)
    assert loss.item() == pytest.approx((0.5 * math.log(2) + 1.5 * math.log(4)) / 2)
    # The divergences of (3/4, 1/4) from even odds, and of a distribution from itself.
    kl = kl_divergence(logits, torch.tensor([[math.log(3), 0.0]] * 2), weights=weights)
    assert kl.item() == pytest.approx(0.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_of_every_objective_the_terms_on_answers_are_weighted(name: str) -> None:
    def terms(weights: torch.Tensor | None) -> dict[str, float]:
        torch.manual_seed(0)
        loss = build_loss(OBJECTIVES[name](name=name), SPACE)  # type: ignore[call-arg]
        student, teacher = sides()
        heads = student._replace(heads=(student.logits, student.logits))
        return {term: value.item() for term, value in loss(heads, teacher._replace(weights=weights)).items()}

    plain, same, double = terms(None), terms(torch.ones(BATCH)), terms(torch.full((BATCH,), 2.0))
    assert same == pytest.approx(plain, rel=1e-5)
    answers = {"ce", "kl", "supervision", "tckd", "nckd", "pld", "taid", "inter", "subclasses", "ofa", "exits"}
    if name == "dho":
        answers -= {"ce"}  # of true labels
    assert answers & plain.keys()
    assert double == pytest.approx({term: (1 + (term in answers)) * value for term, value in plain.items()}, rel=1e-5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of two digits, of which one comes seldom."""
    folder = tmp_path_factory.mktemp("uneven")
    pictures, labels = load_digits("train")
    of = [[picture for picture, label in zip(pictures, labels, strict=True) if label == digit] for digit in (0, 1)]
    for number, picture in enumerate([*of[0][:34], *of[1][:6]]):
        picture.save(folder / f"{number}.png")
    return folder


def recipe_for(photos: Path, **training: Any) -> Recipe:
    raw = {
        "data": {"images": str(photos), "classes": list(CLASSES[:2]), "prompts": ["the digit {}"], "held_out": 0.2},
        "teacher": {"model": "demo:digits", "batch_size": 16},
        "views": {"count": 2, "flip": False},
        "student": {"model": "test_efficientnet", "image_size": 32},
        "objective": {"name": "prg"},
        "training": {"epochs": 2, "batch_size": 8, "workers": 0, "precision": "fp32", **training},
    }
    return validate(raw, where="test").resolved()


class StopAfter(NullProgress):
    """Stops the training after some images."""

    def __init__(self, images: int) -> None:
        self.images, self.stage = images, ""

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage

    def advance(self, count: int, facts: str = "") -> None:
        self.images -= count if self.stage == "student" else 0
        if self.images == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def weights_of(run: Run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(run.weights)[0].items()}


def test_a_run_with_uneven_classes_differs_resumes_and_says_what_it_did(photos: Path, tmp_path: Path) -> None:
    targets, quiet = tmp_path / "targets", NullProgress()
    plain = distill(recipe_for(photos), tmp_path / "plain", targets, quiet)
    none = distill(recipe_for(photos, class_weights="none"), tmp_path / "none", targets, quiet)
    assert recipe_for(photos, class_weights="none").fingerprint() == recipe_for(photos).fingerprint()
    assert weights_of(none) == weights_of(plain)
    balanced = recipe_for(photos, class_weights="balanced")
    whole = distill(balanced, tmp_path / "whole", targets, quiet)
    assert weights_of(whole) != weights_of(plain)
    with pytest.raises(Interrupted):
        distill(balanced, tmp_path / "stopped", targets, StopAfter(32))
    assert weights_of(distill(balanced, tmp_path / "stopped", targets, quiet)) == weights_of(whole)
    quality = whole.quality()
    assert quality is not None
    counted = quality.class_weights
    assert list(counted) == list(CLASSES[:2])
    assert counted[CLASSES[1]] > 1 > counted[CLASSES[0]]
    unweighted = plain.quality()
    assert unweighted is not None
    assert unweighted.class_weights == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero": 1.0, "two": 1.0}, "no class is named 'two'"),
        ({"zero": 1.0, "one": -1.0}, "training.class_weights.one: must be greater than or equal to 0, not -1.0"),
        ({"zero": 0.0, "one": 0.0}, "the figure of every class is 0"),
        ({"zero": 1.0}, "there is no figure of one"),
        ("balancd", "the figures cannot be read: No such file"),
    ],
)
def test_bad_weights_are_refused_by_name(photos: Path, given: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_for(photos, class_weights=given)
    assert said in str(caught.value)


def test_a_file_of_weights(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.csv").write_text("class,weight\none,3\nzero,1\n")
    page = recipe_for(photos, class_weights=str(tmp_path / "weights.csv"))
    assert page.training.class_weights == {"zero": 1.0, "one": 3.0}

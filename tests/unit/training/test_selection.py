"""Which images an epoch is made of: exactly so many, and each as often as its share says."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prgkit.config.sections import Keep, Training
from prgkit.errors import RunError, TargetsError
from prgkit.training.batches import plan_steps, systematic_sample
from prgkit.training.dataset import images_an_epoch
from prgkit.training.pseudo_labels import sure_enough, within_class

SHARES = np.random.default_rng(0).uniform(0.02, 1, 500).astype(np.float32)


def times(shares: np.ndarray, count: int, epochs: int, *, seed: int = 0) -> np.ndarray:
    """Return in how many epochs each image is [n], having looked at every epoch."""
    seen = np.zeros(len(shares), dtype=int)
    for epoch in range(epochs):
        chosen = systematic_sample(shares, count, epoch=epoch, epochs=epochs, seed=seed)
        assert len(chosen) == len(set(chosen.tolist())) == count
        seen[chosen] += 1
    return seen


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 30, 100])
def test_an_image_is_in_its_share_of_the_epochs_rounded_down_or_up(epochs: int) -> None:
    count = images_an_epoch(SHARES)
    expected = SHARES * (count / SHARES.sum(dtype=np.float64)) * epochs  # a sum is seldom a whole number
    assert np.abs(times(SHARES, count, epochs) - expected).max() < 1
    fewer = times(SHARES, 192, epochs)  # three batches of 64
    assert np.abs(fewer - expected * 192 / count).max() < 1


def test_half_way_the_shares_are_nearly_there() -> None:
    """A run is judged after every epoch, and may be stopped for good after any."""
    seen = np.zeros(len(SHARES))
    for epoch in range(20):
        seen[systematic_sample(SHARES, images_an_epoch(SHARES), epoch=epoch, epochs=50, seed=1)] += 1
    assert np.abs(seen / 20 - SHARES).max() < 0.15  # drawn independently, some would be 0.3 off


def test_by_hand() -> None:
    shares = np.array([0.5, 1.0, 0.25, 0.25, 1.0], dtype=np.float32)
    assert images_an_epoch(shares) == 3
    assert times(shares, 3, 4).tolist() == [2, 4, 1, 1, 4]
    assert times(np.ones(1000, dtype=np.float32), 1000, 5).tolist() == [5] * 1000


def test_an_epoch_is_a_function_of_its_seed_and_number() -> None:
    first, again = (systematic_sample(SHARES, 64, epoch=3, epochs=9, seed=5) for _ in range(2))
    assert np.array_equal(first, again)
    for epoch, seed in ((4, 5), (3, 6)):
        assert not np.array_equal(systematic_sample(SHARES, 64, epoch=epoch, epochs=9, seed=seed), first)


def test_who_is_sure_enough() -> None:
    confidence = np.array([0.5, 0.9, 0.49, 0.8], dtype=np.float32)
    assert sure_enough(confidence, Keep(min_confidence=0.5)).tolist() == [True, True, False, True]
    assert sure_enough(confidence, Keep(weighted=True)).all()
    with pytest.raises(TargetsError) as caught:
        sure_enough(confidence, Keep(min_confidence=0.95))
    assert str(caught.value) == (
        "no image is left to learn from: the teacher's confidence is at most 0.90\n"
        "  where: data.keep.min_confidence: 0.95\n"
        "  fix: lower it, or give class names and prompts that fit the images better"
    )
    with pytest.raises(TargetsError, match="only one image is left to learn from"):
        sure_enough(confidence, Keep(min_confidence=0.7, weighted=True))  # 0.9 + 0.8 are not two an epoch


def test_a_floor_by_class_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])  # 1, 1/2 and 1/4 of the largest: 0.95 is one of 0.95, 0.3167 and 0.1357
    confidence = np.array([0.94, 0.96, 0.5, 0.99, 0.31, 0.32, 0.14], dtype=np.float32)
    relative = within_class(confidence, labels)
    assert sure_enough(relative, Keep(min_confidence=0.95, by_class=True)).tolist() == [
        False, True, False, True, False, True, True
    ]  # fmt: skip
    assert within_class(np.array([0.9, 0.9, 0.9], dtype=np.float32), np.array([0, 0, 1])).tolist() == pytest.approx(
        [0.9, 0.9, 1]
    )
    assert np.array_equal(within_class(confidence, np.arange(7)), confidence)  # even classes: one floor for all


@pytest.mark.parametrize(
    ("images", "processes", "labelled", "batch"),
    [(3, 2, False, None), (4, 2, False, 4), (3, 2, True, 3), (2, 1, False, 2)],
)
def test_no_process_learns_from_a_single_image(images: int, processes: int, labelled: bool, batch: int | None) -> None:
    """A batch norm cannot: of three images one of two processes would get one."""
    dataset: Any = SimpleNamespace(images_an_epoch=images, labelled="some" if labelled else None)
    accelerator: Any = SimpleNamespace(num_processes=processes)
    if batch is not None:
        assert plan_steps(dataset, Training(), accelerator).batch_size == batch
        return
    with pytest.raises(RunError) as caught:
        plan_steps(dataset, Training(), accelerator)
    assert caught.value.what == "a batch of 3 images cannot be shared by 2 processes: each needs 2 or more"

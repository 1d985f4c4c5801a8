"""Pseudo-label quality on answers whose faults are known, since they were made so."""

import json

import numpy as np
import pytest

from prgkit.quality import assess, changes, summary

CLASSES = ("cat", "dog", "cow", "owl")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def found() -> dict:  # type: ignore[type-arg]
    """60 cats, 30 dogs, 10 between the two; no cow, no owl; a near copy; one image that is nothing."""
    generator = np.random.default_rng(0)
    classes = np.eye(4, 32)
    centres = np.vstack(
        [np.repeat(classes[:1], 60, 0), np.repeat(classes[1:2], 30, 0), np.repeat(classes[:1] + classes[1:2], 10, 0)]
    )
    features = unit(centres + 0.1 * generator.standard_normal((100, 32)))
    features[89] = features[88]
    features[59] = np.eye(1, 32, 20)[0] + 0.05 * classes[0]  # far from every class
    features = unit(features)
    logits = (20 * features @ classes.T).astype(np.float32)
    agreeing = logits.argmax(1)
    odd = np.where(np.arange(100) < 25, 3, agreeing)
    return assess(
        features, logits, np.stack([agreeing, odd]), cosines=logits.max(1) / 20, classes=CLASSES, templates=("a {}", "no {}"),
        names=[f"{number}.png" for number in range(100)],
    )  # fmt: skip


def test_balance_is_told_against_an_even_share(found: dict) -> None:  # type: ignore[type-arg]
    assert found["balance"]["unmatched"] == ["cow", "owl"]
    assert found["balance"]["uniform"] == 25
    assert sum(found["balance"]["counts"]) == 100
    assert found["balance"]["largest"]["class"] == "cat"
    assert found["balance"]["effective_classes"] < 2.01


def test_histograms_count_every_image(found: dict) -> None:  # type: ignore[type-arg]
    for name in ("confidence", "margin"):
        assert sum(found[name]["histogram"]) == 100
        assert 0 < found[name]["mean"] <= 1


def test_hesitation_copies_strangers_and_odd_prompts_are_named(found: dict) -> None:  # type: ignore[type-arg]
    assert found["confused"][0][:2] == ("cat", "dog")
    assert 1 <= found["close_calls"] <= 12
    assert found["near_duplicates"]["images"] == 2
    assert found["near_duplicates"]["pairs"] == [("88.png", "89.png", 1.0)]
    assert found["outliers"]["lowest"][0][0] == "59.png"
    assert [row["agreement"] for row in found["templates"]] == [100.0, 75.0]


def test_the_summary_is_short_and_the_rest_is_json(found: dict) -> None:  # type: ignore[type-arg]
    lines = dict(summary(found))
    assert lines["no image"] == "2 classes, e.g. cow, owl"
    assert lines["near copies"] == "2 of 100 images, e.g. 88.png = 89.png"
    assert lines["odd prompt"] == "'no {}' agrees with the others on 75.0 %"
    json.dumps(found, allow_nan=False)


def test_what_a_correction_did_is_counted_by_hand(found: dict) -> None:  # type: ignore[type-arg]
    before = np.array([[3, 1], [3, 2], [2, 1], [0, 1]], dtype=np.float32)  # three of the first class, one of the second
    did = changes(before, before - np.array([1.5, 0], dtype=np.float32))
    assert did == {"changed": 2, "images": 4, "effective_classes": {"before": 1.75, "after": 1.75}}
    found = {**found, "correction": {"debias": 0.5, "entropy": 0.3, "temperature": 1.23456, **did}}
    assert summary(found)[0] == (
        "correction",
        "debias 0.5 changed 2 of 4 pseudo-labels, as varied as 1.8 even classes, before 1.8; temperature 1.23",
    )
    found["correction"].update(debias=0.0)
    assert summary(found)[0] == ("correction", "temperature 1.23")

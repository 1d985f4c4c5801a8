"""Pseudo-label quality on answers whose faults are known, since they were made so."""

import json

import numpy as np
import pytest

from prgkit.config.sections import TargetsConfig
from prgkit.storage.quality import Statistics
from prgkit.training.statistics import (
    adjustment_effect,
    compute_statistics,
    find_doubts,
    find_read_as_one,
    kappa,
    mean_cosine,
    nearest_copies,
    outlier_floor,
    summarise,
    template_agreement,
)

CLASSES = ("cat", "dog", "cow", "owl")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def found() -> Statistics:
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
    return compute_statistics(
        features, logits, cosines=logits.max(1) / 20, classes=CLASSES,
        templates=template_agreement(np.stack([agreeing, odd]), agreeing, ("a {}", "no {}")),
        names=[f"{number}.png" for number in range(100)],
    )  # fmt: skip


def test_balance_is_told_against_an_even_share(found: Statistics) -> None:
    assert found.balance.unmatched == ["cow", "owl"]
    assert found.balance.uniform == 25
    assert sum(found.balance.counts) == 100
    assert found.balance.largest.class_name == "cat"
    assert found.balance.effective_classes < 2.01


def test_a_sample_is_said_to_be_one(found: Statistics) -> None:
    assert "a sample" not in dict(summarise(found))
    sampled = found.model_copy(update={"sampled_from": 50_000})
    assert summarise(sampled)[0] == ("a sample", "100 of 50,000 images: all counts are of these")


def test_histograms_count_every_image(found: Statistics) -> None:
    assert sum(found.confidence.histogram) == 100
    assert 0 < found.confidence.mean <= 1


def test_a_file_of_before_may_tell_more(found: Statistics) -> None:
    told = found.model_dump(mode="json")
    assert Statistics.model_validate({**told, "margin": told["confidence"]}) == found


def test_hesitation_copies_strangers_and_odd_prompts_are_named(found: Statistics) -> None:
    assert found.confused[0][:2] == ("cat", "dog")
    assert 1 <= found.close_calls <= 12
    assert found.near_duplicates.images == 2
    assert found.near_duplicates.pairs == [("88.png", "89.png", 1.0)]
    assert found.outliers.lowest[0][0] == "59.png"
    assert [row.agreement for row in found.templates] == [100.0, 75.0]


def test_the_nearest_copy_of_each_image_whatever_part_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    features = unit(np.random.default_rng(0).standard_normal((30, 64)))
    features[29] = features[3] = features[4]
    features[3] = unit((features[4] + 1e-3 * features[5])[None])
    for part in (1, 4, 30):
        monkeypatch.setattr("prgkit.training.statistics.COMPARED", part)
        compared: list[int] = []
        nearest, cosines = nearest_copies(features, np.zeros(30, int), compared.append)
        found = {int(place): int(nearest[place]) for place in np.flatnonzero(nearest >= 0)}
        assert found.pop(3) in (4, 29)  # which are the same; a product's last bit depends on the machine
        assert found == {4: 29, 29: 4}
        whole = features @ features.T - 9 * np.eye(30, dtype=np.float32)
        np.testing.assert_allclose(cosines, whole.max(axis=1), atol=1e-6)
        assert sum(compared) == 30
    assert nearest_copies(features[:1], np.zeros(1, int))[0].tolist() == [-1]


def test_the_fence_by_hand() -> None:
    cosines = np.float32([0.1, 0.4, 0.5, 0.6, 0.7])  # quartiles 0.4 and 0.6: 0.4 - 3 * 0.2
    assert outlier_floor(cosines) == pytest.approx(-0.2)


def test_the_summary_is_short_and_the_rest_is_json(found: Statistics) -> None:
    lines = dict(summarise(found))
    assert lines["no image"] == "2 classes, e.g. cow, owl"
    assert lines["near copies"] == "2 of 100 images, e.g. 88.png = 89.png"
    assert lines["odd prompt"] == "'no {}' agrees with the others on 75.0 %"
    json.dumps(found.model_dump(mode="json", by_alias=True), allow_nan=False)


def test_what_a_correction_did_is_counted_by_hand(found: Statistics) -> None:
    before = np.array([[3, 1], [3, 2], [2, 1], [0, 1]], dtype=np.float32)  # three of the first class, one of the second
    after = before - np.array([1.5, 0], dtype=np.float32)
    did = adjustment_effect(before, after, TargetsConfig(debias=0.5, entropy=0.3), temperature=1.23456)
    assert did.model_dump(include={"changed", "images", "effective_classes"}) == {
        "changed": 2,
        "images": 4,
        "effective_classes": {"before": 1.75, "after": 1.75},
    }
    assert summarise(found.model_copy(update={"correction": did}))[0] == (
        "correction",
        "debias 0.5 changed 2 of 4 pseudo-labels, as varied as 1.8 even classes, before 1.8; temperature 1.23",
    )
    did = did.model_copy(update={"refine": "inmap"})
    assert summarise(found.model_copy(update={"correction": did}))[0][1].startswith(
        "inmap and debias 0.5 changed 2 of 4"
    )
    did = did.model_copy(update={"refine": None, "debias": 0.0})
    assert summarise(found.model_copy(update={"correction": did}))[0] == ("correction", "temperature 1.23")


# A teacher whose answers are chance.


def sound(classes: int, *, share: float = 0.5, scale: float = 20.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, logits and class vectors of a teacher that sees what it reads; ``share`` of the images have class 0."""
    generator = np.random.default_rng(1)
    vectors = unit(generator.standard_normal((classes, 64)) + 1)  # alike by about a half, as CLIP's are
    labels = np.where(np.arange(400) < 400 * share, 0, generator.integers(classes, size=400))
    features = unit(0.5 * vectors[labels] + 0.06 * generator.standard_normal((400, 64)))
    return features, (scale * features @ vectors.T).astype(np.float32), vectors


def views(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return logits.argmax(1), np.where(np.arange(len(logits)) % 3, logits.argmax(1), 0)  # two thirds agree at least


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_sound_teacher_is_not_doubted(classes: int, share: float) -> None:
    features, logits, vectors = sound(classes, share=share)
    assert find_doubts(features, logits, vectors, views(logits)) == []


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_answers_of_random_weights_are_doubted(classes: int) -> None:
    generator = np.random.default_rng(2)
    features, _, vectors = sound(classes)
    # Random towers see and read nearly the same everywhere, and CLIP starts at a scale of 1 / 0.07.
    same = unit(np.ones((400, 64)) + 0.1 * generator.standard_normal((400, 64)))
    read = unit(generator.standard_normal((1, 64)) + 0.1 * generator.standard_normal((classes, 64)))
    for seen, words in ((same, read), (same, vectors), (features, read)):
        logits = (14.3 * seen @ words.T).astype(np.float32)
        assert find_doubts(seen, logits, words, views(logits))


def test_each_doubt_is_told_with_its_figure() -> None:
    features, logits, vectors = sound(10)
    even = find_doubts(features, 0.01 * logits, vectors, views(logits))
    assert even == ["nearly even odds for every class (mean entropy 1.00 of ln 10)"]
    assert find_doubts(features, logits * np.nan, vectors, views(logits))[0].startswith("nearly even odds")
    near = unit(features + 5)
    assert find_doubts(near, logits, vectors, views(logits))[0].startswith(
        "nearly the same is seen in every image (mean cos"
    )
    assert find_doubts(features, logits, unit(vectors + 9), views(logits))[0].startswith(
        "nearly the same is read in every"
    )
    unsure = 0.02 * logits + np.eye(10, dtype=np.float32)[3] * 2.5
    assert find_doubts(features, unsure, vectors, views(logits))[0].startswith(
        "one class is named for 100 % of the images"
    )
    drawn = np.random.default_rng(3).integers(10, size=(2, 400))
    assert find_doubts(features, logits, vectors, (drawn[0], drawn[1]))[0].startswith(
        "two views of one image agree hardly"
    )


def test_kappa_and_cosines_by_hand() -> None:
    one, other = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert kappa(one, other) == pytest.approx((0.75 - 0.5) / 0.5)
    assert kappa(one, one) == kappa(np.zeros(4, int), np.zeros(4, int)) == 1
    assert mean_cosine(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=np.float32)) == pytest.approx(1 / 3)


def test_classes_with_one_vector_are_named() -> None:
    vectors = sound(4)[2]
    assert find_read_as_one(vectors, CLASSES) == []
    vectors[3] = vectors[1] + 1e-7
    assert find_read_as_one(vectors, CLASSES) == [("dog", "owl")]


def test_doubts_stand_first(found: Statistics) -> None:
    told = summarise(found.model_copy(update={"doubts": ["even odds"], "read_as_one": [("dog", "owl")]}))
    assert told[:2] == [("doubtful", "looks like chance: even odds"), ("one vector", "dog / owl")]

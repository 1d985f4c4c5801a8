"""InMaP and StatA against figures worked out by hand, and on images whose classes are uneven or missing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prgkit.config.sections import TargetsConfig
from prgkit.teacher import refine
from prgkit.teacher.refine import (
    GaussianRefinement,
    LinearRefinement,
    Method,
    balance,
    fit_inmap,
    fit_refinement,
    fit_stata,
    load_refinement,
    log_likelihood,
    neighbour_affinity,
    save_refinement,
    scatter,
)
from prgkit.teacher.zero_shot import ZeroShotClassifier, fit_corrections, fit_log_prior, no_adjustment

T = torch.tensor


def test_balance_by_hand() -> None:
    # Odds 9 and 1.5; scaled by x they are p = 9x / (1 + 9x) and 1.5x / (1 + 1.5x), which add up to 1 at x^2 = 1 / 13.5.
    shares = T([[0.9, 0.1], [0.6, 0.4]])
    torch.testing.assert_close(
        balance(shares, T([0.5, 0.5])), T([[0.7101, 0.2899], [0.2899, 0.7101]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(balance(shares, T([0.75, 0.25])), shares)  # they add up to that already


def test_the_prior_that_is_taken_off_leaves_the_shares_that_are_asked_for() -> None:
    logits = T([[0.9, 0.1], [0.6, 0.4]]).log().repeat(100, 1)  # no share may fall below one image's
    even, kept = fit_log_prior(logits), fit_log_prior(logits, T([0.75, 0.25]))
    assert float(even[0] - even[1]) == pytest.approx(0.5 * math.log(13.5), abs=1e-3)
    assert float(kept[0] - kept[1]) == pytest.approx(0, abs=1e-3)


def test_one_step_of_inmap_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "MOST_STEPS", 1)
    features, vectors = T([[1.0, 0.0], [0.0, 1.0]]), T([[0.6, 0.8], [0.8, 0.6]])
    fitted = fit_inmap(features, vectors, torch.zeros(2, 2), T([0.5, 0.5]), temperature=1.0)
    # softmax(0.6, 0.8) = (0.4502, 0.5498), each 0.0498 from one half; the step is 10 / 2: w_1 = (0.6 + 0.2492, 0.8 -
    # 0.2492), of length 1.0122.
    expected = T([[0.8390, 0.5442], [0.5442, 0.8390]])
    torch.testing.assert_close(fitted.vectors, expected, atol=1e-4, rtol=0)
    assert fitted.scale == 1
    torch.testing.assert_close(fitted.apply(features, torch.empty(0)), expected.T, atol=1e-4, rtol=0)


def test_what_inmap_is_certain_of_becomes_one_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "MOST_STEPS", 1)
    features, vectors = T([[1.0, 0.0], [0.0, 1.0]]), T([[0.6, 0.8], [0.8, 0.6]])
    logits = T([[0.7, 0.3], [0.3, 0.7]]).log()
    # Of one-hot answers the first vector's gradient is (0.4502 - 1, 0.5498), times -5: (0.6 + 2.7492, 0.8 - 2.7492).
    expected = F.normalize(T([[3.3491, -1.9491], [-1.9491, 3.3491]]), dim=1)
    fitted = fit_inmap(features, vectors, logits, T([0.5, 0.5]), temperature=1.0)
    torch.testing.assert_close(fitted.vectors, expected, atol=1e-3, rtol=0)


def test_the_gaussians_parts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # -1/2 (1 / 2 + 1 / 0.5) - 1/2 (ln 2 + ln 0.5)
    assert float(log_likelihood(T([[1.0, 0.0]]), T([[0.0, 1.0]]), T([[2.0, 0.5]]))) == pytest.approx(-1.25)
    moments = scatter(T([[1.0, 0.0], [0.0, 1.0]]), T([[0.75, 0.25], [0.5, 0.5]]), T([[1.0, 0.0], [0.0, 0.5]]))
    torch.testing.assert_close(moments, T([[0.5, 0.5], [0.25, 0.0625 + 0.125]]))

    monkeypatch.setattr(refine, "NEIGHBOURS", 1)
    angles = torch.deg2rad(T([0.0, 10.0, 90.0]))
    near, far = math.cos(math.radians(10)), math.cos(math.radians(80)) / 2  # the last one's neighbour has another one
    expected = T([[0, near, 0], [near, 0, far], [0, far, 0]])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(neighbour_affinity(points).to_dense(), expected, atol=1e-5, rtol=0)


def test_stata_is_its_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "ROUNDS", 2)
    random = torch.Generator().manual_seed(3)
    x = F.normalize(torch.randn(7, 4, generator=random), dim=1)
    t = F.normalize(torch.randn(3, 4, generator=random), dim=1)
    w = 3 * torch.randn(7, 3, generator=random)
    fitted = fit_stata(x, t, w)
    means, variances = by_loops(x.double().numpy(), t.double().numpy(), w.double().softmax(dim=1).numpy(), rounds=2)
    np.testing.assert_allclose(fitted.means.numpy(), means, atol=1e-4)
    np.testing.assert_allclose(fitted.variances.numpy(), variances, atol=1e-4)


def by_loops(x: np.ndarray, t: np.ndarray, p: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """StatA, image by image and class by class."""
    count, classes, k = len(x), len(t), 3
    cosines = x @ x.T - 2 * np.eye(count)
    a = np.zeros((count, count))
    for i in range(count):
        for j in np.argsort(-cosines[i])[:k]:
            a[i, j] = cosines[i, j]
    a = (a + a.T) / 2
    z, mu = p.copy(), t.copy()
    s0 = sum(z[i, c] * (x[i] - t[c]) ** 2 for i in range(count) for c in range(classes)) / count
    s = np.array([s0] * classes)
    for _ in range(rounds):
        ll = np.array(
            [[-0.5 * sum((x[i] - mu[c]) ** 2 / s[c] + np.log(s[c])) for c in range(classes)] for i in range(count)]
        )
        for _ in range(5):
            scores = np.log(p) + (ll + 50 / (2 * k) * a @ z) / 50
            z = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        for c in range(classes):
            n = sum(z[i].argmax() == c for i in range(count))
            b = n / (n + 1)
            own = sum(z[i, c] * x[i] for i in range(count))
            mu[c] = b * own / np.linalg.norm(own) + (1 - b) * t[c]
            mu[c] /= np.linalg.norm(mu[c])
            v = sum(z[i, c] * (x[i] - mu[c]) ** 2 for i in range(count)) / z[:, c].sum()
            s[c] = b * v + (1 - b) * (s0 + (t[c] - mu[c]) ** 2)
    return mu, s


def scene(counts: list[int], *, gap: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images around true directions, class vectors that all lie apart from them in one way, and the true classes."""
    random = torch.Generator().manual_seed(seed)
    width, classes = 32, len(counts)
    directions = F.normalize(torch.randn(classes, width, generator=random), dim=1)
    labels = torch.arange(classes).repeat_interleave(T(counts))
    x = F.normalize(directions[labels] + 0.17 * torch.randn(len(labels), width, generator=random), dim=1)
    vectors = F.normalize(directions + gap * torch.randn(classes, width, generator=random), dim=1)
    return x, vectors, labels


def top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(dim=1) == labels).float().mean())


def both(counts: list[int], *, method: Method, prior: Tensor | None, gap: float = 0.25) -> tuple[float, float, Tensor]:
    """Top-1 of the teacher by itself and of the correction, and the corrected answers."""
    x, vectors, labels = scene(counts, gap=gap)
    logits = 20 * x @ vectors.T
    fitted = fit_refinement(method, x, vectors, logits, scale=20.0, prior=prior)
    answers = fitted.apply(x, logits)
    return top1(logits, labels), top1(answers, labels), answers


def test_where_names_lie_apart_from_images_both_come_nearer() -> None:
    for method in ("inmap", "stata"):
        before, after, _ = both([100] * 5, method=method, prior=torch.full((5,), 0.2))  # type: ignore[arg-type]
        assert before < 95, before
        assert after > before + (5 if method == "inmap" else 0.5), method


def test_uneven_classes_are_harmed_by_an_even_prior_and_helped_by_their_own() -> None:
    counts = [400, 60, 20, 10, 10]
    own = T(counts) / 500
    before, even, _ = both(counts, method="inmap", prior=torch.full((5,), 0.2))
    _, true, _ = both(counts, method="inmap", prior=own)
    _, unknown, _ = both(counts, method="inmap", prior=None)
    assert even < before < true
    assert even < unknown


def test_missing_classes_harm_inmap_and_not_stata() -> None:
    counts = [150, 0, 150, 0, 0]
    before, inmap, _ = both(counts, method="inmap", prior=None)
    _, stata, _ = both(counts, method="stata", prior=None)
    assert inmap < before - 5
    assert stata >= before


@pytest.mark.parametrize("images", [1, 2])  # one has no neighbour
def test_one_image_and_two_classes_are_enough(images: int) -> None:
    x, vectors, _ = scene([1, 1], gap=0.1)
    x = x[:images]
    for method in ("inmap", "stata"):
        fitted = fit_refinement(method, x, vectors, 20 * x @ vectors.T, scale=20.0, prior=None)  # type: ignore[arg-type]
        assert fitted.apply(x, 20 * x @ vectors.T).isfinite().all()


def test_a_class_without_an_image_keeps_its_name_in_stata() -> None:
    x, vectors, _ = scene([50, 50, 0], gap=0.0)
    fitted = fit_stata(x, vectors, 100 * x @ vectors.T)
    torch.testing.assert_close(fitted.means[2], vectors[2])


@pytest.mark.parametrize(
    "refinement", [LinearRefinement(torch.rand(3, 4), 14.52), GaussianRefinement(torch.rand(3, 4), torch.rand(3, 4))]
)
def test_a_refinement_comes_back_from_its_file_to_the_bit(refinement: refine.Refinement, tmp_path: Path) -> None:
    save_refinement(tmp_path / "r.safetensors", refinement)
    again = load_refinement(tmp_path / "r.safetensors")
    x, w = F.normalize(torch.rand(5, 4), dim=1), torch.rand(5, 3)
    assert torch.equal(again.apply(x, w), refinement.apply(x, w))


def test_corrections_follow_one_another() -> None:
    """Refined first, then the prior and the temperature of what was refined; class vectors of the scores are refined."""
    x, vectors, _ = scene([60, 40, 20], gap=0.2)
    teacher = ZeroShotClassifier(vectors[None], 20.0, "max", no_adjustment(3))
    config = TargetsConfig(refine="inmap", prior={"a": 3, "b": 2, "c": 1}, debias=1.0, entropy=0.3)
    fitted = fit_corrections(teacher, x, teacher.logits(x), config, ["a", "b", "c"])
    assert isinstance(fitted.refinement, LinearRefinement)
    refined = fitted.refinement.apply(x, torch.empty(0))
    assert torch.equal(fitted.logits(x), fitted.adjustment.apply(refined))
    torch.testing.assert_close(
        (refined - fitted.adjustment.log_prior).softmax(dim=1).mean(dim=0), T([3.0, 2.0, 1.0]) / 6, atol=1e-3, rtol=0
    )
    by_scores, scale = fitted.scoring()
    assert torch.equal(scale * x @ by_scores.T, refined)
    assert torch.equal(teacher.scoring()[0], teacher.class_vectors())

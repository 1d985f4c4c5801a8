"""Corrections of a teacher's answers by the user's own unlabelled images, on stored features: InMaP and StatA.

Shapes: N images, C classes, D the width of the teacher's features. X [N, D] are unit features, T [C, D] unit class
vectors, W [N, C] the teacher's logits, s its logit scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from prgkit.storage.tensors import load_tensors, save_tensors

PART = 8192  # images whose scores are computed at once
# InMaP
SINKHORN_ROUNDS = 20
CERTAIN = 0.6  # a pseudo-label above it becomes one-hot
LEARNING_RATE = 10.0
MOST_STEPS = 200
STILL = 1e-4  # the largest move of a unit class vector in a step that changes nothing any more
# StatA
ROUNDS = 10
ANSWER_ROUNDS = 5  # in each round
NEIGHBOURS = 3
LIKELIHOOD_WEIGHT = 1 / 50
LEAST_VARIANCE = 1e-8

Method = Literal["inmap", "stata"]


@dataclass(frozen=True)
class LinearRefinement:
    """Class vectors in the place of the text encoder's, as InMaP fits them: logits = scale * X vectors^T."""

    vectors: Tensor  # [C, D], unit
    scale: float

    def apply(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the refined logits [n, C] of unit features [n, D]; the teacher's own logits are not needed."""
        return self.scale * features @ self.vectors.T

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, as a file has it."""
        return {"vectors": self.vectors, "scale": torch.tensor(self.scale, dtype=torch.float64)}

    def to(self, device: torch.device) -> LinearRefinement:
        """Return the same on another device."""
        return LinearRefinement(self.vectors.to(device), self.scale)


@dataclass(frozen=True)
class GaussianRefinement:
    """A Gaussian for each class beside the teacher's answer, as StatA fits them: logits = ln softmax(W) + ll / 50."""

    means: Tensor  # mu [C, D], unit
    variances: Tensor  # S [C, D], the diagonals of their covariances

    def apply(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the refined logits [n, C] of unit features [n, D] and the teacher's logits [n, C]."""
        return logits.log_softmax(dim=1) + LIKELIHOOD_WEIGHT * log_likelihood(features, self.means, self.variances)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, as a file has it."""
        return {"means": self.means, "variances": self.variances}

    def to(self, device: torch.device) -> GaussianRefinement:
        """Return the same on another device."""
        return GaussianRefinement(self.means.to(device), self.variances.to(device))


Refinement: TypeAlias = LinearRefinement | GaussianRefinement


def save_refinement(path: Path, refinement: Refinement) -> None:
    """Write a refinement, from which `load_refinement` gets it back to the bit."""
    save_tensors(path, refinement.tensors, {})


def load_refinement(path: Path) -> Refinement:
    """Read what `save_refinement` wrote.

    Raises:
        SafetensorError: the file is damaged.
        ValueError: the file is not what was written.
        OSError: there is none.
    """
    tensors, _ = load_tensors(path)
    if {"vectors", "scale"} == tensors.keys():
        return LinearRefinement(tensors["vectors"], tensors["scale"].item())
    if {"means", "variances"} == tensors.keys():
        return GaussianRefinement(tensors["means"], tensors["variances"])
    raise ValueError("it holds no refinement")


def fit_refinement(
    method: Method, features: Tensor, vectors: Tensor, logits: Tensor, *, scale: float, prior: Tensor | None
) -> Refinement:
    """Fit a refinement to unlabelled images.

    Args:
        method: by name.
        features: X [N, D].
        vectors: T [C, D].
        logits: W [N, C].
        scale: s.
        prior: the share [C] of each class among the images, summing to 1, where it is known. InMaP alone reads it:
            where it is None, InMaP takes the teacher's own shares half way to even ones. StatA assumes nothing of it.
    """
    if method == "stata":
        return fit_stata(features, vectors, logits)
    if prior is None:
        prior = logits.softmax(dim=1).mean(dim=0).sqrt()
        prior = prior / prior.sum()
    return fit_inmap(features, vectors, logits, prior.to(logits), temperature=1 / scale)


def fit_inmap(
    features: Tensor, vectors: Tensor, logits: Tensor, prior: Tensor, *, temperature: float
) -> LinearRefinement:
    """Learn class vectors w among the images, since those of the text lie elsewhere (InMaP: Qian et al., NeurIPS 2023).

    M [N, C] are the teacher's probabilities, scaled to the prior and one-hot where they are certain. From w = T on,
    gradient steps on X^T (softmax(X w^T / t) - M) of 10 / (N t), halved when the gradient's norm rises; after each step
    the vectors get unit length.
    """
    targets = balance(logits.softmax(dim=1), prior)
    largest, labels = targets.max(dim=1)
    one_hot = F.one_hot(labels, targets.shape[1]).to(targets)
    targets = torch.where((largest > CERTAIN)[:, None], one_hot, targets)
    wanted = targets.T @ features  # [C, D]
    rate, norm_before = LEARNING_RATE / (len(features) * temperature), math.inf
    for _ in range(MOST_STEPS):
        gradient = -wanted
        for part in torch.split(features, PART):
            gradient = gradient + (part @ vectors.T / temperature).softmax(dim=1).T @ part
        norm = float(gradient.norm())
        rate = rate / 2 if norm > norm_before else rate
        moved = F.normalize(vectors - rate * gradient, dim=1)
        step, vectors, norm_before = float((moved - vectors).norm(dim=1).max()), moved, norm
        if step < STILL:
            break
    return LinearRefinement(vectors, 1 / temperature)


def balance(shares: Tensor, prior: Tensor) -> Tensor:
    """Scale probabilities [N, C] so that columns add up to N * prior [C] and rows to 1 (Sinkhorn and Knopp, 1967)."""
    for _ in range(SINKHORN_ROUNDS):
        shares = shares * (len(shares) * prior / shares.sum(dim=0).clamp(min=1e-12))
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return shares


def fit_stata(features: Tensor, vectors: Tensor, logits: Tensor) -> GaussianRefinement:
    """Fit a Gaussian to each class, held by its class vector as long as few images are its own (StatA).

    StatA: Zanella et al., "Realistic test-time adaptation of vision-language models", CVPR 2025, from its formulas. The
    answers z [N, C] and the Gaussians are fitted in turns; what an image's nearest neighbours answer counts as well.
    """
    log_shares = logits.log_softmax(dim=1)
    shares = log_shares.exp()  # z
    affinity = neighbour_affinity(features)
    means = vectors
    shared = scatter(features, shares, means).sum(dim=0) / len(features)  # S0 [D]
    variances = shared.clamp(min=LEAST_VARIANCE).expand_as(means)
    for _ in range(ROUNDS):
        fixed = log_shares + LIKELIHOOD_WEIGHT * log_likelihood(features, means, variances)
        for _ in range(ANSWER_ROUNDS):
            shares = (fixed + affinity @ shares / (2 * NEIGHBOURS)).softmax(dim=1)
        counts = torch.bincount(shares.argmax(dim=1), minlength=len(means)).to(shares)
        trust = (counts / (counts + 1))[:, None]  # b [C, 1]: in the images rather than in the class's name
        own_means = F.normalize(shares.T @ features, dim=1)
        means = F.normalize(trust * own_means + (1 - trust) * vectors, dim=1)
        own = scatter(features, shares, means) / shares.sum(dim=0).clamp(min=1e-12)[:, None]
        variances = trust * own + (1 - trust) * (shared + (vectors - means).square())
        variances = variances.clamp(min=LEAST_VARIANCE)
    return GaussianRefinement(means, variances)


def scatter(features: Tensor, shares: Tensor, means: Tensor) -> Tensor:
    """Return sum_i z_ic (x_id - mu_cd)^2: features [N, D], shares [N, C], means [C, D] -> [C, D]."""
    sums, mass = shares.T @ features, shares.sum(dim=0)[:, None]
    return (shares.T @ features.square() - 2 * means * sums + mass * means.square()).clamp(min=0)


def log_likelihood(features: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return ln N(x; mu_c, S_c) up to a constant [n, C]: -1/2 sum_d (x_d - mu_cd)^2 / S_cd - 1/2 sum_d ln S_cd."""
    precision = 1 / variances
    squares = features.square() @ precision.T - 2 * features @ (means * precision).T
    return -0.5 * (squares + (means.square() * precision + variances.log()).sum(dim=1))


def neighbour_affinity(features: Tensor) -> Tensor:
    """Return the cosines [N, N] of each image and its nearest ones, sparse and symmetrised: (A + A^T) / 2."""
    from sklearn.neighbors import NearestNeighbors  # takes a second to import, for StatA alone

    if len(features) == 1:  # it has no neighbour
        return torch.zeros(1, 1).to(features)
    count, points = min(NEIGHBOURS, len(features) - 1), features.cpu().numpy()
    distances, columns = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points).kneighbors()
    rows = torch.arange(len(points)).repeat_interleave(count)
    places = torch.stack([rows, torch.from_numpy(columns).reshape(-1)])
    cosines = torch.from_numpy(1 - distances.reshape(-1) ** 2 / 2).to(features.dtype)
    one_way = torch.sparse_coo_tensor(places, cosines, (len(points), len(points)), check_invariants=False)
    return (0.5 * (one_way + one_way.T)).coalesce().to(features.device)

"""LELP (arXiv 2409.20449), our reading of it: classes split in the teacher's feature space, for tasks of few classes.

The paper's body was not at hand, and no code is known; what is guessed here is said in `LELP`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, kl_divergence


class LELP(nn.Module):
    """loss = kl_weight * T^2 * KL(W / T || L / T) + subclass_weight * CE(t, softmax(Z)), no label.

    t [B, C * S] splits the teacher's probability of each class over S subclasses: t_ck = p_c * softmax over k of
    (<I, v_ck> - <mu_c, v_ck>) / (sigma_c * subclass_temperature), v_ck the class's principal directions outside of what
    the logits say already, rotated so that all vary alike. Z [B, C * S] is a head on F, trained beside the student and
    left behind. Guessed: one sigma_c a class, the subtraction of mu_c, and the head beside the student's own.
    """

    uses_features = True
    directions: Tensor
    offsets: Tensor

    def __init__(self, config: objectives.LELP, context: LossContext) -> None:
        super().__init__()
        self.config = config
        directions, offsets = subclass_directions(
            context.class_features(), context.class_vectors.cpu(), config.subclasses
        )
        self.register_buffer("directions", directions)  # v / sigma [C, S, D]
        self.register_buffer("offsets", offsets)  # <mu, v> / sigma [C, S]
        self.head = nn.Linear(context.width, context.classes * config.subclasses)

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``kl`` and ``subclasses``, each a scalar."""
        config = self.config
        projections = torch.einsum("bd,csd->bcs", teacher.features, self.directions) - self.offsets
        shares = (teacher.logits / config.temperature).softmax(dim=1)
        targets = split_classes(shares, projections / config.subclass_temperature)
        kl = kl_divergence(student.logits, teacher.logits, config.temperature, teacher.weights)
        return {
            "kl": config.kl_weight * config.temperature**2 * kl,
            "subclasses": config.subclass_weight * cross_entropy(self.head(student.features), targets, teacher.weights),
        }


def split_classes(shares: Tensor, projections: Tensor) -> Tensor:
    """Return class probabilities [B, C] split over S subclasses by the softmax of projections [B, C, S]: [B, C * S]."""
    return (shares[:, :, None] * projections.softmax(dim=2)).flatten(1)


def subclass_directions(features: Iterable[Tensor], class_vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return directions [C, S, D] and offsets [C, S]: features @ directions - offsets are standardised projections.

    ``features`` are each class's [n, D], class by class; the S = ``count`` directions are orthogonal to the class
    vectors [C, D], unless these leave no room for them: with as many classes as dimensions nothing is taken out.
    """
    spanned = row_space(class_vectors)
    if class_vectors.shape[1] - len(spanned) < count:
        spanned = spanned[:0]
    generator = torch.Generator().manual_seed(0)
    directions, offsets = [], []
    for own in features:
        mean = own.mean(dim=0) if len(own) else own.new_zeros(own.shape[1])
        centred = own - mean
        centred = centred - centred @ spanned.T @ spanned
        variances, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(own)))  # ascending
        rotation, _ = torch.linalg.qr(torch.randn(count, count, generator=generator))
        sigma = variances[-count:].clamp(min=0).mean().sqrt().clamp(min=1e-6)
        directions.append(rotation @ axes[:, -count:].T / sigma)
        offsets.append(directions[-1] @ mean)
    return torch.stack(directions), torch.stack(offsets)


def row_space(rows: Tensor) -> Tensor:
    """Return an orthonormal basis [rank, D] of what rows [C, D] span."""
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = axes[values > 1e-5 * values[0]]
    return basis

"""RKD (Park et al., CVPR 2019): the distances and angles between the batch's features, as the teacher has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy


class RKD(nn.Module):
    """loss = CE(L, y) + distance_weight * distance + angle_weight * angle, both smooth-L1 between F and I."""

    uses_features = True

    def __init__(self, config: objectives.RKD, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``distance`` and ``angle``, each a scalar; memory grows with B^2 * D."""
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "distance": self.config.distance_weight
            * F.smooth_l1_loss(distances(student.features), distances(teacher.features)),
            "angle": self.config.angle_weight * F.smooth_l1_loss(angles(student.features), angles(teacher.features)),
        }


def distances(features: Tensor) -> Tensor:
    """Return the Euclidean distances between rows [B, D], in units of their mean over all pairs: [B, B]."""
    pairwise = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = max(1, len(features) * (len(features) - 1))
    return pairwise / (pairwise.sum() / pairs).clamp(min=1e-12)


def angles(features: Tensor) -> Tensor:
    """Return the cosine at j of the angle from i over j to k, for rows [B, D]: [B of j, B of i, B of k]."""
    towards = F.normalize(features[None] - features[:, None], dim=2)  # [j, i, D]
    return towards @ towards.transpose(1, 2)

"""SP, similarity-preserving distillation (Tung and Mori, ICCV 2019); DisWOT's relation term as a distiller."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy

PUBLISHED_BATCH = 64  # for which sp_weight is meant: the published mean over pairs shrinks as the batch grows


class SP(nn.Module):
    """loss = CE(L, y) + sp_weight / 64 * mean over images of |G_i^s - G_i^t|^2, G the rows of A A^T with length one.

    A [B, D] are the student's features F and the teacher's I. At a batch of 64 it is the published
    sp_weight / B^2 * |G^s - G^t|^2 (mdistiller's SP; DisWOT, Dong et al., CVPR 2023).
    """

    uses_features = True

    def __init__(self, config: objectives.SP, context: LossContext) -> None:
        super().__init__()
        self.weight = config.sp_weight / PUBLISHED_BATCH

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``sp``, each a scalar."""
        difference = similarities(student.features) - similarities(teacher.features)  # [B, B]
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "sp": self.weight * difference.square().sum(dim=1).mean(),
        }


def similarities(features: Tensor) -> Tensor:
    """Return the dot products of each row [B, D] with all rows, as vectors of length one: [B, B]."""
    return F.normalize(features @ features.T, dim=1)

"""DIST (Huang et al., NeurIPS 2022): probabilities that correlate with the teacher's, whatever their size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.objectives.prg import pearson
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput


class DIST(nn.Module):
    """loss = CE(L, y) + T^2 * [inter_weight * (1 - rho of rows) + intra_weight * (1 - rho of columns)].

    rho is the Pearson correlation of softmax(L / T) with softmax(W / T).
    """

    uses_features = False

    def __init__(self, page: objectives.DIST, space: LossContext) -> None:
        super().__init__()
        self.page = page

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``inter`` (classes of an image) and ``intra`` (images of a class), scalars."""
        page = self.page
        answer = (student.logits / page.temperature).softmax(dim=1)  # [B, C]
        wanted = (teacher.logits / page.temperature).softmax(dim=1)  # [B, C]
        return {
            "ce": F.cross_entropy(student.logits, teacher.labels),
            "inter": page.inter_weight * page.temperature**2 * (1 - pearson(answer, wanted)).mean(),
            "intra": page.intra_weight * page.temperature**2 * (1 - pearson(answer.T, wanted.T)).mean(),
        }

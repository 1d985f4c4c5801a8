"""Prototypes of two views (OnPro: Wei et al., ICCV 2023, arXiv 2308.00301); the second view is the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy


class Prototypes(nn.Module):
    """loss = CE(L, y) + prototype_weight * NT-Xent of the batch's class means, student's against teacher's."""

    uses_features = True

    def __init__(self, config: objectives.Prototypes, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``prototypes``, each a scalar; the second is 0 of one class alone."""
        of_class = F.one_hot(teacher.labels).to(teacher.features)  # [B, classes]
        of_class = of_class[:, of_class.any(dim=0)].T  # [P, B] of the classes in the batch
        mine, theirs = (F.normalize(of_class @ F.normalize(one.features, dim=1), dim=1) for one in (student, teacher))
        contrast = nt_xent(mine, theirs, self.config.temperature)
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "prototypes": self.config.prototype_weight * contrast,
        }


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the mean of -log of each row's share for its counterpart among all other rows: unit [P, D] twice."""
    rows, count = torch.cat([first, second]), len(first)
    scores = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)  # [2P, 2P]
    return F.cross_entropy(scores, torch.arange(2 * count, device=rows.device).roll(count))

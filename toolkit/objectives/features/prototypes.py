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
        of_class = F.one_hot(teacher.labels, teacher.logits.shape[1]).to(teacher.features).T  # [C, B]
        mine, theirs = (F.normalize(of_class @ F.normalize(one.features, dim=1), dim=1) for one in (student, teacher))
        contrast = nt_xent(mine, theirs, self.config.temperature, of_class.any(dim=1))
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "prototypes": self.config.prototype_weight * contrast,
        }


def nt_xent(first: Tensor, second: Tensor, temperature: float, present: Tensor) -> Tensor:
    """Return the mean of -log of each row's share for its counterpart among all other rows: unit [C, D] twice.

    Only rows that are ``present`` [C] count; a mask, since to choose them a GPU would be waited for.
    """
    rows, there, count = torch.cat([first, second]), present.repeat(2), len(first)
    left_out = ~there | torch.eye(2 * count, dtype=torch.bool, device=rows.device)  # [2C, 2C]
    scores = (rows @ rows.T / temperature).masked_fill(left_out & there[:, None], -torch.inf)
    counterparts = torch.arange(2 * count, device=rows.device).roll(count)
    losses = F.cross_entropy(scores, counterparts, reduction="none")  # [2C]
    return losses.masked_fill(~there, 0).sum() / there.sum()

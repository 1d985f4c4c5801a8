"""ND, norm and direction (Wang et al., 2023): features as long as the teacher's, towards the mean of their class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, kl_divergence


class ND(nn.Module):
    """loss = CE(L, y) + kl_weight * T^2 * KL + nd_weight * mean of 1 - <f_i, e_y> / max(|f_i|, |t_i|).

    e_c is the mean of the teacher's features of class c over all images that are learned from, of unit length.
    """

    uses_features = True
    class_means: Tensor

    def __init__(self, config: objectives.ND, context: LossContext) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("class_means", F.normalize(context.class_means(), dim=1))  # e [C, D]

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``kl`` and ``nd``, each a scalar."""
        config = self.config
        dots = (student.features * self.class_means[teacher.labels]).sum(dim=1)  # <f, e_y> [B]
        lengths = student.features.norm(dim=1).maximum(teacher.features.norm(dim=1))  # [B]
        kl = kl_divergence(student.logits, teacher.logits, config.temperature, teacher.weights)
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "kl": config.kl_weight * config.temperature**2 * kl,
            "nd": config.nd_weight * (1 - dots / lengths).mean(),
        }

"""DHO, dual-head optimisation (arXiv 2505.07675): a few labels and the teacher teach a head each, and the two vote."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, soft_cross_entropy


class DHO(nn.Module):
    """loss = ce_weight * CE(L1, truth) over the labelled images + kl_weight * T^2 * KL(W / T || L2 / T) over all.

    How the heads vote is chosen afterwards, on labelled images that neither learned from (`prgkit.training.few_shot`).
    """

    uses_features = False

    def __init__(self, config: objectives.DHO, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``kl``, each a scalar; ``ce`` is 0 where no image has a label."""
        for_labels, for_teacher = student.heads
        config, truth = self.config, teacher.truth
        total = for_labels.sum() * 0.0
        known = 0
        if truth is not None:
            total = total + F.cross_entropy(for_labels, truth, ignore_index=-1, reduction="sum")
            known = int((truth >= 0).sum())
        softened = soft_cross_entropy(for_teacher, teacher.logits, config.temperature)
        return {
            "ce": config.ce_weight * total / max(1, known),
            "kl": config.kl_weight * config.temperature**2 * softened,
        }

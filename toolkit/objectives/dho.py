"""DHO, dual-head optimisation (arXiv 2505.07675): labels teach one head, the teacher the other, and both answer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class DHO(nn.Module):
    """loss = ce_weight * CE(L1, truth) over the labelled images + kl_weight * T^2 * KL(W / T || L2 / T) over all.

    How the heads are mixed is chosen afterwards, on labelled images that neither has learned from
    (`prgkit.training.few_shot`).
    """

    uses_features = False

    def __init__(self, config: objectives.DHO, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``kl``, each a scalar; ``ce`` is 0 where no image has a label."""
        label_head, teacher_head = student.heads  # logits [B, C] each
        config, truth = self.config, teacher.truth
        ce = label_head.sum() * 0.0
        if truth is not None:
            total = F.cross_entropy(label_head, truth, ignore_index=-1, reduction="sum")
            ce = ce + total / (truth >= 0).sum().clamp(min=1)  # not read: a GPU would be waited for
        kl = kl_divergence(teacher_head, teacher.logits, config.temperature, teacher.weights)
        return {
            "ce": config.ce_weight * ce,
            "kl": config.kl_weight * config.temperature**2 * kl,
        }

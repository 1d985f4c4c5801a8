"""Aspects (multi-aspect KD: Lee et al., CVPRW 2025, arXiv 2501.13341), asked of the stored features, not of an MLLM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class Aspects(nn.Module):
    """loss = kl_weight * KL(softmax(W) || softmax(L)) + aspect_weight * BCE(Z, a).

    a [B, Q] is how far an image shows each of `data.words`: sigmoid(s * (<I, t+> - <I, t->)) for a contrast pair, and
    sigmoid of <I, t>, standardised over the images, for a phrase alone. Z [B, Q] is a head on F, trained beside the
    student and left behind. An aspect is a linear read-out of I: it adds no knowledge, it says which directions matter.
    """

    uses_features = True
    directions: Tensor
    offsets: Tensor

    def __init__(self, config: objectives.Aspects, context: LossContext) -> None:
        super().__init__()
        self.config = config
        pairs = torch.tensor([len(phrases) == 2 for phrases in context.words])  # [Q]
        directions = torch.stack([phrases[0] - phrases[1:].sum(dim=0) for phrases in context.words]).cpu()  # [Q, D]
        answers = torch.cat([features @ directions.T for features in context.class_features()])  # [N, Q]
        deviation, mean = torch.std_mean(answers, dim=0, correction=0)
        scale = torch.where(pairs, context.logit_scale, 1 / deviation.clamp(min=1e-6))
        self.register_buffer("directions", scale[:, None] * directions)
        self.register_buffer("offsets", torch.where(pairs, 0.0, scale * mean))
        self.head = nn.Linear(context.width, len(directions))

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``kl`` and ``aspects``, each a scalar."""
        shown = (teacher.features @ self.directions.T - self.offsets).sigmoid()  # a [B, Q]
        loss = F.binary_cross_entropy_with_logits(self.head(student.features), shown)
        return {
            "kl": self.config.kl_weight * kl_divergence(student.logits, teacher.logits, weights=teacher.weights),
            "aspects": self.config.aspect_weight * loss,
        }

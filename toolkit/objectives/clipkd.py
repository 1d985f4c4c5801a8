"""CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732): features copied, and the scores that class vectors give them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class CLIPKD(nn.Module):
    """loss = feature_weight * mean of (l2norm(F) - I)^2 + kl_weight * KL(softmax(s * I * V^T) || softmax(L)).

    As in PromptKD the student's own logits are L = s * l2norm(F) * V^T. The captions of the paper's contrastive
    terms are the class names here: unlabelled images have no others.
    """

    uses_features = True
    class_vectors: Tensor

    def __init__(self, config: objectives.CLIPKD, context: LossContext) -> None:
        super().__init__()
        self.config, self.scale = config, context.logit_scale
        self.register_buffer("class_vectors", context.class_vectors)

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``features`` and ``kl``, each a scalar."""
        teacher_logits = self.scale * teacher.features @ self.class_vectors.T  # s * I * V^T [B, C]
        feature_loss = F.mse_loss(F.normalize(student.features, dim=1), teacher.features)
        return {
            "features": self.config.feature_weight * feature_loss,
            "kl": self.config.kl_weight * kl_divergence(student.logits, teacher_logits),
        }

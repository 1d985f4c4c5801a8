"""CLIP-KD (Yang et al., CVPR 2024, arXiv 2307.12732): features copied, and the scores that class vectors give them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class CLIPKD(nn.Module):
    """loss = feature_weight * mean of (l2norm(F) - I)^2 + kl_weight * KL(softmax(s * I * V^T) || softmax(L)).

    As in PromptKD the student's own logits are L = s * l2norm(F) * V^T. The captions of the paper's contrastive
    terms are the class names here: unlabelled images have no others. With ``gap_weighted`` an image's distance counts
    sigmoid(|p^s - p^t|), more where the answers differ; KD3 (Tang et al., ICCV 2023) takes logits, which CLIP's scale
    would make 1 for every image.
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
        distances = (F.normalize(student.features, dim=1) - teacher.features).square().mean(dim=1)  # [B]
        if self.config.gap_weighted:
            gap = (student.logits.softmax(dim=1) - teacher_logits.softmax(dim=1)).norm(dim=1)
            distances = distances * gap.detach().sigmoid()
        return {
            "features": self.config.feature_weight * distances.mean(),
            "kl": self.config.kl_weight * kl_divergence(student.logits, teacher_logits, weights=teacher.weights),
        }

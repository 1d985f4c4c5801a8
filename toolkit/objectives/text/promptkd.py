"""PromptKD (Li et al., CVPR 2024, arXiv 2403.02781): the teacher's class vectors are computed once and shared."""

from __future__ import annotations

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class PromptKD(nn.Module):
    """loss = kl_weight * T^2 * KL(softmax(s * I * V^T / T) || softmax(L / T)), V [C, D] the teacher's class vectors.

    The student's own logits are L = s * l2norm(F) * V^T: it has no class head, so that its classes can be changed.
    """

    uses_features = True
    class_vectors: Tensor

    def __init__(self, config: objectives.PromptKD, context: LossContext) -> None:
        super().__init__()
        self.config, self.scale = config, context.logit_scale
        self.register_buffer("class_vectors", context.class_vectors)

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss term ``kl``, a scalar."""
        teacher_logits = self.scale * teacher.features @ self.class_vectors.T  # s * I * V^T [B, C]
        config = self.config
        kl = kl_divergence(student.logits, teacher_logits, config.temperature, teacher.weights)
        return {"kl": config.kl_weight * config.temperature**2 * kl}

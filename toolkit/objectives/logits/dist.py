"""DIST (Huang et al., NeurIPS 2022): probabilities that correlate with the teacher's, whatever their size."""

from __future__ import annotations

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.objectives.prg import pearson
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, batch_mean, cross_entropy


class DIST(nn.Module):
    """loss = CE(L, y) + T^2 * [inter_weight * (1 - rho of rows) + intra_weight * (1 - rho of columns)].

    rho is the Pearson correlation of softmax(L / T) with softmax(W / T).
    """

    uses_features = False

    def __init__(self, config: objectives.DIST, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``inter`` (classes of an image) and ``intra`` (images of a class), scalars."""
        config = self.config
        student_probabilities = (student.logits / config.temperature).softmax(dim=1)  # [B, C]
        teacher_probabilities = (teacher.logits / config.temperature).softmax(dim=1)  # [B, C]
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "inter": config.inter_weight
            * config.temperature**2
            * batch_mean(1 - pearson(student_probabilities, teacher_probabilities), teacher.weights),
            "intra": config.intra_weight
            * config.temperature**2
            * (1 - pearson(student_probabilities.T, teacher_probabilities.T)).mean(),
        }

"""KD: the teacher's softened probabilities beside its pseudo-labels (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, kl_divergence, standardise_logits


class KD(nn.Module):
    """loss = (1 - alpha) * CE(L, y) + alpha * T^2 * KL(softmax(W / T) || softmax(L / T)).

    With ``standardise`` W and L enter the KL standardised, each image's by itself.
    """

    uses_features = False

    def __init__(self, config: objectives.KD, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``kl``, each a scalar."""
        answers = student.logits, teacher.logits
        if self.config.standardise:
            answers = standardise_logits(answers[0]), standardise_logits(answers[1])
        kl = kl_divergence(*answers, self.config.temperature, teacher.weights)
        return {
            "ce": (1 - self.config.alpha) * cross_entropy(student.logits, teacher.labels, teacher.weights),
            "kl": self.config.alpha * self.config.temperature**2 * kl,
        }

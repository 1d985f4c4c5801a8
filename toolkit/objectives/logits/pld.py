"""PLD, Plackett-Luce distillation (arXiv 2506.12542): the likelihood of the teacher's whole ranking of the classes."""

from __future__ import annotations

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, batch_mean


class PLD(nn.Module):
    """loss = sum over ranks k of q_k * (logsumexp of L from rank k on - L_k); no cross-entropy beside it.

    The ranking is the teacher's, q = softmax(W / T): at rank 1 the term is cross-entropy, weighted by how sure it is.
    """

    uses_features = False

    def __init__(self, config: objectives.PLD, context: LossContext) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss term ``pld``, a scalar."""
        ranking = teacher.logits.argsort(dim=1, descending=True, stable=True)  # pi [B, C]
        weights = (teacher.logits / self.config.temperature).softmax(dim=1).gather(1, ranking)  # q [B, C]
        ranked = student.logits.gather(1, ranking)  # [B, C]
        remaining = ranked.flip(1).logcumsumexp(dim=1).flip(1)  # [B, C]
        return {"pld": batch_mean((weights * (remaining - ranked)).sum(dim=1), teacher.weights)}

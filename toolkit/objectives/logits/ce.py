"""CE: cross-entropy with the teacher's pseudo-labels, the floor that every other objective must clear."""

from __future__ import annotations

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy


class CE(nn.Module):
    """loss = CE(L, y)."""

    uses_features = False

    def __init__(self, config: objectives.CE, context: LossContext) -> None:
        super().__init__()

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss term ``ce``, a scalar."""
        return {"ce": cross_entropy(student.logits, teacher.labels, teacher.weights)}

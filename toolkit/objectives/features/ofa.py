"""OFA (Hao et al., NeurIPS 2023, arXiv 2310.19444): the student exits after each stage, and each exit is taught."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, batch_mean, cross_entropy


class OFA(nn.Module):
    """loss = CE(L, y) + enhanced(L) + exit_weight * sum over stages of enhanced(exit logits).

    Each stage's maps go down by separable convolutions to the size and width of the last one's, and then to class
    logits; these exits are trained beside the student and left behind.
    """

    uses_features = False

    def __init__(self, config: objectives.OFA, context: LossContext) -> None:
        super().__init__()
        self.config = config
        widths = context.stages()
        self.exits = nn.ModuleList(exit_after(widths[stage:], context.classes) for stage in range(len(widths)))

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``ofa`` and ``exits``, each a scalar."""
        exits = [
            enhanced(leave(maps), teacher, self.config) for leave, maps in zip(self.exits, student.stages, strict=True)
        ]
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "ofa": enhanced(student.logits, teacher, self.config),
            "exits": self.config.exit_weight * sum(exits, start=student.logits.new_zeros(())),
        }


def enhanced(logits: Tensor, teacher: TeacherOutput, config: objectives.OFA) -> Tensor:
    """Return the batch mean of -sum over c of [(p_t + 1_y)^gamma - 1_y] * log p_s: logits [B, C] -> scalar."""
    target = (teacher.logits / config.temperature).softmax(dim=1)  # p_t [B, C]
    label = F.one_hot(teacher.labels, target.shape[1])  # 1_y [B, C]
    weights = (target + label) ** config.gamma - label
    return -batch_mean((weights * (logits / config.temperature).log_softmax(dim=1)).sum(dim=1), teacher.weights)


def exit_after(widths: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return the way out for maps [B, widths[0], H, W]: halved once for every stage that is still to come."""
    steps = [step for before, after in pairwise(widths) for step in separable(before, after)]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def separable(before: int, after: int) -> tuple[nn.Module, ...]:
    """Return a separable convolution that halves a map and brings its channels from ``before`` to ``after``."""
    return (
        nn.Conv2d(before, before, 3, stride=2, padding=1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )

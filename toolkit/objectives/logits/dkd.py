"""DKD, decoupled knowledge distillation (Zhao et al., CVPR 2022): KL of the label's share, and of the other classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, batch_mean, cross_entropy, standardise_logits


class DKD(nn.Module):
    """loss = CE(L, y) + min(epoch / warmup_epochs, 1) * (alpha * TCKD + beta * NCKD).

    With ``standardise`` W and L enter both standardised, each image's by itself.
    """

    uses_features = False
    steps: Tensor

    def __init__(self, config: objectives.DKD, context: LossContext) -> None:
        super().__init__()
        self.config = config
        # The paper's 20 epochs are a twelfth of its 240: a short run is more than its warm-up.
        epochs = min(20.0, 0.2 * context.epochs) if config.warmup_epochs is None else config.warmup_epochs
        self.warmup_steps = epochs * context.steps_per_epoch
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # taken so far; saved with the checkpoint

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce``, ``tckd`` and ``nckd``, each a scalar."""
        self.steps += 1
        warmup = (self.steps / self.warmup_steps).clamp(max=1) if self.warmup_steps else 1.0
        answers = student.logits, teacher.logits
        if self.config.standardise:
            answers = standardise_logits(answers[0]), standardise_logits(answers[1])
        target, others = decoupled(*answers, teacher.labels, self.config.temperature)
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "tckd": warmup * self.config.alpha * batch_mean(target, teacher.weights),
            "nckd": warmup * self.config.beta * batch_mean(others, teacher.weights),
        }


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 * KL between the binary shares of the label and of all else, and between the other classes: [B], [B].

    With p the teacher's softened share of the label, the first plus (1 - p) times the second is KD's T^2 * KL.
    """
    label = F.one_hot(labels, teacher.shape[1]).bool()  # [B, C]
    target, others = [], []
    for logits in (teacher / temperature, student / temperature):
        shares = logits.log_softmax(dim=1)
        rest = logits[~label].view(len(logits), -1)  # [B, C-1]
        target.append(torch.stack([shares[label], shares.masked_fill(label, -torch.inf).logsumexp(dim=1)], dim=1))
        others.append(rest.log_softmax(dim=1))
    return temperature**2 * divergence(*target), temperature**2 * divergence(*others)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of each row of log-probabilities [B, N]: [B]."""
    return (teacher.exp() * (teacher - student)).sum(dim=1)

"""CRD (Tian et al., ICLR 2020, arXiv 1910.10699): an image's teacher features against those of others."""

from __future__ import annotations

import math

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, several_processes


class CRD(nn.Module):
    """loss = CE(L, y) + crd_weight * (NCE of the student in the teacher's bank + NCE of the teacher in the student's).

    A bank [N, width] keeps each image's projected features of one side, averaged over the steps that saw it. The paper
    draws negatives for each image; here one draw serves the whole batch, which makes of a gather of [B, K, width] one
    matrix product, and an image is no negative of another with the same pseudo-label.
    """

    uses_features = True
    student_bank: Tensor
    teacher_bank: Tensor
    labels: Tensor
    partition: Tensor

    def __init__(self, config: objectives.CRD, context: LossContext) -> None:
        super().__init__()
        self.config, self.steps_per_epoch = config, context.steps_per_epoch
        self.student_head = nn.Linear(context.width, config.width)
        self.teacher_head = nn.Linear(context.width, config.width)
        bound = math.sqrt(3 / config.width)  # so that rows have length one, on average
        for side in ("student_bank", "teacher_bank"):
            self.register_buffer(side, torch.empty(context.images, config.width).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((context.images,), -1))  # y of each image when it was last seen
        self.register_buffer("partition", torch.zeros(2))  # Z of both sides, kept from the first step
        self.step = 0

    def get_extra_state(self) -> Tensor:
        """Return the step for a checkpoint; it is no buffer, since a GPU would be waited for where it is read."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on at a checkpoint's step."""
        self.step = int(state)

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``ce`` and ``crd``, each a scalar."""
        student_embedding = F.normalize(self.student_head(student.features), dim=1)  # [B, width]
        teacher_embedding = F.normalize(self.teacher_head(teacher.features), dim=1)  # [B, width]
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.step))
        drawn = drawn[: self.config.negatives].to(self.labels.device, non_blocking=True)  # [K]
        negative = (self.labels[drawn] != teacher.labels[:, None]) & (drawn != teacher.images[:, None])  # [B, K]
        if self.step >= self.steps_per_epoch:  # a row that no epoch has filled is an image that none will
            negative &= self.labels[drawn] >= 0
        contrast = sum(
            self.nce(anchor, bank, teacher.images, drawn, negative, side)
            for side, (anchor, bank) in enumerate(
                ((student_embedding, self.teacher_bank), (teacher_embedding, self.student_bank))
            )
        )
        self.update_banks(student_embedding.detach(), teacher_embedding.detach(), teacher)
        return {
            "ce": cross_entropy(student.logits, teacher.labels, teacher.weights),
            "crd": self.config.crd_weight * torch.as_tensor(contrast),
        }

    def nce(self, anchor: Tensor, bank: Tensor, images: Tensor, drawn: Tensor, negative: Tensor, side: int) -> Tensor:
        """Return the batch mean of -log P(own) - sum over negatives of log(1 - P(negative)): [B, width] -> scalar.

        P(v) = h / (h + K / N) with h = exp(<anchor, v> / T) / Z; Z makes h a density over the N images.
        """
        own = (anchor * bank[images]).sum(dim=1) / self.config.temperature  # [B]
        others = anchor @ bank[drawn].T / self.config.temperature  # [B, K]
        if self.step == 0:
            measured = others.detach().logsumexp(dim=1).mean() + math.log(len(bank) / len(drawn))
            if several_processes():
                torch.distributed.all_reduce(measured)
                measured /= torch.distributed.get_world_size()
            self.partition[side] = torch.where(self.partition[side] == 0, measured, self.partition[side])
        noise = negative.sum(dim=1).clamp(min=1).log() - math.log(len(bank))  # log(K / N) [B]
        own_odds = own - self.partition[side] - noise  # log of h / (K / N)
        odds = others - self.partition[side] - noise[:, None]
        rejected = F.softplus(odds).masked_fill(~negative, 0).sum(dim=1)  # -log(1 - P)
        return (F.softplus(-own_odds) + rejected).mean()

    @torch.no_grad()
    def update_banks(self, student: Tensor, teacher: Tensor, seen: TeacherOutput) -> None:
        """Average the batch into both banks, over all processes."""
        batches = [(seen.images, seen.labels, student, teacher)]
        if several_processes():
            everyone: list[tuple[Tensor, ...] | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, tuple(part.cpu() for part in batches[0]))
            batches = [tuple(part.to(student.device) for part in batch) for batch in everyone if batch]  # type: ignore[misc]
        for images, labels, student_rows, teacher_rows in batches:
            for bank, new in ((self.student_bank, student_rows), (self.teacher_bank, teacher_rows)):
                bank[images] = F.normalize(
                    self.config.bank_momentum * bank[images] + (1 - self.config.bank_momentum) * new
                )
            self.labels[images] = labels
        self.step += 1

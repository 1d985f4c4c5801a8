"""TAID, temporally adaptive interpolated distillation (Shing et al., ICLR 2025, arXiv 2501.16937)."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, several_processes


class TAID(nn.Module):
    """loss = CE(softmax((1 - t) * L + t * W), softmax(L)); t grows from t_start to t_end, and no gradient reaches it.

    With ``start: uniform`` the zeros stand in L's place: softmax(t * W), a plain anneal of KD's temperature 1 / t.
    """

    uses_features = False
    t: Tensor
    steps: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(self, config: objectives.TAID, context: LossContext) -> None:
        super().__init__()
        self.config, self.steps_in_all = config, context.epochs * context.steps_per_epoch
        self.register_buffer("t", torch.tensor(config.t_start))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("previous", torch.zeros(()))  # the loss of the step before
        self.register_buffer("momentum", torch.zeros(()))  # of the loss's relative change

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss term ``taid``, a scalar."""
        begin = student.logits.detach() if self.config.start == "student" else torch.zeros_like(teacher.logits)
        between = ((1 - self.t) * begin + self.t * teacher.logits).softmax(dim=1)  # p_t [B, C]
        loss = cross_entropy(student.logits, between, teacher.weights)
        self.update(loss.detach().clone())
        return {"taid": loss}

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Move t on after a step: by the linear schedule, or further where the loss falls faster than that expects."""
        config = self.config
        if several_processes():
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        begun = self.steps > 0  # a tensor: nothing here waits for the device
        change = begun * (self.previous - loss) / (self.previous + 1e-15)
        self.momentum.mul_(config.momentum).add_((1 - config.momentum) * change)
        adaptive = self.t + config.adaptive * self.momentum.sigmoid() * (1 - self.t)
        linear = config.t_start + (config.t_end - config.t_start) * self.steps / self.steps_in_all
        self.t.copy_(torch.where(begun, torch.maximum(linear, adaptive).clamp(max=config.t_end), self.t))
        self.previous.copy_(loss)
        self.steps += 1

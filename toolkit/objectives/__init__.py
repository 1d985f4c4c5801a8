"""Objectives: the outputs of student and teacher for a batch in, named loss terms out; their sum is the loss."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from torch import Tensor, nn

from prgkit.config.objectives import AnyObjective
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput


class Objectives(nn.Module):
    """A recipe's objectives, each with its weight; always in float32, whatever the student was run in."""

    def __init__(self, configs: Sequence[AnyObjective], context: LossContext) -> None:
        super().__init__()
        self.weights = [config.weight for config in configs]
        losses = [build_loss(config, context) for config in configs]
        self.losses = nn.ModuleList(losses)
        self.uses_features = any(loss.uses_features for loss in losses)  # else the projector learns nothing
        self.prefixes = [f"{config.name}." if len(configs) > 1 else "" for config in configs]

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return every loss's terms, weighted; with several losses a term is named ``prg.node``."""
        stages = tuple(stage.float() for stage in student.stages)
        heads = tuple(head.float() for head in student.heads)
        student = StudentOutput(student.features.float(), student.logits.float(), stages, heads)
        terms: dict[str, Tensor] = {}
        for weight, loss, prefix in zip(self.weights, self.losses, self.prefixes, strict=True):
            terms.update({f"{prefix}{name}": weight * term for name, term in loss(student, teacher).items()})
        return terms


def build_loss(config: AnyObjective, context: LossContext) -> nn.Module:
    """Build the loss of a config: the class of the same name, in the objective's file in its family's folder.

    A loss says whether it ``uses_features``, and returns its terms, weighted by its config.
    """
    module = import_module(".".join(filter(None, (__name__, config.family, config.name))))
    loss: nn.Module = getattr(module, type(config).__name__)(config, context)
    return loss

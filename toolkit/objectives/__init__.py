"""Objectives: both sides of a batch in, named loss terms out; their sum is the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.objectives.ce import CE
from prgkit.objectives.clipkd import CLIPKD
from prgkit.objectives.crd import CRD
from prgkit.objectives.dho import DHO
from prgkit.objectives.dist import DIST
from prgkit.objectives.dkd import DKD
from prgkit.objectives.kd import KD
from prgkit.objectives.nd import ND
from prgkit.objectives.ofa import OFA
from prgkit.objectives.pld import PLD
from prgkit.objectives.prg import PRG
from prgkit.objectives.promptkd import PromptKD
from prgkit.objectives.rkd import RKD
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput

# A loss is made of its config and the context. It says whether it `uses_features`, and gives its terms weighted.
LOSSES: dict[str, Any] = {
    "prg": PRG,
    "kd": KD,
    "ce": CE,
    "dkd": DKD,
    "dist": DIST,
    "rkd": RKD,
    "crd": CRD,
    "nd": ND,
    "pld": PLD,
    "ofa": OFA,
    "promptkd": PromptKD,
    "clipkd": CLIPKD,
    "dho": DHO,
}


class Objectives(nn.Module):
    """A recipe's objectives, each with its weight; always in float32, whatever the student was run in."""

    def __init__(self, configs: Sequence[objectives.AnyObjective], context: LossContext) -> None:
        super().__init__()
        self.weights = [config.weight for config in configs]
        parts = [LOSSES[config.name](config, context) for config in configs]
        self.parts = nn.ModuleList(parts)
        self.uses_features = any(part.uses_features for part in parts)  # else the projector learns nothing
        self.prefixes = [f"{config.name}." if len(configs) > 1 else "" for config in configs]

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return every part's terms, weighted; with several parts a term is named ``prg.node``."""
        maps = tuple(stage.float() for stage in student.stages)
        heads = tuple(head.float() for head in student.heads)
        student = StudentOutput(student.features.float(), student.logits.float(), maps, heads)
        terms: dict[str, Tensor] = {}
        for weight, part, prefix in zip(self.weights, self.parts, self.prefixes, strict=True):
            terms.update({f"{prefix}{name}": weight * term for name, term in part(student, teacher).items()})
        return terms

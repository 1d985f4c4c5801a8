"""Objectives: both sides of a batch in, named loss terms out; their sum is the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prgkit import recipe
from prgkit.objectives.ce import CE
from prgkit.objectives.kd import KD
from prgkit.objectives.prg import PRG
from prgkit.objectives.sides import StudentSide, TeacherSide

__all__ = ["CE", "KD", "PRG", "Objectives", "StudentSide", "TeacherSide"]


class Objectives(nn.Module):
    """A recipe's objectives, each with its weight; always in float32, whatever the student was run in."""

    def __init__(self, pages: Sequence[recipe.AnyObjective], classes: int, width: int) -> None:
        super().__init__()
        self.weights = [page.weight for page in pages]
        parts = [_build(page, classes, width) for page in pages]
        self.parts = nn.ModuleList(parts)
        self.uses_features = any(part.uses_features for part in parts)  # else the projector learns nothing
        self.prefixes = [f"{page.name}." if len(pages) > 1 else "" for page in pages]

    def forward(self, student: StudentSide, teacher: TeacherSide) -> dict[str, Tensor]:
        """Return every part's terms, weighted; with several parts a term is named ``prg.node``."""
        student = StudentSide(student.features.float(), student.logits.float())
        terms: dict[str, Tensor] = {}
        for weight, part, prefix in zip(self.weights, self.parts, self.prefixes, strict=True):
            terms.update({f"{prefix}{name}": weight * term for name, term in part(student, teacher).items()})
        return terms


def _build(page: recipe.AnyObjective, classes: int, width: int) -> CE | KD | PRG:
    if isinstance(page, recipe.PRG):
        return PRG(page, classes, width)
    return KD(page) if isinstance(page, recipe.KD) else CE()

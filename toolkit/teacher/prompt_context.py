"""A learned context: a few token embeddings in front of every class name, kept as a file and made for one teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from prgkit.config.sections import TeacherConfig
from prgkit.errors import TeacherError
from prgkit.storage.tensors import digest_of, load_facts, load_tensors, save_tensors
from prgkit.teacher.clip import Teacher
from prgkit.teacher.weights import teacher_identity, weights_identity

SCHEMA = "prgkit.context/1"


@dataclass(frozen=True)
class PromptContext:
    """What stands in for the words of a template (CoOp, Zhou et al., 2022)."""

    vectors: Tensor  # [tokens, token width] float32
    words: str  # whose tokens they started as, and take the places of

    @property
    def templates(self) -> tuple[str, ...]:
        """The one template that takes the place of a recipe's, told with the words that the context replaces."""
        return (f"{self.words} {{}}.",)

    @property
    def digest(self) -> str:
        """What changes when the teacher reads something else."""
        return digest_of({"vectors": self.vectors}, {"words": self.words})

    def read(self, teacher: Teacher, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Return prompts of `templates` as the teacher reads them, the vectors in the words' places: [M, C, D]."""
        return teacher.embed_with_context(prompts, self.words, self.vectors)


def save_context(path: Path, context: PromptContext, config: TeacherConfig, facts: dict[str, JsonValue]) -> None:
    """Write a context of the teacher ``config``, and how it was learned, as one safetensors file, atomically."""
    origin: dict[str, JsonValue] = {
        "schema": SCHEMA,
        "teacher": weights_identity(teacher_identity(config)),
        "teacher_name": config.name,
        "words": context.words,
    }
    save_tensors(path, {"vectors": context.vectors}, {**origin, **facts})


def context_classes(path: Path) -> frozenset[str]:
    """Return the class names of the labelled images that a context was learned on."""
    return frozenset(TypeAdapter(list[str]).validate_python(load_facts(path).get("classes", [])))


def load_context(config: TeacherConfig) -> PromptContext | None:
    """Read the context that a recipe gives its teacher, or return None where it gives none.

    Raises:
        TeacherError: the file is missing, damaged, something else, or of another teacher.
    """
    if config.context is None:
        return None
    path = Path(os.path.expanduser(config.context))
    again = "prgkit adapt-teacher RECIPE makes one"
    try:
        tensors, facts = load_tensors(path)
        if facts.get("schema") != SCHEMA:
            raise ValueError("it is none by its header")
        context = PromptContext(tensors["vectors"], str(facts["words"]))
    except FileNotFoundError as error:
        raise TeacherError(
            f"there is no learned context {config.context}", where="teacher.context", fix=again
        ) from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(f"{path.name} is no whole learned context: {reason}", where=path, fix=again) from error
    if facts["teacher"] != weights_identity(teacher_identity(config)):
        made_for = facts["teacher_name"]
        other = made_for if made_for != config.name else f"another {made_for}"
        raise TeacherError(
            f"{path.name} was learned for the teacher {other}, not for {config.name}",
            where="teacher.context",
            fix=f"name that teacher, or learn a context of this one: {again}",
        )
    return context

"""A run's card: what the run is made from and how far it is, filled in as it goes on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

SCHEMA = "prgkit.run/3"


class Part(BaseModel):
    """A part of the card: immutable, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SkippedFile(Part):
    """An image that could not be read, and why."""

    name: str
    reason: str


class ImageFacts(Part):
    """The images of a source."""

    source: str  # as the recipe names it
    used: int  # readable and distinct
    duplicates: int  # exact copies, left out
    unreadable: tuple[SkippedFile, ...]
    left_out: str  # files that are no images, in words
    grey_range: tuple[float, float] | None  # of deep greys, what is black and white


class TeacherFacts(Part):
    """The teacher, or several as one."""

    model: str
    weights: str | None
    fingerprint: str
    targets: tuple[str, ...]  # the folder of each one's store, seen from where the run was started
    width: int  # of its features
    logit_scale: float
    context: str | None = None  # the digest of what adapt-teacher learned

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, targets: Any) -> Any:
        return (targets,) if isinstance(targets, str) else targets


class LearnedFacts(Part):
    """How many images are learned from."""

    images: int
    held_out: int  # that select the checkpoint
    dropped: int  # of which the teacher is not sure enough
    an_epoch: int


class StudentFacts(Part):
    """The student as it is deployed."""

    model: str
    initial: str
    parameters: int
    preprocessing: dict[str, JsonValue]


class PrecisionProbe(Part):
    """Which precision was the faster one here, timed before training."""

    chosen: Literal["fp32", "bf16"]
    step_ms: dict[str, float]
    batch_size: int


class BestEpoch(Part):
    """The epoch that the student was taken from."""

    epoch: int
    agreement: float  # with the teacher on the held-out images [percent]
    held_out_kl: float  # the mean of KL(teacher || student) on them [nats], which chose the epoch


class RunCard(Part):
    """What a run is made from and how far it is; None stands for what is not known yet."""

    schema_version: Literal["prgkit.run/3"] = Field(alias="schema")
    prgkit: str  # the version that began it
    created: str  # ISO 8601
    fingerprint: str  # of the recipe
    origin: str  # the folder it was started from, seen from the run
    finished: bool
    images: ImageFacts | None = None
    evaluation: ImageFacts | None = None
    teacher: TeacherFacts | None = None
    learned: LearnedFacts | None = None
    student: StudentFacts | None = None
    precision: PrecisionProbe | None = None
    best: BestEpoch | None = None
    images_per_s: float | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Return what is known, as it stands in the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

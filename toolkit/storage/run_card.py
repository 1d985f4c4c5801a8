"""A run's card: what the run is made from and how far it is, filled in as it goes on."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prgkit.errors import some

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


class LearnedFacts(Part):
    """How many images are learned from."""

    images: int
    held_out: int  # that select the checkpoint
    dropped: int  # of which the teacher is not sure enough
    an_epoch: int


class InitialRun(Part):
    """The run whose student another one began with, as it was then."""

    name: str
    teacher: str
    classes: tuple[str, ...]
    images: int
    epoch: int  # that its student was taken from
    finished: bool
    learned_labels: bool  # whether it, its teacher or the run before it learned from labels
    initial: str  # what it began with itself
    initial_run: InitialRun | None = None


class StudentFacts(Part):
    """The student as it is deployed."""

    model: str
    initial: str
    parameters: int
    preprocessing: dict[str, JsonValue]
    initial_sha256: str | None = None  # of the weights file, or the run's student, that it began with
    initial_run: InitialRun | None = None

    @property
    def origin(self) -> str:
        """What it began with, in words; empty where that is random weights."""
        return _in_words(self.initial, self.initial_run)


def _in_words(initial: str, run: InitialRun | None) -> str:
    if run is None:
        words = {"random": "", "pretrained": "timm's pretrained weights"}
        return words.get(initial, f"the weights in {PurePath(initial).name}")
    taught = f"which {run.teacher} taught {len(run.classes):,} classes ({some(run.classes)}) on {run.images:,} images"
    before = _in_words(run.initial, run.initial_run)
    unfinished = "" if run.finished else f" (epoch {run.epoch}, unfinished)"
    and_before = f", and which began with {before}" if before else ""
    return f"the student of the run {run.name}{unfinished}, {taught}{and_before}"


class PrecisionProbe(Part):
    """Which precision was the faster one here, timed before training."""

    chosen: Literal["fp32", "bf16"]
    step_ms: dict[str, float]
    batch_size: int


class BestEpoch(Part):
    """The epoch that the student was taken from."""

    epoch: int
    agreement: float  # with the teacher on the held-out images [percent]
    held_out_kl: float  # the mean of KL(teacher || student) on them [nats]; its moving average chose the epoch


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

"""What quality.json says of the pseudo-labels, as types; written before training, read by reports."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Statistic(BaseModel):
    """A part of quality.json."""

    # What is no longer told may stand in a file of before.
    model_config = ConfigDict(frozen=True, extra="ignore", validate_by_name=True, serialize_by_alias=True)


class Distribution(Statistic):
    """The mean of values in [0, 1], and their counts in 20 equal bins."""

    mean: float
    histogram: list[int]


class ClassCount(Statistic):
    """A class and how many images have it as their pseudo-label."""

    class_name: str = Field(alias="class")
    count: int


class Balance(Statistic):
    """Images per pseudo-class against an even share; CLIP's are uneven even where the images are not."""

    counts: list[int]  # [C]
    uniform: float
    largest: ClassCount
    smallest: ClassCount
    unmatched: list[str]
    effective_classes: float


class NearDuplicates(Statistic):
    """How many images have a near copy, and the closest pairs with their cosine."""

    compared: int
    images: int
    pairs: list[tuple[str, str, float]]


class Outliers(Statistic):
    """How many images are far from every class, and the farthest with their cosine to the nearest class."""

    count: int
    floor: float
    lowest: list[tuple[str, float]]


class TemplateAgreement(Statistic):
    """On how many images, in percent, a template alone names the class that all name together."""

    template: str
    agreement: float


class BeforeAfter(Statistic):
    """A figure before and after the logits are adjusted."""

    before: float
    after: float


class CorrectionRow(Statistic):
    """What one correction would do to the teacher's answers, fitted to a sample of the images that are learned from."""

    name: str  # none, debias, inmap, stata; "this recipe" where that is another one
    images: int
    changed: float  # percent of the answers
    mass: list[float]  # [C], each class's share of the answers: the mean of the probabilities
    effective_classes: float
    two_views: float  # percent of the images whose evaluation view and first crop get one answer
    agreement: dict[str, float]  # percent of the images with the same answer, by the other's name
    used: bool = False
    ticked: tuple[int, int, int] | None = None  # right for certain, and perhaps, on so many of the ticked images


class AdjustmentEffect(Statistic):
    """How the teacher's logits were corrected, and what that did to the pseudo-labels."""

    refine: str | None
    debias: float
    entropy: float | None
    temperature: float
    changed: int
    images: int
    effective_classes: BeforeAfter


class TeacherAgreement(Statistic):
    """On how many images, in percent, a teacher names the class that the average of all names."""

    teacher: str
    agreement: float


class ContestedClass(Statistic):
    """How many images some teacher gives to a class, and on how many of them another does not."""

    class_name: str = Field(alias="class")
    contested: int
    named: int


class Disagreement(Statistic):
    """How far several teachers differ."""

    differ: float  # percent of the images on which not all name one class
    average: list[TeacherAgreement]
    classes: list[ContestedClass]  # the most contested first


class Statistics(Statistic):
    """What is known of the pseudo-labels before training: a run's quality.json."""

    images: int
    sampled_from: int | None = None  # so many, where not all were looked at: every count is of the sample
    confidence: Distribution
    close_calls: int
    balance: Balance
    confused: list[tuple[str, str, int]]  # the pairs of classes between which the teacher hesitates on most images
    near_duplicates: NearDuplicates
    outliers: Outliers
    templates: list[TemplateAgreement]
    doubts: list[str] = []  # why the answers look like chance
    class_weights: dict[str, float] = {}  # of training.class_weights, by class, where it asks for any
    read_as_one: list[tuple[str, str]] = []  # classes with one and the same vector
    correction: AdjustmentEffect | None = None
    corrections: list[CorrectionRow] = []
    teachers: Disagreement | None = None
    teacher_shares: dict[str, float] = {}  # in the answers, by teacher, where their probabilities are averaged

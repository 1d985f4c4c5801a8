"""What comparisons write: trial.json, compare.json and rank.json of students, comparison.json of devices.

Shares of images and their intervals are in percent. None stands for what cannot be said without labels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from prgkit.config.image_size import Size
from prgkit.evaluate.report.schema import EvaluationImages, Interval, Model, Row, RunFacts, TeacherScores, Throughput
from prgkit.storage.run_card import BestEpoch

TRIAL_SCHEMA: Literal["prgkit.trial/2"] = "prgkit.trial/2"
COMPARE_SCHEMA: Literal["prgkit.compare/2"] = "prgkit.compare/2"
RANKING_SCHEMA: Literal["prgkit.ranking/2"] = "prgkit.ranking/2"

DEVICES_SCHEMA: Literal["prgkit.comparison/2"] = "prgkit.comparison/2"

Of = Literal["top1", "agreement_teacher"]
Config = dict[str, JsonValue]


class JudgedImages(Model):
    """The images that students are judged on."""

    source: str
    images: int
    digest: str = Field(description="The same where images and labels are the same.")


class TrialTeacher(Model):
    """The teacher, and how right it is on the judged images."""

    model: str
    top1: float | None
    top1_uniform_prompts: float | None = Field(description="With all prompts weighted equally, unadjusted.")


class NovelScores(Model):
    """Student and teacher on classes that nobody was taught; the student knows them by their class vectors alone."""

    classes: int
    images: int
    top1: float | None = Field(description="None of a student without features in the teacher's space.")
    teacher_top1: float


class TrialResult(Model):
    """trial.json: what one student came to, trained with one objective and one seed."""

    schema_version: Literal["prgkit.trial/2"] = Field(TRIAL_SCHEMA, alias="schema")
    label: str = Field(description="The objective as the comparison's table names it.")
    control: bool = Field(False, description="Whether its teacher is the random one of --random-teacher.")
    fingerprint: str = Field(description="That of the recipe.")
    training_images: str = Field(description="The fingerprint of the images that it learned from.")
    teacher_files: str | None = Field(None, description="The fingerprint of its teacher's names and files.")
    initial_sha256: str | None = Field(None, description="Of the weights that it began with, where these were a file.")
    student: str
    image_size: Size
    objective: list[Config]
    seed: int
    epochs: int
    images: int = Field(description="How many images it learned from.")
    images_per_s: float = Field(description="While training.")
    selected: BestEpoch = Field(
        description="By the divergence from the teacher on held-out images, as a moving average: no label is seen."
    )
    evaluation: JudgedImages
    teacher: TrialTeacher
    top1: float | None
    top1_interval: Interval | None = None
    top5: float | None = None
    calibration_error: float | None = None
    agreement_teacher: float
    agreement_teacher_interval: Interval | None = None
    kl_teacher: float | None = Field(None, description="Mean KL(teacher || student) in nats.")
    novel: NovelScores | None = None
    answers: list[int] = Field(description="The student's answer to each judged image.")
    labels: list[int] | None

    @property
    def ratio(self) -> float | None:
        """What the student keeps of its teacher's accuracy, in percent; None where there is none to keep."""
        return 100 * self.top1 / self.teacher.top1 if self.top1 is not None and self.teacher.top1 else None

    @property
    def harmonic(self) -> float | None:
        """The harmonic mean of top-1 on base and novel classes, in percent; None where none were novel."""
        base, novel = self.top1, self.novel.top1 if self.novel else None
        return None if base is None or novel is None else 2 * base * novel / max(base + novel, 1e-9)


class Spread(Model):
    """A figure over seeds."""

    mean: float
    deviation: float | None = Field(description="The standard deviation of a sample; None of one value.")
    values: list[float]


class Difference(Model):
    """How far a row lies from the reference, in points, paired by seed or by image."""

    of: Of
    mean: float
    interval: Interval | None
    over: Literal["seeds", "images"] | None = Field(description="What the interval is over.")


class ComparedObjective(Model):
    """One student with one objective, all seeds together."""

    student: str
    label: str
    control: bool = Field(False, description="Whether its teacher is the random one of --random-teacher.")
    objective: list[Config]
    seeds: list[int]
    top1: Spread | None
    ratio: Spread | None = Field(description="The student's top-1 in percent of the teacher's.")
    agreement: Spread | None
    held_out_agreement: Spread | None
    images_per_s: Spread | None
    novel: Spread | None
    harmonic: Spread | None = Field(description="The harmonic mean of top-1 on base and on novel classes.")
    difference: Difference | None


class FailedTrial(Model):
    """A trial whose training came apart."""

    trial: str
    reason: str


class ObjectiveComparison(Model):
    """compare.json: objectives and students against each other. What all trials have in common is in lists of one."""

    schema_version: Literal["prgkit.compare/2"] = Field(COMPARE_SCHEMA, alias="schema")
    reference: str = Field(description="The label of the row that differences are to.")
    labelled: bool
    novel: NovelScores | None
    images: list[int]
    epochs: list[int]
    image_size: list[Size]
    evaluation: list[JudgedImages]
    teacher: list[TrialTeacher]
    seeds: list[int]
    rows: list[ComparedObjective]
    failed: list[FailedTrial] = Field(default_factory=list)
    command: str = "prgkit compare"
    recipe: Config | None = Field(None, description="What the recipes of all trials but the control have in common.")


class RankedStudent(Model):
    """A student before training, and what it came to where it is trained already."""

    student: str
    score: Spread = Field(description="Minus the sum of both distances to the teacher, over initialisations.")
    relations: Spread = Field(description="The distance of the relations between images.")
    semantics: Spread = Field(description="The distance of the class activations.")
    by_batch: list[float] = Field(description="The score on each batch, in the mean over initialisations.")
    parameters: int
    macs: int = Field(description="Multiplications of one image.")
    measured: Spread | None


class Measured(Model):
    """Which figure of the trained students the ranking is held against."""

    label: str = Field(description="The objective that most of the students are trained with.")
    of: Of


class RankCorrelation(Model):
    """How alike two orders are, from -1 to 1; None where one side is all the same."""

    spearman: float | None
    kendall: float | None


class Ranking(Model):
    """rank.json: students ranked without training, the most like the teacher first."""

    schema_version: Literal["prgkit.ranking/2"] = Field(RANKING_SCHEMA, alias="schema")
    teacher: str
    image_size: Size
    seeds: list[int] = Field(description="Those of the initialisations.")
    batches: list[int] = Field(description="The size of each batch.")
    measured: Measured | None
    rows: list[RankedStudent]
    correlations: dict[str, RankCorrelation] | None = Field(description="By predictor, with what was measured.")
    command: str


class ComparedReport(Model):
    """One of the reports of benches that are compared."""

    name: str = Field(description="What tells it apart from the others.")
    file: str
    created: str
    run: RunFacts
    evaluation: EvaluationImages
    teacher: TeacherScores
    machine: str
    system: str
    versions: dict[str, str]
    notes: list[str]


class ComparedRow(Row):
    """A row of one of the reports."""

    report: int = Field(description="The index of its report.")
    best: Throughput | None = Field(description="The batch size that moves the most images.")
    refused: bool = Field(description="Of INT8: not used on its machine.")


class DeviceComparison(Model):
    """comparison.json: the rows of several reports side by side."""

    schema_version: Literal["prgkit.comparison/2"] = Field(DEVICES_SCHEMA, alias="schema")
    prgkit: str
    created: str
    command: str
    reports: list[ComparedReport]
    rows: list[ComparedRow]
    notes: list[str]

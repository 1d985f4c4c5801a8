"""What a recipe can set of each objective; the losses themselves need torch and are in `prgkit.objectives`.

A new objective is a config here, named in `AnyObjective`, and a loss of the same name in its own file there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """The common ground of every section: immutable, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ObjectiveConfig(Config):
    """What every objective has: its share in a weighted list, and how the prompts are combined."""

    # The folder of its loss within prgkit/objectives; empty where the loss lies in that itself.
    family: ClassVar[str] = ""
    # Whether the student has no class head of its own: it scores its features by the teacher's class vectors.
    scores_by_text: ClassVar[bool] = False
    # Whether it reads the labels of data.labelled, with a second head for the teacher's answers.
    learns_labels: ClassVar[bool] = False
    # Whether it looks at the maps that leave the student's stages.
    reads_stages: ClassVar[bool] = False
    # Whether it asks the teacher about data.words.
    reads_words: ClassVar[bool] = False
    # Whether what they teach is how those phrases compare, so that one alone says nothing.
    compares_words: ClassVar[bool] = False
    weight: float = Field(1.0, gt=0)
    prompt_weighting: Literal["max", "mean", "softmax"] = "max"

    @property
    def aligns_features(self) -> bool:
        """Whether it draws the student's features to the teacher's own, so that class vectors can score them."""
        return self.scores_by_text

    @property
    def kept_floats(self) -> int:
        """What it keeps of every image from step to step, in the run's checkpoints too."""
        return 0

    @property
    def fewest_classes(self) -> int:
        """How many classes there have to be for it to teach anything."""
        return 2


class LogitsConfig(ObjectiveConfig):
    """What objectives have that compare the logits of teacher and student and nothing else."""

    family = "logits"
    # true: each image's logits with mean 0 and deviation 1 (Sun et al., 2024: weight 9.1, alpha 0.989, temperature 2);
    # for three classes or more.
    standardise: bool | None = None

    @property
    def fewest_classes(self) -> int:
        """Three where logits are standardised, for of two nothing is left but which one is larger."""
        return 3 if self.standardise else 2


class CE(ObjectiveConfig):
    """Cross-entropy with the teacher's pseudo-labels.

    Use: As the floor: what pseudo-labels alone teach.
    """

    family = "logits"
    name: Literal["ce"]


class KD(LogitsConfig):
    """Knowledge distillation: softened teacher probabilities beside the pseudo-labels (Hinton et al., 2015).

    Use: As the yardstick that others are held against, and with two to five classes, where none was ahead of it here.
    """

    name: Literal["kd"]
    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(4.0, gt=0)


class DKD(LogitsConfig):
    """Decoupled knowledge distillation: the label's share and the other classes apart (Zhao et al., 2022).

    Use: With many classes and long runs.
    """

    name: Literal["dkd"]
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(8.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    # Over which the distillation grows to its full weight; None: the paper's 20, at most a fifth of the run.
    warmup_epochs: float | None = Field(None, ge=0)


class DIST(ObjectiveConfig):
    """Correlation of probabilities, within an image and within a class over the batch (Huang et al., 2022).

    Use: With many classes, where the teacher is far larger than the student.
    """

    family = "logits"
    name: Literal["dist"]
    inter_weight: float = Field(2.0, ge=0)
    intra_weight: float = Field(2.0, ge=0)
    temperature: float = Field(4.0, gt=0)


class RKD(ObjectiveConfig):
    """Relational distillation: distances and angles between the batch's features (Park et al., 2019).

    Use: Beside another in a list, where it matters which images are alike; memory grows with the batch squared.
    """

    family = "features"
    name: Literal["rkd"]
    distance_weight: float = Field(25.0, ge=0)
    angle_weight: float = Field(50.0, ge=0)


class CRD(ObjectiveConfig):
    """Contrastive distillation: an image's teacher features among those of other images (Tian et al., 2020).

    Use: With large data sets and long runs.
    """

    family = "features"
    name: Literal["crd"]
    crd_weight: float = Field(0.8, ge=0)
    width: int = Field(128, ge=1)  # of the space in which features are compared
    negatives: int = Field(16384, ge=1)  # all other images where there are fewer
    temperature: float = Field(0.07, gt=0)
    bank_momentum: float = Field(0.5, ge=0, lt=1)

    @property
    def kept_floats(self) -> int:
        """An image's features of both sides."""
        return 2 * self.width


class ND(ObjectiveConfig):
    """Norm and direction: features turned towards the teacher's class means, and grown (Wang et al., 2023).

    Use: On a narrow task with a broad teacher, where it was ahead of prg here.
    """

    family = "features"
    name: Literal["nd"]
    kl_weight: float = Field(1.0, ge=0)
    nd_weight: float = Field(1.0, ge=0)
    temperature: float = Field(4.0, gt=0)

    @property
    def aligns_features(self) -> bool:
        """Whether features are turned towards the teacher's class means."""
        return self.nd_weight > 0


class PLD(ObjectiveConfig):
    """Plackett-Luce distillation: the teacher's whole ranking of the classes (arXiv 2506.12542).

    Use: Where the order of all classes counts, as in top-5.
    """

    family = "logits"
    name: Literal["pld"]
    temperature: float = Field(4.0, gt=0)


class OFA(ObjectiveConfig):
    """One for all: the label's share enhanced, on the logits and on an exit after each stage (Hao et al., 2023).

    Use: For a student with stages, a CNN, with a broad teacher: level with prg or ahead.
    """

    family = "features"
    reads_stages = True
    name: Literal["ofa"]
    gamma: float = Field(1.0, ge=1)
    exit_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class PromptKD(ObjectiveConfig):
    """Both sides score images by the teacher's class vectors; the student has no class head (Li et al., 2024).

    Use: Where classes will change: export --open-vocabulary, then relabel.
    """

    family = "text"
    scores_by_text = True
    name: Literal["promptkd"]
    kl_weight: float = Field(10.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class CLIPKD(ObjectiveConfig):
    """The teacher's features as they are, and its scores by class vectors (Yang et al., 2024).

    Use: As promptkd, and where the student's features are to be the teacher's, for a search.
    """

    family = "text"
    scores_by_text = True
    name: Literal["clipkd"]
    feature_weight: float = Field(2000.0, ge=0)
    kl_weight: float = Field(1.0, ge=0)
    gap_weighted: bool | None = None  # true: features count more where student and teacher answer differently


class DHO(ObjectiveConfig):
    """Dual-head optimisation: one head for a few labels, one for the teacher, and their vote (arXiv 2505.07675).

    Use: Where a few images are labelled.
    """

    learns_labels = True
    name: Literal["dho"]
    ce_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(0.5, ge=0)
    temperature: float = Field(2.0, gt=0)


class TAID(ObjectiveConfig):
    """The target moves from the student's own answer to the teacher's during training (Shing et al., 2025).

    Use: With many classes; in short runs with few it learned too slowly.
    """

    family = "logits"
    name: Literal["taid"]
    start: Literal["student", "uniform"] = "student"  # uniform: KD whose temperature falls from 1 / t_start
    t_start: float = Field(0.4, ge=0, le=1)
    t_end: float = Field(1.0, ge=0, le=1)
    adaptive: float = Field(5e-4, ge=0)  # by how much t may lead the linear schedule, a step; 0: not
    momentum: float = Field(0.99, ge=0, lt=1)


class LELP(ObjectiveConfig):
    """Each class split into subclasses of the teacher's features, for few classes (after LELP, arXiv 2409.20449).

    Use: With 2 to 10 classes, level with prg; of more than 20 or so it is KD.
    """

    family = "logits"
    name: Literal["lelp"]
    subclasses: int = Field(4, ge=1, le=64)  # of each class
    subclass_weight: float = Field(1.0, ge=0)
    subclass_temperature: float = Field(1.0, gt=0)  # of standardised projections
    kl_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class Aspects(ObjectiveConfig):
    """How far an image shows each of data.words, such as striped / plain, for few classes (after Lee et al., 2025).

    Use: With few classes whose looks can be said in pairs of words; behind kd here.
    """

    family = "text"
    reads_words = True
    name: Literal["aspects"]
    aspect_weight: float = Field(4.0, ge=0)
    kl_weight: float = Field(1.0, ge=0)


class Vocabulary(ObjectiveConfig):
    """Features scored by data.words, which are no classes of the task, for few classes (after Gu et al., 2023).

    Use: With many classes, and other names that the teacher knows; behind kd with few here.
    """

    family = "text"
    reads_words = True
    compares_words = True
    name: Literal["vocabulary"]
    word_weight: float = Field(0.1, ge=0)
    temperature: float = Field(4.0, gt=0)  # of the scores of words
    kl_weight: float = Field(1.0, ge=0)


class SP(ObjectiveConfig):
    """Similarity preserving: whom an image is like within the batch, as the teacher has it (Tung and Mori, 2019).

    Use: As rkd, with less memory; in short runs with many classes its weight is too large.
    """

    family = "features"
    name: Literal["sp"]
    sp_weight: float = Field(3000.0, ge=0)  # as published for a batch of 64, whatever the batch


class Prototypes(ObjectiveConfig):
    """The batch's class means, the student's against the teacher's (after OnPro: Wei et al., 2023).

    Use: Where a batch holds several images of most classes.
    """

    family = "features"
    name: Literal["prototypes"]
    prototype_weight: float = Field(1.0, ge=0)
    temperature: float = Field(0.5, gt=0)


class PRG(ObjectiveConfig):
    """Proxy relational graph: nodes, class proxies and the edges between them (arXiv 2408.12248, reconstructed).

    Use: To begin with: ahead with many classes and a student from scratch, at most 2.5 points behind elsewhere.
    """

    name: Literal["prg"]
    supervision: Literal["soft", "hard"] = "soft"
    node_weight: float = Field(3.0, ge=0)
    edge_weight: float = Field(1.0, ge=0)
    block: Literal["softmax", "zscore", "l2", "raw"] = "softmax"
    proxy_momentum: float = Field(0.9, ge=0, lt=1)

    @property
    def aligns_features(self) -> bool:
        """Whether nodes are drawn together; edges alone hold relations, which rotated features have as well."""
        return self.node_weight > 0


AnyObjective = Annotated[
    PRG
    | KD
    | CE
    | DKD
    | DIST
    | RKD
    | SP
    | CRD
    | ND
    | Prototypes
    | PLD
    | TAID
    | OFA
    | PromptKD
    | CLIPKD
    | LELP
    | Aspects
    | Vocabulary
    | DHO,
    Field(discriminator="name"),
]
# By the names that recipes use. The loss is the class of the same name in prgkit/objectives/FAMILY/NAME.py.
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    get_args(config.model_fields["name"].annotation)[0]: config for config in get_args(get_args(AnyObjective)[0])
}


def objective_lines() -> dict[str, str]:
    """Return each objective's name with what it is and when to use it."""
    told = {name: (config.__doc__ or "").split("\n\n") for name, config in OBJECTIVES.items()}
    return {name: f"{what} {use.strip()}" for name, (what, use) in told.items()}

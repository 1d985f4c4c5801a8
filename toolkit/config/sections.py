"""The sections of a recipe: what each key may be, its default, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator

from prgkit.config.image_size import Size, size_of
from prgkit.config.objectives import Config


def _shape(value: Any) -> str:
    return "a list" if isinstance(value, list | tuple) else "one word"


# Told apart by their shape, so that a mistake in a list is not also told as a list that is no word.
Words = Annotated[Annotated[str, Tag("one word")] | Annotated[tuple[str, ...], Tag("a list")], Discriminator(_shape)]


# The same of an image's size: one side of a square, or [height, width].
Side = Annotated[int, Field(ge=16)]
InputSize = Annotated[
    Annotated[Side, Tag("one word")] | Annotated[tuple[Side, Side], Tag("a list")], Discriminator(_shape)
]


class Keep(Config):
    """Which images are learned from, by the teacher's confidence: the largest probability in its answer."""

    min_confidence: float = Field(0.0, ge=0, lt=1)  # images below it are not learned from
    # true: a class with b times the images of the largest has its confidences divided by b / (2 - b), to at most 1.
    by_class: bool | None = None
    weighted: bool = False  # an image is in that share of the epochs that its confidence is

    @property
    def asks(self) -> bool:
        """Whether any confidence has to be known."""
        return self.weighted or self.min_confidence > 0


class LabelFormat(Config):
    """How labels are to be read, where a table or numbers do not say it for certain themselves."""

    image_column: str | None = None  # of a table: its name in the header, or its number, counted from 1
    label_column: str | None = None  # the same of the labels
    first_number: Literal[0, 1] | None = None  # what the first class's number is, where labels are numbers

    @field_validator("image_column", "label_column", mode="before")
    @classmethod
    def _number_as_text(cls, column: Any) -> Any:
        return str(column) if type(column) is int else column


class ImageSpec(NamedTuple):
    """A source of images, as a recipe names it, with the table of their labels and how labels are read."""

    source: str
    labels: Path | None = None  # a CSV of file,label; None: the labels that the source itself carries
    label_format: LabelFormat = LabelFormat()


class Data(Config):
    """Where the images come from, and what may be in them."""

    images: str  # a folder, a .zip, shards-{000..041}.tar here or at a URL, torchvision:NAME/split, hf:owner/name/split
    evaluation: str | None = None  # labelled images; their labels are read by evaluation alone
    evaluation_labels: str | None = None  # a CSV of file,label where folders or .cls members do not say it
    labelled: str | None = None  # a few labelled images; only objectives and commands that say so read them
    labelled_labels: str | None = None  # their CSV, as evaluation_labels is
    label_format: LabelFormat = LabelFormat()
    classes: Words  # a named list, a file with one name a line, or the names
    prompts: Words = "photo"  # a named template set, or templates with one {} each
    # What aspects and vocabulary ask of the teacher besides, as classes are given: phrases that are no classes of the
    # task, and contrast pairs such as "striped / plain".
    words: Words | None = None
    held_out: float = Field(0.05, gt=0, lt=0.5)  # share of the unlabelled images that selects the checkpoint
    keep: Keep = Keep()

    @property
    def image_spec(self) -> ImageSpec:
        """The unlabelled images."""
        return ImageSpec(self.images, None, self.label_format)

    @property
    def evaluation_spec(self) -> ImageSpec | None:
        """The labelled images that accuracy is measured on, if any."""
        return self._labelled_spec(self.evaluation, self.evaluation_labels)

    @property
    def labelled_spec(self) -> ImageSpec | None:
        """The few labelled images that are learned from, if any."""
        return self._labelled_spec(self.labelled, self.labelled_labels)

    def _labelled_spec(self, source: str | None, labels: str | None) -> ImageSpec | None:
        return ImageSpec(source, Path(labels) if labels else None, self.label_format) if source else None


RANDOM = "random"  # the weights of a teacher that knows nothing


class TeacherConfig(Config):
    """Any open_clip model: a name with its weights, ``hf-hub:owner/name`` or ``local-dir:path``."""

    model: str
    # Its tag; of a folder with several files of weights, one file's name; random: none, to see what is learned without.
    weights: str | None = None
    context: str | None = None  # a file of prgkit adapt-teacher: what it learned is read in place of data.prompts
    # Of its own pass. auto: that of the store that is there, else bf16 where a GPU has it, and fp32 on a CPU.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # A feature varies a little with it. None: that of the store that is there, else 64, and on a GPU what fits it.
    batch_size: int | None = Field(None, ge=1)

    @property
    def name(self) -> str:
        """The model and its weights in a few words; of a folder its own name, as where it lies is nobody's business."""
        if not self.model.startswith("local-dir:"):
            return " ".join(filter(None, (self.model, self.weights)))
        # A tag, left from the named model whose place the folder takes, says nothing of it; a file's name does.
        named = self.weights and (self.weights == RANDOM or Path(self.weights).suffix)
        file = self.weights if named else None
        return " ".join(filter(None, (Path(self.model).name, file)))


class Views(Config):
    """The random crops and flips that teacher and student both see."""

    count: int = Field(8, ge=1, le=255)  # random views of an image; each epoch shows the student the next one
    # Mixtures of each image with another that the teacher is asked about too (function matching); null: none.
    mixed: int | None = Field(None, ge=1, le=255)
    crop_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    flip: bool = True  # half of them mirrored
    seed: int = 0
    # Width / height that crops have on average; None: the student's, whose input is then filled without squashing.
    aspect: float | None = Field(None, gt=0)

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("must be [low, high] with 0 < low <= high <= 1")
        return scale


def _by_class_shape(value: Any) -> str:
    return "by class" if isinstance(value, dict) else "one word"


ByClass = Annotated[
    Annotated[str, Tag("one word")] | Annotated[dict[str, Annotated[float, Field(ge=0)]], Tag("by class")],
    Discriminator(_by_class_shape),
]


Average = Literal["probabilities", "confidence"]


class TargetsConfig(Config):
    """How the teacher's answers are put right before anyone learns from them; without a label, without the teacher."""

    # Fitted to the unlabelled images: inmap learns class vectors among them, stata a Gaussian for each class.
    refine: Literal["inmap", "stata"] | None = None
    prior: ByClass | None = None  # how often each class comes: even, {name: share, ...}, or a file of them
    debias: float = Field(0.0, ge=0, le=1)  # how much of the teacher's own prior is taken off; 0: none
    entropy: float | None = Field(None, gt=0, lt=1)  # the mean that a temperature gives them, as a share of ln C
    # How several teachers become one; null or logits: the mean of their logits; confidence: who is surer counts more.
    average: Average | None = None

    @field_validator("refine", "average", mode="before")
    @classmethod
    def _default_is_a_word(cls, method: Any) -> Any:
        return None if method in ("none", "logits") else method

    @property
    def corrects(self) -> bool:
        """Whether the answers differ from what the teacher says by itself."""
        return self.refine is not None or self.adjusts

    @property
    def adjusts(self) -> bool:
        """Whether a prior or a temperature is taken off the logits, class by class."""
        return self.debias > 0 or self.entropy is not None


class StudentConfig(Config):
    """Any timm model: a name of timm's, ``hf-hub:owner/name``, or ``local-dir:path`` of a folder in the hub's form."""

    model: str
    image_size: InputSize = 224  # pixels: one side of a square, or [height, width]
    initial: str = "random"  # random, pretrained, or a run's folder or a weights file of the same timm model
    # The share that the centre crop keeps; None: 1, the run's that it starts from, or timm's own where pretrained.
    crop: float | None = Field(None, gt=0, le=1)

    @field_validator("image_size")
    @classmethod
    def _square_is_a_number(cls, size: Size) -> Size:
        return size_of(size)


class Training(Config):
    """How the student is trained."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=2)  # over all processes
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has a momentum of 0.9
    learning_rate: float = Field(0.001, gt=0)  # at the end of the warm-up; it falls to zero along a cosine
    weight_decay: float = Field(0.05, ge=0)  # of matrices and kernels; biases and norms have none
    warmup_epochs: float = Field(1.0, ge=0)  # over which the rate rises, at most a fifth of the run
    gradient_clip: float | None = Field(5.0, gt=0)  # of the gradient's norm; null: none
    mixup: float | None = Field(None, gt=0)  # of Beta(mixup, mixup), by which two images are mixed, and their targets
    # What an image's answer counts, by its pseudo-class: none; balanced, where rare classes count more; {name: weight,
    # ...}, or a file of them.
    class_weights: ByClass | None = None
    ema: float = Field(0.9998, ge=0, lt=1)  # warms up: min(ema, (1 + t) / (10 + t))
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto times both for a few steps and writes down which won
    compile: bool = False  # with torch.compile
    seed: int = Field(0, ge=0, lt=2**63)
    workers: int | None = Field(None, ge=0)  # processes that decode images; None: chosen from the CPU count
    checkpoint_minutes: float = Field(5.0, gt=0)  # between two checkpoints within an epoch; each epoch ends with one
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where the metrics go besides metrics.jsonl

    @field_validator("class_weights", mode="before")
    @classmethod
    def _none_is_a_word(cls, weights: Any) -> Any:
        return None if weights == "none" else weights


class Export(Config):
    """What leaves for the device."""

    opset: int = 20  # the oldest ONNX Runtime that runs it: 17 1.12, 18 1.15, 19 1.16, 20 1.17, 21 1.18, 22 1.21
    batch: tuple[int, int, int] = (1, 1, 32)  # [min, opt, max] of a TensorRT profile; opt is the deployed batch
    evaluation_images: int = Field(2000, ge=1)  # that travel in the bundle, of the held-out or labelled ones
    margin: float = Field(2.0, gt=0, le=20)  # percent points that INT8 may be worse than FP32, by the teacher's answers

    @field_validator("opset")
    @classmethod
    def _writable(cls, opset: int) -> int:
        if not 17 <= opset <= 23:
            raise ValueError("must be 17 to 23; ONNX Runtime 1.12 and newer run 17, 1.15 18, 1.16 19, 1.17 20")
        return opset

    @field_validator("batch")
    @classmethod
    def _ordered(cls, batch: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= batch[0] <= batch[1] <= batch[2]:
            raise ValueError("must be [min, opt, max] with 1 <= min <= opt <= max")
        return batch

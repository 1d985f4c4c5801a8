"""The student: a timm model with its class head, and a projector into the teacher's feature space for training only."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from prgkit.config.image_size import Size, sides, size_told
from prgkit.config.recipe import Recipe
from prgkit.config.sections import StudentConfig
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import StudentError, one_line
from prgkit.outputs import StudentOutput
from prgkit.storage.atomic import sha256
from prgkit.storage.run import Run, initial_run, initial_weights
from prgkit.storage.run_card import BestEpoch, InitialRun, StudentFacts, TeacherFacts
from prgkit.storage.tensors import load_facts, load_tensors
from prgkit.student.heads import ClassVectors, DualHead, DualHeadModel, OpenVocabulary
from prgkit.student.timm_model import architecture, create_timm_model, head_names, timm_config

if TYPE_CHECKING:
    from prgkit.data.augment import Batch


class Normalised(nn.Module):
    """A network behind its preprocessing: uint8 pixels [B, S, S, 3] in, normalised channels-first images inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def images(self, pixels: Tensor) -> Tensor:
        """Return normalised float32 images [B, 3, S, S]; the cast comes first, as TensorRT's parser wants it."""
        return (pixels.float().permute(0, 3, 1, 2) - self.mean) / self.std


class Student(Normalised):
    """The student in training: h is the timm model up to its pooled features, g the projector.

    Its class logits come from the timm model's head; from the teacher's class vectors where it has a ``scorer``; from
    a mix of two heads where it has a ``second``.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, teacher_width: int) -> None:
        super().__init__(preprocessing)
        self.model = model
        self.preprocessing = preprocessing
        self.width = _feature_width(model, preprocessing.image_size)  # D_s, of the pooled features
        self.projector = nn.Linear(self.width, teacher_width)
        self.scorer: ClassVectors | None = None
        self.second: DualHead | None = None
        self.returns_stages = False

    def forward(self, pixels: Tensor) -> StudentOutput:
        """Return F = g(h(x)) [B, D] and L = head(h(x)) [B, C] for uint8 pixels [B, S, S, 3]."""
        images, stages = self.images(pixels).contiguous(memory_format=torch.channels_last), []
        if self.returns_stages:
            maps, stages = self.model.forward_intermediates(images)  # type: ignore[operator]
        else:
            maps = self.model.forward_features(images)  # type: ignore[operator]
        pooled = self.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        features = self.projector(pooled)
        if self.scorer is not None:
            return StudentOutput(features, self.scorer(features), tuple(stages))
        logits = self.model.get_classifier()(pooled)  # type: ignore[operator]
        if self.second is None:
            return StudentOutput(features, logits, tuple(stages))
        heads = (logits, self.second.head(pooled))
        return StudentOutput(features, self.second.mix(*heads), tuple(stages), heads)

    def use_class_vectors(self, class_vectors: Tensor, logit_scale: float) -> None:
        """Take the teacher's class vectors [C, D] as the head; the timm model's own head learns nothing any more."""
        self.scorer = ClassVectors(class_vectors, logit_scale)
        self.model.get_classifier().requires_grad_(False)  # type: ignore[operator]

    def add_second_head(self) -> None:
        """Add a head that learns from the teacher, beside the timm model's own, which learns from labels."""
        self.second = DualHead(self.width, int(self.model.num_classes))  # type: ignore[arg-type]

    @torch.inference_mode()
    def stage_widths(self) -> tuple[int, ...]:
        """Return the channels that leave each stage.

        Raises:
            StudentError: timm does not know the model's stages.
        """
        image = torch.zeros(1, 3, *sides(self.preprocessing.image_size), device=self.mean.device)
        try:
            maps: list[Tensor] = copy.deepcopy(self.model).eval().forward_intermediates(image)[1]  # type: ignore[operator]
        except (AttributeError, TypeError) as error:
            raise StudentError(
                "timm gives no maps of this model's stages, which the objective asks for",
                where="student.model",
                fix="choose another objective, or a model of the RepViT or EfficientNet family",
            ) from error
        return tuple(stage.shape[1] for stage in maps)

    def facts(self, config: StudentConfig) -> StudentFacts:
        """Return what a run's card says of its student; parameters are counted as they are deployed."""
        weights, origin = initial_weights(config), initial_run(config)
        return StudentFacts(
            model=config.model,
            initial=config.initial,
            parameters=self.deployed_parameters(),
            preprocessing=self.preprocessing.to_dict(),
            initial_sha256=None if weights is None else sha256(weights),
            initial_run=None if origin is None else describe_run(origin),
        )

    def deployed_parameters(self) -> int:
        """Return how many parameters it has on a device, where branches and batch norms are fused."""
        network = self.inference_model().model
        if isinstance(network, OpenVocabulary):
            network.model.reset_classifier(0)  # type: ignore[operator]
        return sum(parameter.numel() for parameter in reparameterised(network).parameters())

    def inference_model(self) -> InferenceModel:
        """Return a copy for deployment: the same weights, without the projector unless class vectors need it."""
        network = self.model
        if self.scorer is not None:
            network = OpenVocabulary(self.model, self.projector, self.scorer)
        elif self.second is not None:
            network = DualHeadModel(self.model, self.second)
        return InferenceModel(copy.deepcopy(network), self.preprocessing).eval()


class InferenceModel(Normalised):
    """The student on a device: uint8 pixels [B, S, S, 3] in, float32 class logits [B, C] out."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(preprocessing)
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Return class logits [B, C]."""
        logits: Tensor = self.model(self.images(pixels))
        return logits


def build_student(config: StudentConfig, *, classes: int, teacher_width: int, trained: Run | None = None) -> Student:
    """Build the timm model with a fresh head for ``classes``, and the projector to ``teacher_width``.

    One that a run has ``trained`` is built without weights, since they come from the run's files: what it began with is
    not read again. Its preprocessing is what the run's card says.

    Raises:
        StudentError: timm has no such model, its weights cannot be had, or it does not give pooled features.
    """
    origin = None if trained else initial_run(config)
    preprocessing = card_preprocessing(trained) if trained else student_preprocessing(config)
    without_weights = trained is not None or origin is not None
    model = create_timm_model(config.model_copy(update={"initial": "random"}) if without_weights else config, classes)
    try:
        student = Student(model, preprocessing, teacher_width)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise StudentError(
            f"{config.model} cannot be a student at {size_told(config.image_size)} px: {error}",
            where="student",
            fix="choose another image_size, or a model of the RepViT or EfficientNet family",
        ) from error
    if origin is not None:
        start_from_run(model, origin, config)
    return student.to(memory_format=torch.channels_last)


def start_student(
    recipe: Recipe, teacher: TeacherFacts, scoring: tuple[Tensor, float], *, trained: Run | None = None
) -> Student:
    """Build a recipe's student with its heads, and take over what fits of the run that it starts from.

    ``scoring``, class vectors [C, D] and their scale, is its head where it is scored by text; of one that a run has
    ``trained``, `build_student` says more.

    Raises:
        StudentError: as `build_student` does.
    """
    student = build_student(recipe.student, classes=len(recipe.classes), teacher_width=teacher.width, trained=trained)
    if trained is None and (origin := initial_run(recipe.student)) is not None:
        take_heads(student, origin, recipe, teacher)
    if recipe.scores_by_text:
        student.use_class_vectors(*scoring)
    if recipe.learns_labels:
        student.add_second_head()
    return student


def start_from_run(model: nn.Module, origin: Run, config: StudentConfig) -> None:
    """Load every weight but the head's from a run's student.

    Raises:
        StudentError: it is another model, there is no student yet, its weights are damaged, or they fit another size.
    """
    theirs, mine = origin.recipe.student.model, config.model
    if theirs != mine and architecture(theirs) != architecture(mine):
        raise StudentError(
            f"student.initial names a run whose student is a {theirs}, and this one is to be a {mine}",
            where=origin.folder,
            fix=f"set student.model to {theirs}, or start from a run of {mine}",
        )
    weights, heads = load_student(origin).model.state_dict(), head_names(mine)
    try:
        model.load_state_dict({name: weights[name] for name in weights if not name.startswith(heads)}, strict=False)
    except RuntimeError as error:
        raise StudentError(
            f"the run's student cannot start this one at {size_told(config.image_size)} px: {one_line(error)[:300]}",
            where=origin.folder,
            fix=f"set student.image_size to that of the run, {size_told(origin.recipe.student.image_size)}",
        ) from error


def take_heads(student: Student, origin: Run, recipe: Recipe, teacher: TeacherFacts) -> None:
    """Take a run's projector where the teacher is the same, and its head where the classes are."""
    earlier, before = load_student(origin), origin.recipe
    if origin.teacher_facts.fingerprint == teacher.fingerprint:
        student.projector.load_state_dict(earlier.projector.state_dict())
    if before.classes == recipe.classes and not (before.scores_by_text or recipe.scores_by_text):
        student.model.load_state_dict(earlier.model.state_dict())


def describe_run(origin: Run) -> InitialRun:
    """Return what a card says of the run whose student another one begins with."""
    recipe, facts = origin.recipe, origin.student_facts
    before = facts.initial_run is not None and facts.initial_run.learned_labels
    return InitialRun(
        name=origin.name,
        teacher=recipe.teacher_name,
        classes=recipe.classes,
        images=origin.image_facts.used,
        epoch=student_facts(origin.weights).epoch,
        finished=origin.finished,
        learned_labels=recipe.uses_labels or before,
        initial=facts.initial,
        initial_run=facts.initial_run,
    )


def student_preprocessing(config: StudentConfig) -> Preprocessing:
    """Return how images reach the student: timm's mean, std and interpolation; its crop where it was pretrained.

    One that starts from a run goes on with all of that as the run has it: its weights may have another tag's.
    """
    pretrained_cfg, origin = timm_config(config.model), initial_run(config)
    if origin is not None and origin.card.student is not None:
        known = card_preprocessing(origin)
        return replace(known, image_size=config.image_size, crop=config.crop or known.crop)
    return Preprocessing(
        image_size=config.image_size,
        crop=config.crop or (1.0 if config.initial == "random" else pretrained_cfg.crop_pct),
        interpolation=pretrained_cfg.interpolation,
        mean=tuple(pretrained_cfg.mean),
        std=tuple(pretrained_cfg.std),
    )


def card_preprocessing(run: Run) -> Preprocessing:
    """Return how images reach a run's student, as its card says it."""
    return TypeAdapter(Preprocessing).validate_python(run.student_facts.preprocessing)


def load_student(run: Run) -> Student:
    """Load a run's best student, in evaluation mode.

    Raises:
        StudentError: there are no weights yet, or they are damaged.
    """
    if not run.weights.exists():
        raise StudentError("the run has no student yet", where=run.folder, fix=f"{run.command} goes on with it")
    recipe = run.recipe
    try:
        weights, _ = load_tensors(run.weights)
        blank = torch.zeros(len(recipe.classes), run.teacher_facts.width)
        student = start_student(recipe, run.teacher_facts, (blank, 0.0), trained=run)
        student.load_state_dict(weights)
    except torch.OutOfMemoryError:  # a RuntimeError as well
        raise
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise StudentError(
            f"the student's weights are damaged: {str(error).splitlines()[0]}",
            where=run.weights,
            fix=f"delete it, and {run.command} brings a student back from the run's checkpoint",
        ) from error
    return student.eval()


@torch.inference_mode()
def student_logits(student: Student, batches: Iterable[Batch]) -> NDArray[np.float32]:
    """Return the student's logits [n, C] of the first view of each image."""
    parts = [student(batch.pixels[:, 0].to(student.mean.device)).logits.float().cpu() for batch in batches]
    return torch.cat(parts).numpy()


def student_facts(path: Path) -> BestEpoch:
    """Return what is written in a weights file's header: the epoch it comes from, and its scores."""
    return BestEpoch.model_validate(load_facts(path))


def reparameterised(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with its training-time branches and batch norms fused (RepViT and its kind)."""
    return reparameterize_model(copy.deepcopy(model).eval(), inplace=True)  # type: ignore[no-any-return]


def _feature_width(model: nn.Module, image_size: Size) -> int:
    """Return D_s by running one image, which also shows that the model takes this size and ends in one head."""
    model.eval()
    height, width = sides(image_size)
    image = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(image), pre_logits=True)  # type: ignore[operator]
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            raise ValueError("it gives no pooled features [batch, width]")
        head = model.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Module) or not torch.allclose(head(pooled), model(image), atol=1e-5):
            raise ValueError("its logits are not one head on its pooled features")
    model.train()
    return int(pooled.shape[1])

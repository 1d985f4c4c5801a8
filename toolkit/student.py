"""The student: a timm model with its class head, and a projector into the teacher's feature space for training only."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from prgkit.errors import StudentError, nearest
from prgkit.heads import ClassVectors, OpenVocabulary, TwoHeads, Voted
from prgkit.images import Preprocessing
from prgkit.objectives.sides import StudentSide
from prgkit.recipe import StudentPage
from prgkit.run import Run
from prgkit.tensors import load_facts, load_tensors

if TYPE_CHECKING:
    from prgkit.views import Batch


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
    the votes of two heads where it has a ``second``.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, teacher_width: int) -> None:
        super().__init__(preprocessing)
        self.model = model
        self.preprocessing = preprocessing
        self.width = _feature_width(model, preprocessing.image_size)  # D_s, of the pooled features
        self.projector = nn.Linear(self.width, teacher_width)
        self.scorer: ClassVectors | None = None
        self.second: TwoHeads | None = None
        self.shows_stages = False

    def forward(self, pixels: Tensor) -> StudentSide:
        """Return F = g(h(x)) [B, D] and L = head(h(x)) [B, C] for uint8 pixels [B, S, S, 3]."""
        images, stages = self.images(pixels).contiguous(memory_format=torch.channels_last), []
        if self.shows_stages:
            maps, stages = self.model.forward_intermediates(images)  # type: ignore[operator]
        else:
            maps = self.model.forward_features(images)  # type: ignore[operator]
        pooled = self.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        features = self.projector(pooled)
        if self.scorer is not None:
            return StudentSide(features, self.scorer(features), tuple(stages))
        logits = self.model.get_classifier()(pooled)  # type: ignore[operator]
        if self.second is None:
            return StudentSide(features, logits, tuple(stages))
        heads = (logits, self.second.head(pooled))
        return StudentSide(features, self.second.vote(*heads), tuple(stages), heads)

    def score_by(self, class_vectors: Tensor, logit_scale: float) -> None:
        """Take the teacher's class vectors [C, D] for a head; the timm model's own learns nothing from here on."""
        self.scorer = ClassVectors(class_vectors, logit_scale)
        self.model.get_classifier().requires_grad_(False)  # type: ignore[operator]

    def grow_second_head(self) -> None:
        """Add a head that learns from the teacher, beside the timm model's own, which learns from labels."""
        self.second = TwoHeads(self.width, int(self.model.num_classes))  # type: ignore[arg-type]

    @torch.inference_mode()
    def stage_widths(self) -> tuple[int, ...]:
        """Return the channels that leave each stage.

        Raises:
            StudentError: timm does not know the model's stages.
        """
        size = self.preprocessing.image_size
        image = torch.zeros(1, 3, size, size, device=self.mean.device)
        try:
            maps: list[Tensor] = copy.deepcopy(self.model).eval().forward_intermediates(image)[1]  # type: ignore[operator]
        except (AttributeError, TypeError) as error:
            raise StudentError(
                "timm gives no maps of this model's stages, which the objective asks for",
                where="student.model",
                fix="choose another objective, or a model of the RepViT or EfficientNet family",
            ) from error
        return tuple(one.shape[1] for one in maps)

    def facts(self, page: StudentPage) -> dict[str, Any]:
        """Return what a run's card says of its student; parameters are counted as they are deployed."""
        network = self.deployed().model
        if isinstance(network, OpenVocabulary):
            network.model.reset_classifier(0)  # type: ignore[operator]
        return {
            "model": page.model,
            "initial": page.initial,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "preprocessing": self.preprocessing.to_dict(),
        }

    def deployed(self) -> Deployed:
        """Return what leaves for the device: the same weights, without the projector unless class vectors need it."""
        network = self.model
        if self.scorer is not None:
            network = OpenVocabulary(self.model, self.projector, self.scorer)
        elif self.second is not None:
            network = Voted(self.model, self.second)
        return Deployed(copy.deepcopy(network), self.preprocessing).eval()


class Deployed(Normalised):
    """The student on a device: uint8 pixels [B, S, S, 3] in, float32 class logits [B, C] out."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(preprocessing)
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Return class logits [B, C]."""
        logits: Tensor = self.model(self.images(pixels))
        return logits


def build_student(page: StudentPage, *, classes: int, teacher_width: int) -> Student:
    """Build the timm model with a fresh head for ``classes``, and the projector to ``teacher_width``.

    Raises:
        StudentError: timm has no such model, its weights cannot be had, or it does not give pooled features.
    """
    if not timm.is_model(page.model):
        raise StudentError(
            f"timm has no model {page.model!r}{nearest(page.model, timm.list_models())}",
            where="student.model",
            fix="python -c 'import timm; print(timm.list_models())' lists them all",
        )
    model = _create(page, classes)
    try:
        student = Student(model, student_preprocessing(page), teacher_width)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise StudentError(
            f"{page.model} cannot be a student at {page.image_size} px: {error}",
            where="student",
            fix="choose another image_size, or a model of the RepViT or EfficientNet family",
        ) from error
    return student.to(memory_format=torch.channels_last)


def student_preprocessing(page: StudentPage) -> Preprocessing:
    """Return how images reach the student: timm's mean, std and interpolation; its crop where it was pretrained."""
    config: dict[str, Any] = timm.get_pretrained_cfg(page.model).to_dict()
    crop = page.crop or (1.0 if page.initial == "random" else config["crop_pct"])
    return Preprocessing(
        image_size=page.image_size,
        crop=crop,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def load_student(run: Run) -> Student:
    """Load a run's best student, in evaluation mode.

    Raises:
        StudentError: there are no weights yet, or they are damaged.
    """
    if not run.weights.exists():
        again = f"prgkit distill {run.folder / 'recipe.yaml'} --run {run.folder}"
        raise StudentError("the run has no student yet", where=run.folder, fix=f"{again} goes on with it")
    recipe, card = run.recipe, run.card
    try:
        weights, _ = load_tensors(run.weights)
        # The weights come from the file, so a pretrained start is not fetched again.
        page = recipe.student.model_copy(update={"initial": "random", "crop": card["student"]["preprocessing"]["crop"]})
        width = card["teacher"]["width"]
        student = build_student(page, classes=len(recipe.classes), teacher_width=width)
        if recipe.scores_by_text:
            student.score_by(torch.zeros(len(recipe.classes), width), 0.0)
        if recipe.learns_labels:
            student.grow_second_head()
        student.load_state_dict(weights)
    except (SafetensorError, RuntimeError, ValueError) as error:
        again = f"prgkit distill {run.folder / 'recipe.yaml'} --run {run.folder}"
        raise StudentError(
            f"the student's weights are damaged: {str(error).splitlines()[0]}",
            where=run.weights,
            fix=f"delete it, and {again} brings a student back from the run's checkpoint",
        ) from error
    return student.eval()


@torch.inference_mode()
def student_logits(student: Student, shown: Iterable[Batch]) -> NDArray[np.float32]:
    """Return the student's logits [n, C] of the first view of each image shown."""
    found = [student(batch.pixels[:, 0].to(student.mean.device)).logits.float().cpu() for batch in shown]
    return torch.cat(found).numpy()


def student_facts(path: Path) -> dict[str, Any]:
    """Return what is written in a weights file's header: the epoch it comes from, and its agreement."""
    return load_facts(path)


def reparameterised(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with its training-time branches and batch norms fused (RepViT and its kind)."""
    return reparameterize_model(copy.deepcopy(model).eval(), inplace=True)  # type: ignore[no-any-return]


def _create(page: StudentPage, classes: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": classes}
    if page.model.startswith("repvit"):
        options["distillation"] = False  # one head: the second one is of no use without a CNN teacher
    if page.initial == "pretrained":
        return _pretrained(page.model, options)
    model: nn.Module = timm.create_model(page.model, **options)
    if page.initial != "random":
        _start_from(model, page)
    return model


def _pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    """Fetch timm's weights; the head stays fresh, even where ImageNet's 1000 classes are the student's own."""
    try:
        model: nn.Module = timm.create_model(
            name, **options, pretrained=True, pretrained_cfg_overlay={"num_classes": 0}
        )
    except Exception as error:
        hub = timm.get_pretrained_cfg(name).hf_hub_id
        first_line = (str(error).splitlines() or [""])[0]
        raise StudentError(
            f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: {first_line})",
            where=f"https://huggingface.co/{hub}" if hub else "student.initial",
            fix="download model.safetensors from there and name it as student.initial, or start from initial: random",
        ) from error
    return model


def _start_from(model: nn.Module, page: StudentPage) -> None:
    """Load every weight but the head's from a file of the same timm model."""
    path = Path(os.path.expanduser(page.initial))
    if path.suffix != ".safetensors" or not path.is_file():
        raise StudentError(
            f"there is no weights file {page.initial!r}{nearest(page.initial, ('random', 'pretrained'))}",
            where="student.initial",
            fix="write random, pretrained, or the path of a .safetensors file",
        )
    named = timm.get_pretrained_cfg(page.model).classifier or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    try:
        weights = load_file(path)
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
        found = model.load_state_dict(kept, strict=False)
        strangers = [name for name in found.missing_keys if not name.startswith(heads)]
        strangers += [name for name in found.unexpected_keys if "head_dist" not in name]
        if strangers:
            raise ValueError(f"{len(strangers)} weights are in one of the two only, e.g. {strangers[0]}")
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StudentError(
            f"the file cannot start {page.model}: {reason}",
            where=path,
            fix=f"give the weights of {page.model} as timm saves them",
        ) from error


def _feature_width(model: nn.Module, image_size: int) -> int:
    """Return D_s by running one image, which also shows that the model takes this size and ends in one head."""
    model.eval()
    image = torch.linspace(-1, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(image), pre_logits=True)  # type: ignore[operator]
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            raise ValueError("it gives no pooled features [batch, width]")
        head = model.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Module) or not torch.allclose(head(pooled), model(image), atol=1e-5):
            raise ValueError("its logits are not one head on its pooled features")
    model.train()
    return int(pooled.shape[1])

"""The student: a timm model with its class head, and a projector into the teacher's feature space for training only."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from timm.models import PretrainedCfg, _hub
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from prgkit.config.image_size import Size, sides, size_told
from prgkit.config.sections import StudentConfig
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import StudentError, nearest, one_line
from prgkit.outputs import StudentOutput
from prgkit.storage.run import Run
from prgkit.storage.run_card import StudentFacts
from prgkit.storage.tensors import load_facts, load_tensors
from prgkit.student.heads import ClassVectors, DualHead, DualHeadModel, OpenVocabulary

if TYPE_CHECKING:
    from prgkit.data.augment import Batch


WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # of which the last is .pth.tar's


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
        self.second: DualHead | None = None
        self.shows_stages = False

    def forward(self, pixels: Tensor) -> StudentOutput:
        """Return F = g(h(x)) [B, D] and L = head(h(x)) [B, C] for uint8 pixels [B, S, S, 3]."""
        images, stages = self.images(pixels).contiguous(memory_format=torch.channels_last), []
        if self.shows_stages:
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
        return StudentOutput(features, self.second.vote(*heads), tuple(stages), heads)

    def score_by(self, class_vectors: Tensor, logit_scale: float) -> None:
        """Take the teacher's class vectors [C, D] for a head; the timm model's own learns nothing from here on."""
        self.scorer = ClassVectors(class_vectors, logit_scale)
        self.model.get_classifier().requires_grad_(False)  # type: ignore[operator]

    def grow_second_head(self) -> None:
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
        return tuple(one.shape[1] for one in maps)

    def facts(self, config: StudentConfig) -> StudentFacts:
        """Return what a run's card says of its student; parameters are counted as they are deployed."""
        network = self.deployed().model
        if isinstance(network, OpenVocabulary):
            network.model.reset_classifier(0)  # type: ignore[operator]
        return StudentFacts(
            model=config.model,
            initial=config.initial,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            preprocessing=self.preprocessing.to_dict(),
        )

    def deployed(self) -> Deployed:
        """Return what leaves for the device: the same weights, without the projector unless class vectors need it."""
        network = self.model
        if self.scorer is not None:
            network = OpenVocabulary(self.model, self.projector, self.scorer)
        elif self.second is not None:
            network = DualHeadModel(self.model, self.second)
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


def build_student(config: StudentConfig, *, classes: int, teacher_width: int) -> Student:
    """Build the timm model with a fresh head for ``classes``, and the projector to ``teacher_width``.

    Raises:
        StudentError: timm has no such model, its weights cannot be had, or it does not give pooled features.
    """
    preprocessing = student_preprocessing(config)
    model = _create(config, classes)
    try:
        student = Student(model, preprocessing, teacher_width)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise StudentError(
            f"{config.model} cannot be a student at {size_told(config.image_size)} px: {error}",
            where="student",
            fix="choose another image_size, or a model of the RepViT or EfficientNet family",
        ) from error
    return student.to(memory_format=torch.channels_last)


def student_preprocessing(config: StudentConfig) -> Preprocessing:
    """Return how images reach the student: timm's mean, std and interpolation; its crop where it was pretrained."""
    pretrained_cfg = timm_config(config.model)
    crop = config.crop or (1.0 if config.initial == "random" else pretrained_cfg["crop_pct"])
    return Preprocessing(
        image_size=config.image_size,
        crop=crop,
        interpolation=pretrained_cfg["interpolation"],
        mean=tuple(pretrained_cfg["mean"]),
        std=tuple(pretrained_cfg["std"]),
    )


@cache
def timm_config(name: str) -> dict[str, Any]:
    """Return what timm knows of a model: how its images are prepared, its head's name, and where its weights lie.

    Raises:
        StudentError: timm has no such model or no such weights of it, or its configuration cannot be had.
    """
    source, _, place = name.partition(":")
    if place:
        return _config_of_files(name, source, place)
    if not timm.is_model(name):
        hub = f"; a model of the hub is hf-hub:{name}" if "/" in name else nearest(name, timm.list_models())
        raise StudentError(
            f"timm has no model {name!r}{hub}",
            where="student.model",
            fix="python -c 'import timm; print(timm.list_models())' lists them all",
        )
    try:
        return (timm.get_pretrained_cfg(name) or PretrainedCfg()).to_dict()  # type: ignore[no-any-return]
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        raise StudentError(
            f"timm has no weights {tag!r} of {architecture}{nearest(name, tagged)}",
            where="student.model",
            fix=f"choose {', '.join(tagged[:5]) or architecture}, or leave the tag out",
        ) from error


def _config_of_files(name: str, source: str, place: str) -> dict[str, Any]:
    """Return the configuration of a model on the hub, or in a folder as timm saves one for the hub."""
    readers = {
        "hf-hub": _hub.load_model_config_from_hf,
        "hf_hub": _hub.load_model_config_from_hf,
        "local-dir": _hub.load_model_config_from_path,
    }
    if source not in readers:
        raise StudentError(
            f"there is no place {source!r} for a model{nearest(source, readers)}",
            where="student.model",
            fix="write a name of timm.list_models(), hf-hub:timm/NAME, or local-dir:FOLDER",
        )
    try:
        config, architecture, _ = readers[source](place)
        if not timm.is_model(architecture):
            raise ValueError(f"timm has no model {architecture!r}")
        return PretrainedCfg(**{**config, "architecture": architecture}).to_dict()  # type: ignore[no-any-return]
    except Exception as error:
        raise StudentError(
            f"the configuration of {name} cannot be had ({type(error).__name__}: {one_line(error)[:200]})",
            where=place if source == "local-dir" else f"https://huggingface.co/{place}",
            fix="name a model in timm's own form: config.json with its architecture, and model.safetensors; "
            "where there is no network, download both into a folder, and name that: local-dir:FOLDER",
        ) from error


def load_student(run: Run) -> Student:
    """Load a run's best student, in evaluation mode.

    Raises:
        StudentError: there are no weights yet, or they are damaged.
    """
    if not run.weights.exists():
        again = f"prgkit distill {run.folder / 'recipe.yaml'} --run {run.folder}"
        raise StudentError("the run has no student yet", where=run.folder, fix=f"{again} goes on with it")
    recipe = run.recipe
    try:
        weights, _ = load_tensors(run.weights)
        # The weights come from the file, so a pretrained start is not fetched again.
        crop = run.student_facts.preprocessing["crop"]
        config = recipe.student.model_copy(update={"initial": "random", "crop": crop})
        width = run.teacher_facts.width
        student = build_student(config, classes=len(recipe.classes), teacher_width=width)
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


def _create(config: StudentConfig, classes: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": classes}
    if timm_config(config.model).get("architecture", config.model).startswith("repvit"):
        options["distillation"] = False  # one head: the second one is of no use without a CNN teacher
    if config.initial == "pretrained":
        return _pretrained(config.model, options)
    model: nn.Module = timm.create_model(config.model, **options)
    if config.initial != "random":
        _start_from(model, config)
    return model


def _pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    """Fetch timm's weights; the head stays fresh, even where ImageNet's 1000 classes are the student's own."""
    overlay = {"num_classes": 0}
    try:
        model: nn.Module = timm.create_model(name, **options, pretrained=True, pretrained_cfg_overlay=overlay)
        if ":" in name:  # timm leaves at random what somebody's file does not hold, and a second time other values
            with torch.random.fork_rng([]):
                torch.manual_seed(torch.initial_seed() + 1)
                again = timm.create_model(name, **options, pretrained=True, pretrained_cfg_overlay=overlay)
            _require_equal(model, again, _heads(name))
    except Exception as error:
        hub = timm_config(name).get("hf_hub_id")
        raise StudentError(
            f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: {one_line(error)[:300]})",
            where=f"https://huggingface.co/{hub}" if hub else "student.initial",
            fix="download model.safetensors from there and name it as student.initial, or start from initial: random",
        ) from error
    return model


def _heads(name: str) -> tuple[str, ...]:
    """Return the names of a timm model's heads."""
    named = timm_config(name).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _require_equal(model: nn.Module, again: nn.Module, heads: tuple[str, ...]) -> None:
    other = again.state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    if strangers := [name for name, tensor in kept.items() if not torch.equal(tensor, other[name])]:
        raise ValueError(f"{len(strangers)} weights are not in the file, e.g. {strangers[0]}")


def _start_from(model: nn.Module, config: StudentConfig) -> None:
    """Load every weight but the head's from a file of the same timm model."""
    path, heads = Path(os.path.expanduser(config.initial)), _heads(config.model)
    _require_weights(path, config.initial)
    try:
        weights = _read_weights(path, model.state_dict().keys())
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
        found = model.load_state_dict(kept, strict=False)
        strangers = [name for name in found.missing_keys if not name.startswith(heads)]
        strangers += [name for name in found.unexpected_keys if "head_dist" not in name]
        if strangers:
            raise ValueError(f"{len(strangers)} weights are in one of the two only, e.g. {strangers[0]}")
        if broken := [name for name, tensor in kept.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{len(broken)} of its weights hold values that are no numbers, e.g. {broken[0]}")
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise StudentError(
            f"the file cannot start {config.model}: {one_line(error)[:300]}",
            where=path,
            fix=f"give the weights of {config.model} as timm saves them",
        ) from error


def _require_weights(path: Path, given: str) -> None:
    """Refuse what is no file of weights by its name, or is not there."""
    fix = f"write random, pretrained, or the path of a weights file ({', '.join(WEIGHTS_SUFFIXES)})"
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
        holds = f", which holds {', '.join(inside[:5])}" if inside else ""
        raise StudentError(f"student.initial names a folder{holds}: {given}", where="student.initial", fix=fix)
    if not path.is_file():
        raise StudentError(
            f"there is no weights file {given!r}{nearest(given, ('random', 'pretrained'))}",
            where="student.initial",
            fix=fix,
        )
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise StudentError(f"{path.name} is no weights file by its name", where=path, fix=fix)


def _read_weights(path: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """Return a file's weights by the model's own names, whatever they are wrapped in; no pickle's code is run.

    Raises:
        ValueError: it holds anything but tensors by name.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training keeps its arguments in one
            state: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
        wrapped = state.get("model_state_dict", state)  # as PyTorch's tutorial saves it
        state = wrapped if isinstance(wrapped, dict) else state
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise ValueError(
            "it is damaged, or holds more than tensors, and what else it holds could run code when it is opened"
        ) from error
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("it holds no tensors by name")
    # Lightning's checkpoints, and our own students, have the network as a part: model.conv1.weight.
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    return inner if len(inner.keys() & wanted) > len(state.keys() & wanted) else state


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

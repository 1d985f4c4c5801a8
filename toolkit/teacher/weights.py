"""The files a teacher is made of: checked before anything is loaded, fetched where they are missing, loaded whole."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from prgkit import demo
from prgkit.config.sections import RANDOM, TeacherConfig, Views
from prgkit.device import best_device, teacher_precision
from prgkit.errors import PrgkitError, TeacherError, nearest, one_line, some
from prgkit.progress import silent
from prgkit.storage.atomic import fingerprint, read_sealed, sha256

# The names under which open_clip looks for a folder's weights, the first it finds before the others.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
NAMED_BY = "prgkit.targets/2"  # in a store's name, which runs know: it outlives the store's form
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DECIDING_SUFFIXES = (".json", ".txt", ".model")  # a configuration, and what a tokenizer knows


def check_teacher(config: TeacherConfig, *, note: Callable[[str], None] = silent) -> None:
    """Refuse a name, a tag or a folder that no teacher can be loaded from, without loading it.

    ``note`` is told where other files in a folder may be its weights as well.
    """
    if config.weights == RANDOM:
        local_folder(config.model)
        if ":" not in config.model:
            _check_model(config.model)
    elif (folder := local_folder(config.model)) is not None:
        chosen = weights_file(folder, config.weights)
        others = [path.name for path in weights_files(folder) if path.name not in (chosen.name, *WEIGHTS)]
        if others and config.weights != chosen.name:
            beside = f"and not {some(others)} beside it: teacher.weights names another"
            note(f"the teacher is {chosen.name} of {folder}, {beside}")
    elif not config.model.startswith("hf-hub:"):
        _check_names(config.model, config.weights)


def teacher_identity(config: TeacherConfig) -> dict[str, JsonValue]:
    """Return what decides the teacher's features, without loading it: names, and the content of local files."""
    identity: dict[str, JsonValue] = {"precision": config.precision, "batch_size": config.batch_size}
    folder = local_folder(config.model)
    if folder is not None:
        deciding = [path for path in folder.iterdir() if path.suffix in DECIDING_SUFFIXES and path.is_file()]
        if config.weights == RANDOM:
            identity["weights"] = RANDOM
        else:
            deciding.append(weights_file(folder, config.weights))
        return {**identity, "files": {path.name: sha256(path) for path in sorted({*deciding})}}
    return {**identity, "model": config.model, "weights": config.weights}


def weights_identity(identity: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return what tells teachers apart: their files, and not how they compute."""
    return {key: value for key, value in identity.items() if key not in ("precision", "batch_size")}


def views_identity(views: Views) -> dict[str, JsonValue]:
    """Return what decides which crops a view is, and not how many there are."""
    return views.model_dump(mode="json", exclude={"count", "mixed"}, exclude_none=True)


def name_of(made_from: dict[str, JsonValue]) -> str:
    """Return the name of the folder of the store that is made from this."""
    return fingerprint({**made_from, "schema": NAMED_BY})


def as_stored(config: TeacherConfig, views: Views, root: Path, stores: Iterable[str] = ("*",)) -> TeacherConfig | None:
    """Return a configuration with the precision and batch size of a store that is there, where it leaves them open.

    Of several stores, all or those of these names, this device's precision goes before the other, and a larger batch
    before a smaller one.
    """
    if config.precision != "auto" and config.batch_size is not None:
        return config
    weights, found = weights_identity(teacher_identity(config)), []
    for card in (card for name in stores for card in root.glob(f"{name}/card.json")):
        with suppress(PrgkitError):  # one that is damaged is named where it is opened
            made_from = read_sealed(card)
            teacher: Any = made_from.get("teacher", {})
            if made_from.get("views") == views_identity(views) and weights_identity(teacher) == weights:
                found.append(settled(config, teacher["precision"], teacher["batch_size"]))
    fitting = [
        one
        for one in found
        if config.precision in ("auto", one.precision) and config.batch_size in (None, one.batch_size)
    ]
    own = teacher_precision(best_device())
    return max(fitting, key=lambda one: (one.precision == own, one.batch_size or 0), default=None)


def settled(config: TeacherConfig, precision: str, batch_size: int) -> TeacherConfig:
    """Return a teacher's configuration with the precision and the batch size that were chosen for it."""
    return config.model_copy(update={"precision": precision, "batch_size": batch_size})


def local_folder(model: str) -> Path | None:
    """Return the folder of a teacher that lies on this machine: the demo's own, or ``local-dir:PATH``."""
    if model == "demo:digits":
        return Path(demo.__file__).with_name("teacher")
    if not model.startswith("local-dir:"):
        return None
    folder = Path(os.path.expanduser(model.removeprefix("local-dir:")))
    if not (folder / "open_clip_config.json").is_file():
        raise TeacherError(
            "the teacher's folder holds no open_clip_config.json" if folder.is_dir() else "there is no such folder",
            where=folder,
            fix=f"teacher.model is local-dir:PATH of a folder with that file and {WEIGHTS[0]}",
        )
    return folder


def weights_file(folder: Path, named: str | None) -> Path:
    """Return the one file of a folder that holds the teacher's weights: the one ``named``, or the only one there.

    A tag is no file: it may be left from the named model whose place the folder takes, and says nothing here.
    """
    candidates = weights_files(folder)
    names = [path.name for path in candidates]
    if named and not _is_tag(named):
        if named in names:
            return folder / named
        raise TeacherError(
            f"the teacher's folder holds no weights {named}{nearest(named, names)}",
            where=folder,
            fix=f"teacher.weights names a file in it: one of {', '.join(names)}" if names else "put the file into it",
        )
    usual = [folder / name for name in WEIGHTS if name in names]
    if usual or len(candidates) == 1:
        return (usual or candidates)[0]
    if candidates:
        raise TeacherError(
            f"the teacher's folder holds {len(candidates)} files that may be its weights: {', '.join(names)}",
            where=folder,
            fix=f"name one: teacher: {{model: 'local-dir:{folder}', weights: {names[-1]}}}",
        )
    raise TeacherError(
        "the teacher's folder holds a configuration and no weights",
        where=folder,
        fix=f"put {WEIGHTS[0]} or a checkpoint of open_clip's training ({', '.join(WEIGHTS_SUFFIXES)}) into it",
    )


def weights_files(folder: Path) -> list[Path]:
    """Return every file of a folder that may hold weights."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS_SUFFIXES and path.is_file())


def _is_tag(weights: str) -> bool:
    import open_clip

    return any(weights == tag for _, tag in open_clip.list_pretrained())


def fetch_weights(name: str, tag: str | None) -> Path:
    """Return the weights of a named model, or of a repository of the hub, fetched where they are not at hand."""
    from open_clip import get_pretrained_cfg, pretrained

    if name.startswith("hf-hub:"):
        return Path(pretrained.download_pretrained_from_hf(name.removeprefix("hf-hub:")))
    return Path(pretrained.download_pretrained(get_pretrained_cfg(name, tag)))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load ``path`` into the model, as open_clip does, and make certain that every weight is the file's.

    A model begins with random weights, and open_clip goes on with them where it finds no others. So they are taken
    away first: what a file leaves out is no number afterwards.
    """
    import open_clip

    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for tensor in state.values():
        tensor.fill_(torch.nan)
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:
        # Where a model has no bias of its logits, open_clip stumbles over a file's.
        stranger = _strangers(model, path) if isinstance(error, AttributeError) else ""
        raise _files_error(path.parent, f"{path.name}: {stranger or _why_not_read(error)}", path.name) from error
    if lost := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        reason = f"{len(lost)} of its tensors are missing or hold values that are no numbers, e.g. {lost[0]}"
        raise _files_error(path.parent, f"{path.name}: {reason}", path.name)


def _strangers(model: torch.nn.Module, path: Path) -> str:
    """Say which tensors of a file the model has no place for; nothing where there is none, or it cannot be read."""
    from open_clip.factory import load_state_dict

    try:
        names = load_state_dict(str(path), weights_only=True).keys() - model.state_dict().keys()
    except Exception:  # the caller says what is wrong with the file
        return ""
    return f"the model has no place for {len(names)} of its tensors, e.g. {min(names)}" if names else ""


def _files_error(folder: Path, reason: str, weights: str) -> TeacherError:
    return TeacherError(
        f"the teacher's files cannot be loaded ({reason})",
        where=folder,
        fix=f"copy open_clip_config.json and {weights} again: damaged, or of two models",
    )


def _why_not_read(error: Exception) -> str:
    """Put into words why a file's weights cannot be loaded; PyTorch's own words are an invitation to run its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors, and what else it holds could run code when it is opened"
    if isinstance(error, StopIteration):
        return "it holds no tensors"
    if isinstance(error, AttributeError | KeyError | TypeError):
        return f"it holds no state dict of tensors by name ({one_line(error)})"
    return f"{type(error).__name__}: {one_line(error)[:400]}"


def _check_model(model: str) -> None:
    import open_clip

    if model not in open_clip.list_models():
        raise TeacherError(
            f"open_clip has no model {model!r}{nearest(model, open_clip.list_models())}",
            where="teacher.model",
            fix="choose a name of open_clip.list_models(), hf-hub:OWNER/NAME, or local-dir:PATH",
        )


def _check_names(model: str, weights: str | None) -> None:
    import open_clip

    _check_model(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None:
        raise TeacherError(
            f"teacher.weights is missing for {model}",
            where="teacher.weights",
            fix=f"choose one of {', '.join(tags)}",
        )
    if weights not in tags:
        # A file alone would lose what its tag knows: the activation (QuickGELU), mean, std and the kind of resize.
        raise TeacherError(
            f"{model} has no weights {weights!r}{nearest(weights, tags)}",
            where="teacher.weights",
            fix=f"choose one of {', '.join(tags)}, or put a file of your own beside an open_clip_config.json and name "
            "the folder: teacher: {model: 'local-dir:FOLDER'}",
        )


def trained_with_quick_gelu(model: str, weights: str | None) -> bool:
    """Return whether weights want the activation of OpenAI's own models, which open_clip 3 does not choose by itself.

    A folder, or a repository of the hub, says it in its configuration.
    """
    import open_clip

    return ":" not in model and bool(open_clip.get_pretrained_cfg(model, weights or "").get("quick_gelu"))


def load_error(config: TeacherConfig, folder: Path | None, error: Exception) -> TeacherError:
    """Say which file could not be had, from where, and how to point at a local copy."""
    import open_clip

    first_line = (str(error).splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    if folder is not None:
        return _files_error(folder, reason, weights_file(folder, config.weights).name)
    hub = config.model.removeprefix("hf-hub:")
    if hub == config.model:
        source = open_clip.get_pretrained_cfg(config.model, config.weights or "")
        hub = (source.get("hf_hub") or "").strip("/")
        if not hub:
            return TeacherError(
                f"the weights {config.weights!r} of {config.model} could not be fetched ({reason})",
                where=source.get("url"),
                fix="run where there is a network, or copy open_clip's cache folder from a machine that has one",
            )
    return TeacherError(
        f"open_clip_model.safetensors of {config.model} could not be fetched ({reason})",
        where=f"https://huggingface.co/{hub}",
        fix="download it and open_clip_config.json from there into a folder, and name that: "
        "teacher: {model: 'local-dir:FOLDER'}",
    )

"""The timm model that becomes a student: its configuration, and the weights that it starts from."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, _hub
from torch import Tensor, nn

from prgkit.config.sections import StudentConfig
from prgkit.errors import StudentError, nearest, one_line

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # of which the last is .pth.tar's


@cache
def timm_config(name: str) -> PretrainedCfg:
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
        return timm.get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        raise StudentError(
            f"timm has no weights {tag!r} of {architecture}{nearest(name, tagged)}",
            where="student.model",
            fix=f"choose {', '.join(tagged[:5]) or architecture}, or leave the tag out",
        ) from error


def _config_of_files(name: str, source: str, place: str) -> PretrainedCfg:
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
        return PretrainedCfg(**{**config, "architecture": architecture})
    except Exception as error:
        raise StudentError(
            f"the configuration of {name} cannot be had ({type(error).__name__}: {one_line(error)[:200]})",
            where=place if source == "local-dir" else f"https://huggingface.co/{place}",
            fix="name a model in timm's own form: config.json with its architecture, and model.safetensors; "
            "where there is no network, download both into a folder, and name that: local-dir:FOLDER",
        ) from error


def create_timm_model(config: StudentConfig, classes: int) -> nn.Module:
    """Create the timm model with a fresh head for ``classes`` and the weights that it starts from."""
    options: dict[str, Any] = {"num_classes": classes}
    if (timm_config(config.model).architecture or config.model).startswith("repvit"):
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
            _require_equal(model, again, head_names(name))
    except Exception as error:
        hub = timm_config(name).hf_hub_id
        raise StudentError(
            f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: {one_line(error)[:300]})",
            where=f"https://huggingface.co/{hub}" if hub else "student.initial",
            fix="download model.safetensors from there and name it as student.initial, or start from initial: random",
        ) from error
    return model


def head_names(name: str) -> tuple[str, ...]:
    """Return the names of a timm model's heads."""
    named = timm_config(name).classifier or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _require_equal(model: nn.Module, again: nn.Module, heads: tuple[str, ...]) -> None:
    other = again.state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    if strangers := [name for name, tensor in kept.items() if not torch.equal(tensor, other[name])]:
        raise ValueError(f"{len(strangers)} weights are not in the file, e.g. {strangers[0]}")


def architecture(name: str) -> str:
    """Return a model's name without the tag of its weights, wherever it lies."""
    return (timm_config(name).architecture or name).partition(".")[0]


def _start_from(model: nn.Module, config: StudentConfig) -> None:
    """Load every weight but the head's from a file of the same timm model."""
    path, heads = Path(os.path.expanduser(config.initial)), head_names(config.model)
    _require_weights(path, config.initial)
    try:
        weights = _read_weights(path, model.state_dict().keys())
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
        keys = model.load_state_dict(kept, strict=False)
        strangers = [name for name in keys.missing_keys if not name.startswith(heads)]
        strangers += [name for name in keys.unexpected_keys if "head_dist" not in name]
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
    fix = (
        f"write random, pretrained, the folder of a run, or the path of a weights file ({', '.join(WEIGHTS_SUFFIXES)})"
    )
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

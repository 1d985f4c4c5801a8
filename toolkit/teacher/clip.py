"""The teacher: any open_clip model behind two methods, embed_images and embed_prompts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prgkit import demo
from prgkit.config.image_size import sides, size_of
from prgkit.config.sections import TeacherConfig
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import TeacherError, nearest, one_line, some
from prgkit.progress import silent
from prgkit.storage.atomic import sha256

TEXTS_AT_ONCE = 128  # whose activations are kept for a gradient
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
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DECIDING_SUFFIXES = (".json", ".txt", ".model")  # a configuration, and what a tokenizer knows


@dataclass(frozen=True)
class Sentences:
    """Tokenised prompts, all of which begin with the same words; embeddings can take the places of these."""

    tokens: Tensor  # [C, length], on the teacher's device
    start: int  # of the words; before them stands the token that starts a text, if the tokenizer has one
    count: int  # of the words' tokens


class Teacher:
    """A frozen open_clip model, CLIP or SigLIP."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, config: TeacherConfig) -> None:
        import open_clip

        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self.batch_size = config.batch_size
        self.autocast_to_bf16 = config.precision == "bf16"
        # Both families are scored alike: SigLIP's logit bias is one constant, and drops out of argmax and softmax.
        self.logit_scale = float(model.logit_scale.exp())
        self.preprocessing = _preprocessing(open_clip.get_model_preprocess_cfg(model))
        self.width = int(self.embed_images(torch.zeros(1, *self.shape, dtype=torch.uint8)).shape[1])

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed uint8 pixels [B, S, S, 3] as unit vectors [B, D] (METHOD: I), on the teacher's device."""
        mean = torch.tensor(self.preprocessing.mean, device=self.device) * 255
        std = torch.tensor(self.preprocessing.std, device=self.device) * 255
        images = ((pixels.to(self.device).float() - mean) / std).permute(0, 3, 1, 2)
        with self._autocast():
            features = self.model.encode_image(images)
        return torch.nn.functional.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Embed prompts[template][class] as unit vectors [M, C, D] (METHOD: T), one per template, not averaged."""
        embedded = []
        for of_template in prompts:
            chunks = [of_template[start : start + 256] for start in range(0, len(of_template), 256)]
            tokens = [self.tokenizer(list(chunk)).to(self.device) for chunk in chunks]
            with self._autocast():
                features = torch.cat([self.model.encode_text(chunk).float() for chunk in tokens])
            embedded.append(torch.nn.functional.normalize(features, dim=-1))
        return torch.stack(embedded)

    def proofread(self, prompts: Sequence[Sequence[str]], classes: Sequence[str]) -> str:
        """Return what is to be said of ``classes`` whose names lose their end in prompts[template][class], or "".

        Raises:
            TeacherError: two classes are one to the teacher: in every template it reads the same tokens of both.
        """
        most, unread, first = self.tokenizer([""]).shape[1], dict[int, str](), dict[bytes, int]()
        readings = [hashlib.blake2b(digest_size=16) for _ in classes]
        for texts in prompts:
            tokens = self.tokenizer(list(texts))
            for reading, row in zip(readings, tokens.numpy(), strict=True):
                reading.update(row.tobytes())
            for place in self._too_long(texts, tokens):
                unread.setdefault(place, self._unread(texts[place]))
        for place, reading in enumerate(readings):
            twin = first.setdefault(reading.digest(), place)
            if twin != place:
                raise _read_as_one([(classes[one], unread.get(one)) for one in (twin, place)], most)
        # A sentence may end in words of its template's; only the end of a name is worth a line.
        lost = [place for place, end in unread.items() if any(character.isalnum() for character in end)]
        if not lost:
            return ""
        count = "a class name is" if len(lost) == 1 else f"{len(lost)} class names are"
        told = f"it does not read {_in_short(unread[lost[0]])} of {_in_short(classes[lost[0]])}"
        return f"{count} longer than the {most} tokens that the teacher reads: {told}"

    def _too_long(self, texts: Sequence[str], tokens: Tensor) -> list[int]:
        """Return the places of those texts whose tokens [n, most] leave something out."""
        most = tokens.shape[1]
        padding = self.tokenizer([""], context_length=most)[0].mode().values
        full = [int(place) for place in ((tokens == padding).sum(dim=1) <= 1).nonzero()[:, 0]]
        if not full:
            return []
        longer = self.tokenizer([texts[place] for place in full], context_length=most + 1)
        grown = (longer != padding).sum(dim=1) > (tokens[full] != padding).sum(dim=1)
        return [place for place, more in zip(full, grown.tolist(), strict=True) if more]

    def _unread(self, text: str) -> str:
        """Return the end of a text that is too long, from about where the teacher stops reading."""
        low, high = 0, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            start = [text[:middle]]
            low, high = (low, middle) if self._too_long(start, self.tokenizer(start)) else (middle, high)
        return text[low:]

    @torch.inference_mode()
    def embed_with_context(self, prompts: Sequence[Sequence[str]], words: str, vectors: Tensor) -> Tensor:
        """Embed prompts as `embed_prompts` does, with ``vectors`` [n, token width] where ``words`` stand: [M, C, D]."""
        here = vectors.to(self.device)
        return torch.stack([self.embed_sentences(self.sentences(texts, words), here) for texts in prompts])

    def sentences(self, prompts: Sequence[str], words: str) -> Sentences:
        """Tokenise ``prompts`` [C] that begin with ``words``.

        Raises:
            TeacherError: a prompt is longer than the teacher reads, and would lose its end.
        """
        whole = self.tokenizer(list(prompts))
        most = whole.shape[1]
        if too_long := self._too_long(prompts, whole):
            raise TeacherError(
                f"the prompt {prompts[too_long[0]]!r} is longer than the {most} tokens that the teacher reads",
                where="data.classes",
                fix="shorten that class name",
            )
        empty, alone, longer = self.tokenizer(["", words, f"{words} x"], context_length=most + 1)
        start, end = (int((one != alone).nonzero()[0]) for one in (empty, longer))
        return Sentences(whole.to(self.device), start, end - start)

    def embed_words(self, sentences: Sentences) -> Tensor:
        """Return the token embeddings [n, token width] of the words that the sentences begin with."""
        tokens = sentences.tokens[0, sentences.start : sentences.start + sentences.count]
        return self._token_embedding().weight[tokens].float()

    def embed_sentences(self, sentences: Sentences, vectors: Tensor) -> Tensor:
        """Embed sentences as unit vectors [C, D], ``vectors`` [n, token width] in the words' places.

        A gradient reaches the vectors; what it needs of more than TEXTS_AT_ONCE sentences is computed again for it.
        """

        def embed(tokens: Tensor, vectors: Tensor) -> Tensor:
            with self._autocast(), self._standing_in(sentences, vectors):
                features: Tensor = self.model.encode_text(tokens)
            return features.float()

        tokens = sentences.tokens
        chunks = [tokens[start : start + TEXTS_AT_ONCE] for start in range(0, len(tokens), TEXTS_AT_ONCE)]
        if torch.is_grad_enabled() and len(chunks) > 1:
            features = [checkpoint(embed, chunk, vectors, use_reentrant=False) for chunk in chunks]
        else:
            features = [embed(chunk, vectors) for chunk in chunks]
        return torch.nn.functional.normalize(torch.cat(features), dim=-1)

    @contextlib.contextmanager
    def _standing_in(self, sentences: Sentences, vectors: Tensor) -> Iterator[None]:
        """Put ``vectors`` where the words' embeddings would be; mask, positions and pooling stay open_clip's own."""

        def insert(_module: Any, _arguments: Any, embedded: Tensor) -> Tensor:
            before, after = embedded[:, : sentences.start], embedded[:, sentences.start + sentences.count :]
            return torch.cat([before, vectors.to(embedded.dtype).expand(len(embedded), -1, -1), after], dim=1)

        hook = self._token_embedding().register_forward_hook(insert)
        try:
            yield
        finally:
            hook.remove()

    def _token_embedding(self) -> torch.nn.Embedding:
        """Return the layer that embeds tokens: CLIP has it itself, models with a text tower of their own in that."""
        for tower in (self.model, getattr(self.model, "text", None)):
            if isinstance(found := getattr(tower, "token_embedding", None), torch.nn.Embedding):
                return found
        raise TeacherError(
            "the teacher's text tower takes no learned context: it is none of open_clip's own",
            where="teacher.model",
            fix="choose a CLIP or SigLIP model, or go without a context",
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the pixels of one image as it is shown to the teacher: (H, W, 3)."""
        return (*sides(self.preprocessing.image_size), 3)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast_to_bf16)


def load_teacher(config: TeacherConfig, device: torch.device) -> Teacher:
    """Load an open_clip model with its weights and its tokenizer.

    Raises:
        TeacherError: the model or its weights are unknown, damaged, or cannot be fetched.
    """
    import open_clip

    check_teacher(config)
    folder = _local_folder(config.model)
    name = f"local-dir:{folder}" if folder else config.model
    tag = None if ":" in name else config.weights
    try:
        with _quiet():
            model = open_clip.create_model(
                name,
                pretrained=tag,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=_trained_with_quick_gelu(name, tag),
            )
            _load_weights(model, _weights_file(folder, config.weights) if folder else _fetched(name, tag))
            tokenizer = open_clip.get_tokenizer(name)
    except TeacherError:
        raise
    except Exception as error:
        raise _load_error(config, folder, error) from error
    return Teacher(model, tokenizer, device, config)


def check_teacher(config: TeacherConfig, *, note: Callable[[str], None] = silent) -> None:
    """Refuse a name, a tag or a folder that no teacher can be loaded from, without loading it.

    ``note`` is told where other files in a folder may be its weights as well.
    """
    if (folder := _local_folder(config.model)) is not None:
        chosen = _weights_file(folder, config.weights)
        others = [path.name for path in _weights_files(folder) if path.name not in (chosen.name, *WEIGHTS)]
        if others and config.weights != chosen.name:
            beside = f"and not {some(others)} beside it: teacher.weights names another"
            note(f"the teacher is {chosen.name} of {folder}, {beside}")
    elif not config.model.startswith("hf-hub:"):
        _check_names(config.model, config.weights)


def _read_as_one(twins: Sequence[tuple[str, str | None]], most: int) -> TeacherError:
    """Build the error for two classes, given with the ends that are not read of them."""
    names = " and ".join(_in_short(name) for name, _ in twins)
    ends = " and ".join(_in_short(end) for _, end in twins if end)
    unread = f": it reads {most} tokens, and not {ends}" if ends else ""
    return TeacherError(
        f"the teacher reads {names} as one and the same{unread}",
        where="data.classes",
        fix="shorten these names, or begin them with what tells them apart"
        if ends
        else "write them so that they differ in more than case, punctuation or letters that the teacher does not know",
    )


def _in_short(text: str) -> str:
    return repr(text if len(text) <= 70 else f"{text[:40]} ... {text[-25:]}")


def teacher_identity(config: TeacherConfig) -> dict[str, Any]:
    """Return what decides the teacher's features, without loading it: names, and the content of local files."""
    identity: dict[str, Any] = {"precision": config.precision, "batch_size": config.batch_size}
    folder = _local_folder(config.model)
    if folder is not None:
        deciding = [path for path in folder.iterdir() if path.suffix in DECIDING_SUFFIXES and path.is_file()]
        files = sorted({*deciding, _weights_file(folder, config.weights)})
        return {**identity, "files": {path.name: sha256(path) for path in files}}
    return {**identity, "model": config.model, "weights": config.weights}


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Translate open_clip's preprocessing: ``shortest`` crops the middle, ``squash`` keeps it all out of shape."""
    size, squash = size_of(config["size"]), config["resize_mode"] == "squash"
    if config["resize_mode"] == "longest":
        raise TeacherError("the teacher letterboxes its images (resize_mode longest), which is not supported")
    # What is random in training is bicubic afterwards; so is, whatever is said, open_clip's way to what is not square.
    bicubic = config["interpolation"] == "random" or not (squash or isinstance(size, int))
    mean, std = (_of_channels(config[key]) for key in ("mean", "std"))
    return Preprocessing(size, 1.0, "bicubic" if bicubic else config["interpolation"], mean, std, squash)


def _of_channels(value: Any) -> tuple[float, float, float]:
    """Return three numbers, one a channel; a configuration may give one for all."""
    red, green, blue = value if isinstance(value, list | tuple) else (value, value, value)
    if max(red, green, blue) > 1:
        raise TeacherError(
            f"the teacher's preprocess_cfg has a mean or std of {value}, and pictures go from 0 to 1",
            where="open_clip_config.json",
            fix="divide it by 255",
        )
    return float(red), float(green), float(blue)


def _local_folder(model: str) -> Path | None:
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


def _weights_file(folder: Path, named: str | None) -> Path:
    """Return the one file of a folder that holds the teacher's weights: the one ``named``, or the only one there.

    A tag is no file: it may be left from the named model whose place the folder takes, and says nothing here.
    """
    found = _weights_files(folder)
    names = [path.name for path in found]
    if named and not _is_tag(named):
        if named in names:
            return folder / named
        raise TeacherError(
            f"the teacher's folder holds no weights {named}{nearest(named, names)}",
            where=folder,
            fix=f"teacher.weights names a file in it: one of {', '.join(names)}" if names else "put the file into it",
        )
    usual = [folder / name for name in WEIGHTS if name in names]
    if usual or len(found) == 1:
        return (usual or found)[0]
    if found:
        raise TeacherError(
            f"the teacher's folder holds {len(found)} files that may be its weights: {', '.join(names)}",
            where=folder,
            fix=f"name one: teacher: {{model: 'local-dir:{folder}', weights: {names[-1]}}}",
        )
    raise TeacherError(
        "the teacher's folder holds a configuration and no weights",
        where=folder,
        fix=f"put {WEIGHTS[0]} or a checkpoint of open_clip's training ({', '.join(WEIGHTS_SUFFIXES)}) into it",
    )


def _weights_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS_SUFFIXES and path.is_file())


def _is_tag(weights: str) -> bool:
    import open_clip

    return any(weights == tag for _, tag in open_clip.list_pretrained())


def _fetched(name: str, tag: str | None) -> Path:
    """Return the weights of a named model, or of a repository of the hub, fetched where they are not at hand."""
    from open_clip import get_pretrained_cfg, pretrained

    if name.startswith("hf-hub:"):
        return Path(pretrained.download_pretrained_from_hf(name.removeprefix("hf-hub:")))
    return Path(pretrained.download_pretrained(get_pretrained_cfg(name, tag)))


def _load_weights(model: torch.nn.Module, path: Path) -> None:
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
    except Exception:  # what is wrong with the file is told by who failed to load it
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


def _check_names(model: str, weights: str | None) -> None:
    import open_clip

    if model not in open_clip.list_models():
        raise TeacherError(
            f"open_clip has no model {model!r}{nearest(model, open_clip.list_models())}",
            where="teacher.model",
            fix="choose a name of open_clip.list_models(), hf-hub:OWNER/NAME, or local-dir:PATH",
        )
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


def _trained_with_quick_gelu(model: str, weights: str | None) -> bool:
    """Return whether weights want the activation of OpenAI's own models, which open_clip 3 does not choose by itself.

    A folder, or a repository of the hub, says it in its configuration.
    """
    import open_clip

    return ":" not in model and bool(open_clip.get_pretrained_cfg(model, weights or "").get("quick_gelu"))


def _load_error(config: TeacherConfig, folder: Path | None, error: Exception) -> TeacherError:
    """Say which file could not be had, from where, and how to point at a local copy."""
    import open_clip

    first_line = (str(error).splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    if folder is not None:
        return _files_error(folder, reason, _weights_file(folder, config.weights).name)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's log lines about what it loads off the terminal; what goes wrong, it also raises."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)

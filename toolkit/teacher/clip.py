"""The teacher: any open_clip model behind two methods, embed_images and embed_prompts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prgkit.config.image_size import sides, size_of
from prgkit.config.sections import RANDOM, TeacherConfig
from prgkit.data.preprocessing import Preprocessing
from prgkit.device import best_device, teacher_precision
from prgkit.errors import TeacherError
from prgkit.progress import Progress
from prgkit.teacher.weights import (
    check_teacher,
    fetch_weights,
    load_error,
    load_weights,
    local_folder,
    settled,
    trained_with_quick_gelu,
    weights_file,
)

BATCH_SIZES = (512, 256, 128, 64)
TEXTS_AT_ONCE = 128  # whose activations are kept for a gradient


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
        self.precision = teacher_precision(device) if config.precision == "auto" else config.precision
        # Both families are scored alike: SigLIP's logit bias is one constant, and drops out of argmax and softmax.
        self.logit_scale = float(model.logit_scale.exp())
        self.preprocessing = _preprocessing(open_clip.get_model_preprocess_cfg(model))
        self._mean, self._std = (
            255 * torch.tensor(values, device=device) for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        self.width = int(self.embed_images(torch.zeros(1, *self.shape, dtype=torch.uint8)).shape[1])
        self.batch_size = config.batch_size or self._fitting_batch_size()

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed uint8 pixels [B, S, S, 3] as unit vectors I [B, D], on the teacher's device."""
        images = ((pixels.to(self.device).float() - self._mean) / self._std).permute(0, 3, 1, 2)
        with self._autocast():
            features = self.model.encode_image(images)
        return torch.nn.functional.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Embed prompts[template][class] as unit vectors T [M, C, D], one per template, not averaged."""
        embedded = []
        for of_template in prompts:
            chunks = [of_template[start : start + 256] for start in range(0, len(of_template), 256)]
            tokens = [self.tokenizer(list(chunk)).to(self.device) for chunk in chunks]
            with self._autocast():
                features = torch.cat([self.model.encode_text(chunk).float() for chunk in tokens])
            embedded.append(torch.nn.functional.normalize(features, dim=-1))
        return torch.stack(embedded)

    def check_prompts(self, prompts: Sequence[Sequence[str]], classes: Sequence[str]) -> str:
        """Return a warning where names of ``classes`` lose their end in prompts[template][class], or "".

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
        example = f"it does not read {_in_short(unread[lost[0]])} of {_in_short(classes[lost[0]])}"
        return f"{count} longer than the {most} tokens that the teacher reads: {example}"

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
        vectors = vectors.to(self.device)
        return torch.stack([self.embed_sentences(self.sentences(texts, words), vectors) for texts in prompts])

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
            if isinstance(layer := getattr(tower, "token_embedding", None), torch.nn.Embedding):
                return layer
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
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _fitting_batch_size(self) -> int:
        """Return the largest of `BATCH_SIZES` of which twice as many fit the GPU's memory; the least on a CPU."""
        for size in BATCH_SIZES if self.device.type == "cuda" else ():
            try:
                self.embed_images(torch.zeros(2 * size, *self.shape, dtype=torch.uint8))
                return size
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        return BATCH_SIZES[-1]


def teacher_loader(progress: Progress) -> Callable[[TeacherConfig], Teacher]:
    """Return a function that loads each teacher once, when it is first asked for."""

    loaded: dict[TeacherConfig, Teacher] = {}

    def load(config: TeacherConfig) -> Teacher:
        if config not in loaded:
            progress.note(f"loading the teacher {config.model}")
            teacher = load_teacher(config, best_device())
            loaded[config] = loaded[settled(config, teacher.precision, teacher.batch_size)] = teacher
        return loaded[config]

    return load


def load_teacher(config: TeacherConfig, device: torch.device) -> Teacher:
    """Load an open_clip model with its weights and its tokenizer.

    Raises:
        TeacherError: the model or its weights are unknown, damaged, or cannot be fetched.
    """
    import open_clip

    check_teacher(config)
    folder = local_folder(config.model)
    name = f"local-dir:{folder}" if folder else config.model
    random = config.weights == RANDOM
    tag = None if ":" in name or random else config.weights
    try:
        with _quiet(), seeded() if random else contextlib.nullcontext():
            model = open_clip.create_model(
                name,
                pretrained=tag,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=trained_with_quick_gelu(name, tag),
            )
            if not random:
                load_weights(model, weights_file(folder, config.weights) if folder else fetch_weights(name, tag))
            tokenizer = open_clip.get_tokenizer(name)
    except TeacherError:
        raise
    except Exception as error:
        raise load_error(config, folder, error) from error
    return Teacher(model, tokenizer, device, config)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random weights each time, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


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

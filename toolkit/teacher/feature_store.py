"""The feature store: what the teacher sees in every view of every image, computed once and memory-mapped.

A store holds features, not logits, so that class names, templates, weightings and temperatures can change without a
teacher pass. It belongs to a teacher and a way of drawing views, not to a dataset: images are known by their content.

    targets/<fingerprint>/
        card.json        what the store is made from
        journal.jsonl    one line a block: its first row, its images' keys, how many views they have, a digest a view
        view-000.f16     [rows, D] float16, one file a view; view 0 is the evaluation view
        prompts-*.npy    [M, C, D] float32, one file for each set of classes and templates; its name ends in its digest
        prompts-*.txt    a warning about such a set: names that the teacher does not read to their end
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue, NonNegativeInt

from prgkit.config.prompts import fill
from prgkit.config.recipe import Recipe
from prgkit.config.sections import TeacherConfig, Views
from prgkit.data.augment import MultiViewDataset, make_dataloader
from prgkit.data.index import ImageIndex
from prgkit.errors import TargetsError
from prgkit.progress import NULL_PROGRESS, Progress
from prgkit.storage.atomic import (
    fingerprint,
    flush,
    guarding_space,
    mapped,
    read_sealed,
    read_text,
    require_space,
    write_bytes,
    write_sealed,
    write_text,
)
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.run_card import TeacherFacts
from prgkit.teacher.clip import Teacher
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.weights import teacher_identity

BLOCK_IMAGES = 256  # what a kill can lose at most
LOST_CARD = "delete it, and the same command writes it again; what the teacher has seen is kept"
Load = Callable[[TeacherConfig], Teacher]
UNKNOWN = ""  # stands for the images of a journal line that cannot be read


class Block(BaseModel, strict=True):
    """A line of the journal: images whose features lie one after the other in each view's file."""

    row: NonNegativeInt  # of the first
    keys: list[str]
    digests: list[str]  # one a view


class StoreCard(BaseModel, frozen=True):
    """What a store's features are made from, and what the teacher says of them: its card.json."""

    schema_version: Literal["prgkit.targets/2"] = Field("prgkit.targets/2", alias="schema")
    teacher: dict[str, JsonValue]  # as `teacher_identity` has it
    views: dict[str, JsonValue]
    teacher_model: str
    teacher_weights: str | None
    width: int
    logit_scale: float
    preprocessing: dict[str, JsonValue]


class FeatureStore:
    """A store of a teacher's features, opened for reading and appending."""

    def __init__(self, folder: Path, config: TeacherConfig) -> None:
        self.folder = folder
        self.config = config
        self.context = load_context(config)
        self.card = StoreCard.model_validate(read_sealed(folder / "card.json", fix=LOST_CARD))
        self.width = self.card.width
        self.logit_scale = self.card.logit_scale
        self._broken: list[tuple[str, list[str]]] = []  # where, and the keys of the images in it
        self._rows: dict[str, tuple[int, int]] = {}  # key -> (row, views)
        self._end = 0
        self._maps: dict[int, NDArray[np.float16]] = {}
        self._journal = Journal(folder / "journal.jsonl", Block)
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been journalled since, also by another process."""
        for number, block in self._journal.new_lines():
            if block is None:
                self._broken.append((f"{self._journal.path.name}, line {number}", [UNKNOWN]))
            else:
                self._take_in(block)

    def mend(self) -> None:
        """Put an empty block in the place of each journal line that cannot be read: what it told of is lost, and named.

        The number of lines stays, since other processes count them. To be called by the holder of the store's lock.
        """
        lines = self._journal.lines()
        if any(block is None for _, block in lines):
            self._journal.replace(block or Block(row=0, keys=[], digests=[]) for _, block in lines)
        self._broken = [(place, keys) for place, keys in self._broken if UNKNOWN not in keys]

    @property
    def stores(self) -> tuple[FeatureStore, ...]:
        """The one store that this is; `TeacherEnsemble` are several."""
        return (self,)

    @property
    def name(self) -> str:
        """What decides the features, and what stands in front of the class names, in a word."""
        return f"{self.folder.name}-{self.context.digest}" if self.context else self.folder.name

    @property
    def damaged(self) -> list[str]:
        """Where the store is damaged; of no account once the images in question have been embedded again."""
        blocks = [place for place, keys in self._broken if any(key not in self._rows for key in keys)]
        return blocks + [path.name for path in sorted(self.folder.glob("prompts-*.npy")) if not _is_whole(path)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps behind: another process maps the files itself."""
        return {**self.__dict__, "_maps": {}}

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def stored_views(self, key: str) -> int:
        """Return how many views of an image are stored."""
        return self._rows.get(key, (-1, 0))[1]

    def rows(self, keys: Sequence[str], *, views: int) -> NDArray[np.int64]:
        """Return the row of each image, -1 where fewer than ``views`` of its views are stored."""
        absent = (-1, 0)
        known = (self._rows.get(key, absent) for key in keys)
        return np.array([row if stored >= views else -1 for row, stored in known], dtype=np.int64)

    def features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> torch.Tensor:
        """Return the teacher's unit features I [n, D] float32 of ``rows`` [n] under ``views`` [n]."""
        gathered = np.empty((len(rows), self.width), dtype=np.float16)
        for view in np.unique(views):
            chosen = views == view
            gathered[chosen] = self._map(int(view), int(rows[chosen].max()))[rows[chosen]]
        # float16 rounds a unit vector's length by up to 0.05 %.
        return torch.nn.functional.normalize(torch.from_numpy(gathered).float(), dim=1)

    def stored_features(self, keys: Sequence[str], views: int) -> NDArray[np.float16]:
        """Return the features [views, images, D] of the first ``views`` of images, as they are stored."""
        rows = self.rows(keys, views=views)
        stored = [self._map(view, int(rows.max()))[rows] for view in range(views)]
        return np.array(stored, dtype=np.float16).reshape(views, len(keys), self.width)

    def append(self, keys: Sequence[str], features: NDArray[np.float16]) -> None:
        """Append a block [views, images, D]: written and flushed first, journalled after."""
        digests = []
        for view, block in enumerate(features):
            content = np.ascontiguousarray(block).tobytes()
            path = self._view_file(view)
            with guarding_space(path, features.nbytes), open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(self._end * self.width * 2)
                file.write(content)
                flush(file)
            digests.append(_digest(content))
        self._journal.append(Block(row=self._end, keys=list(keys), digests=digests))
        self._note(self._end, keys, len(features))

    def prompts(
        self, classes: Sequence[str], templates: Sequence[str], teacher: Load, progress: Progress = NULL_PROGRESS
    ) -> torch.Tensor:
        """Return T [M, C, D] float32; a set of classes and templates is embedded once, by ``teacher(config)``.

        Where the teacher has a learned context, that is its one template.

        Raises:
            TeacherError: the teacher reads the same tokens of two classes.
        """
        context = self.context
        texts = fill(context.templates if context else templates, classes)
        stem = f"prompts-{fingerprint([texts, context.digest] if context else texts)}"
        warning_file = self.folder / f"{stem}.txt"  # a warning about the names, repeated each time
        if warning_file.exists():
            progress.note(read_text(warning_file))
        for path in self.folder.glob(f"{stem}.*.npy"):
            if _is_whole(path):
                loaded: NDArray[np.float32] = np.load(path)
                return torch.from_numpy(loaded)
            path.unlink(missing_ok=True)
        reader = teacher(self.config)
        if (warning := reader.check_prompts(texts, classes)) and not warning_file.exists():
            write_text(warning_file, warning)
            progress.note(warning)
        embedded = (context.read(reader, texts) if context else reader.embed_prompts(texts)).cpu().numpy()
        buffer = io.BytesIO()
        np.save(buffer, embedded, allow_pickle=False)
        write_bytes(self.folder / f"{stem}.{_digest(buffer.getvalue())}.npy", buffer.getvalue())
        return torch.from_numpy(embedded)

    def facts(self) -> TeacherFacts:
        """Return what a run's card says of its teacher."""
        origin = self.card.teacher
        return TeacherFacts(
            model=self.card.teacher_model,
            weights=self.card.teacher_weights,
            fingerprint=fingerprint([origin, self.context.digest] if self.context else origin),
            targets=(str(self.folder),),
            width=self.width,
            logit_scale=self.logit_scale,
            context=self.context.digest if self.context else None,
        )

    def _view_file(self, view: int) -> Path:
        return self.folder / f"view-{view:03d}.f16"

    def _map(self, view: int, last_row: int) -> NDArray[np.float16]:
        known = self._maps.get(view)
        if known is None or len(known) <= last_row:
            path = self._view_file(view)
            rows = path.stat().st_size // (2 * self.width)
            self._maps[view] = mapped(path, np.float16, (rows, self.width))
        return self._maps[view]

    def _take_in(self, block: Block) -> None:
        """Take a journalled block in, if its content is what was journalled; else its images are embedded again."""
        row, keys, digests = block.row, block.keys, block.digests
        size = len(keys) * self.width * 2
        for view, digest in enumerate(digests):
            path = self._view_file(view)
            content, rows = b"", 0
            if path.exists():
                rows = path.stat().st_size // (self.width * 2)
                with open(path, "rb") as file:
                    file.seek(row * self.width * 2)
                    content = file.read(size)
            if _digest(content) != digest:
                self._broken.append((f"{path.name}, rows {row} to {row + len(keys) - 1}", keys))
                self._end = max(self._end, min(row + len(keys), rows))  # the row itself may be what is damaged
                return
        self._note(row, keys, len(digests))

    def _note(self, row: int, keys: Sequence[str], views: int) -> None:
        self._rows.update({key: (row + place, views) for place, key in enumerate(keys)})
        self._end = max(self._end, row + len(keys))


def open_store(config: TeacherConfig, views: Views, root: Path, teacher: Load) -> FeatureStore:
    """Open the store of a teacher and views, creating it when it is new.

    Raises:
        TargetsError: the store was made by something else.
    """
    if (stored := existing_store(config, views, root)) is not None:
        return stored
    made_from = origin_of(config, views)
    folder = root / fingerprint(made_from)
    loaded = teacher(config)
    card = StoreCard(
        **made_from,
        teacher_model=config.model,
        teacher_weights=config.weights,
        width=loaded.width,
        logit_scale=loaded.logit_scale,
        preprocessing=loaded.preprocessing.to_dict(),
    )
    write_sealed(folder / "card.json", card.model_dump(mode="json", by_alias=True))
    return FeatureStore(folder, config)


def existing_store(config: TeacherConfig, views: Views, root: Path) -> FeatureStore | None:
    """Open the store of a teacher and views where there is one.

    Raises:
        TargetsError: the store was made by something else.
    """
    made_from = origin_of(config, views)
    folder = root / fingerprint(made_from)
    if not (folder / "card.json").exists():
        return None
    store = FeatureStore(folder, config)
    if store.card.model_dump(mode="json", by_alias=True, include={"schema_version", "teacher", "views"}) != made_from:
        raise TargetsError(
            "the target store was made from something else than its name says", where=folder, fix="delete it"
        )
    return store


def origin_of(config: TeacherConfig, views: Views) -> dict[str, JsonValue]:
    """Return what decides a store's features, and so its name."""
    return {
        "schema": "prgkit.targets/2",
        "teacher": teacher_identity(config),
        "views": views.model_dump(mode="json", exclude={"count", "mixed"}, exclude_none=True),
    }


def embed(
    stores: Sequence[FeatureStore],
    image_index: ImageIndex,
    *,
    views: NDArray[np.int64],
    recipe: Recipe,
    teacher: Load,
    progress: Progress,
) -> None:
    """Have each store's teacher embed every image in its first ``views`` [images] views, where it has not.

    Raises:
        DiskFullError: before the work, or at a block; what is journalled stays.
    """
    for store in stores:
        missing = _missing(store, image_index, views)
        if not len(missing):
            continue
        require_space(store.folder, int(views[missing].sum()) * store.width * 2, "the target store")
        # Two processes that want one store mostly want the same images embedded: the second goes on with what the
        # first one stored, so waiting loses nothing.
        with locked(store.folder, "target store", wait=progress.note):
            store.refresh()  # another process may have appended before the lock was ours
            store.mend()
            missing = _missing(store, image_index, views)
            progress.start("teacher", len(missing), "img")
            stored = _stored(store, image_index)
            for first, count in np.unique(np.stack([stored[missing], views[missing]]), axis=1).T.tolist():
                chosen = missing[(stored[missing] == first) & (views[missing] == count)]
                _embed_views(store, teacher(store.config), image_index, chosen, range(first, count), recipe, progress)


def _stored(store: FeatureStore, image_index: ImageIndex) -> NDArray[np.int64]:
    """Return how many views of each image [images] are stored."""
    return np.array([store.stored_views(key) for key in image_index.keys], dtype=np.int64)


def _missing(store: FeatureStore, image_index: ImageIndex, views: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the images of which the store lacks some of the first ``views`` [images] views."""
    return np.flatnonzero(_stored(store, image_index) < views)


def _embed_views(
    store: FeatureStore,
    teacher: Teacher,
    image_index: ImageIndex,
    positions: NDArray[np.int64],
    views: range,
    recipe: Recipe,
    progress: Progress,
) -> None:
    """Embed and store ``views`` of ``positions``, of which all views before them are stored and come along.

    Each image is decoded once for all of its views. Batches are full, whatever the number of views. A block ends where
    a batch does, so that a pass that was killed fills its batches as one that was not.
    """
    rendered, size = MultiViewDataset(image_index, teacher.preprocessing, recipe.views), teacher.batch_size
    even = size // math.gcd(size, len(views))  # images whose views fill batches to the last place
    step = max(number for number in range(1, max(1, size // len(views)) + 1) if even % number == 0)
    chunks = [positions[start : start + step] for start in range(0, len(positions), step)]
    plan = [[(int(position), views) for position in chunk] for chunk in chunks]
    keys: list[str] = []
    seen: list[torch.Tensor] = []
    waiting = torch.empty(0, *teacher.shape, dtype=torch.uint8)  # [views, S, S, 3]
    for number, batch in enumerate(make_dataloader(rendered, plan, workers=recipe.training.workers), start=1):
        last = number == len(plan)
        keys += [image_index.keys[position] for position in batch.positions]
        waiting = torch.cat([waiting, batch.pixels.flatten(0, 1)])
        while len(waiting) >= size or (last and len(waiting)):
            seen.append(_embed_full(teacher, waiting[:size]).half())
            waiting = waiting[size:]
        progress.advance(len(batch.positions))
        if last or (len(keys) >= BLOCK_IMAGES and not len(waiting)):
            block = torch.cat(seen).view(-1, len(views), store.width).transpose(0, 1).numpy()  # [views, images, D]
            store.append(keys, np.concatenate([store.stored_features(keys, views.start), block]))
            keys, seen = [], []


def _embed_full(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    """Embed a batch padded to the fixed size: features vary slightly with the size of the batch they are part of."""
    padding = pixels[-1:].expand(teacher.batch_size - len(pixels), -1, -1, -1)
    return teacher.embed_images(torch.cat([pixels, padding]))[: len(pixels)].cpu()


def _is_whole(path: Path) -> bool:
    """Tell whether a file's content is what its name says."""
    try:
        return path.name.split(".")[-2] == _digest(path.read_bytes())
    except FileNotFoundError:  # another process has just removed it, as it was damaged
        return False


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()

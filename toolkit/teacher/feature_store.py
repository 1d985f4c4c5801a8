"""The feature store: what the teacher sees in every view of every image, computed once and memory-mapped.

A store holds features, not logits, so that class names, templates, weightings and temperatures can change without a
teacher pass. It belongs to a teacher and a way of drawing views, not to a dataset: images are known by their content.

    targets/<fingerprint>/
        card.json        what the store is made from
        index.bin        a binary record a block: its first row, its images' keys, a digest a view
        view-000.f16     [rows, D] float16, one file a view; view 0 is the evaluation view
        shards/          the same files and a manifest for each shard that another process embedded
        prompts-*.npy    [M, C, D] float32, one file for each set of classes and templates; its name ends in its digest
        prompts-*.txt    a warning about such a set: names that the teacher does not read to their end
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue

from prgkit.config.prompts import fill
from prgkit.config.recipe import Recipe
from prgkit.config.sections import TeacherConfig, Views
from prgkit.config.shard import BLOCK_IMAGES, WHOLE, Shard
from prgkit.data.augment import MultiViewDataset, make_dataloader
from prgkit.data.index import ImageIndex
from prgkit.data.snapshot import packed
from prgkit.errors import TargetsError
from prgkit.progress import NULL_PROGRESS, Progress
from prgkit.storage.atomic import (
    fingerprint,
    read_text,
    require_space,
    write_bytes,
    write_sealed,
    write_text,
)
from prgkit.storage.documents import read_document
from prgkit.storage.locks import locked
from prgkit.storage.run_card import TeacherFacts
from prgkit.teacher.clip import Teacher
from prgkit.teacher.feature_files import (
    INDEX,
    SCHEMA,
    SHARDS,
    Block,
    BlockJournal,
    FeatureFiles,
    KeyTable,
    digest,
)
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.weights import as_stored, name_of, settled, teacher_identity, views_identity
from prgkit.workers import available_cores

BLOCKS_AT_ONCE = 1024  # in memory while a store is checked
MOST_VIEWS = 256  # of an image, the evaluation view included
ROW_BITS = 40  # of a place: above them stands the number of the part
LOST_CARD = "delete it, and the same command writes it again; what the teacher has seen is kept"
Load = Callable[[TeacherConfig], Teacher]


class StoreCard(BaseModel, frozen=True):
    """What a store's features are made from, and what the teacher says of them: its card.json."""

    schema_version: Literal["prgkit.targets/3"] = Field("prgkit.targets/3", alias="schema")
    teacher: dict[str, JsonValue]  # as `teacher_identity` has it
    views: dict[str, JsonValue]
    teacher_model: str
    teacher_weights: str | None
    width: int
    logit_scale: float
    preprocessing: dict[str, JsonValue]


class FeatureStore:
    """A store of a teacher's features, opened for reading and appending; with a ``shard``, what is appended is its."""

    def __init__(self, folder: Path, config: TeacherConfig, shard: Shard = WHOLE) -> None:
        self.folder = folder
        self.config = config
        self.shard = shard
        self.own_folder = folder / SHARDS / shard.folder if shard.total else folder
        self.context = load_context(config)
        self.card = read_document(
            folder / "card.json", StoreCard, SCHEMA, what="a target store", fix=LOST_CARD, error=TargetsError
        )
        self.width = self.card.width
        self.logit_scale = self.card.logit_scale
        self._table = KeyTable()
        self._parts: list[Shard] = []  # by their number in a place,
        self._part_numbers: dict[Shard, int] = {}  # and the other way round
        self._end = 0  # row at which the own files are appended to
        self._broken: list[tuple[str, list[str]]] | None = None  # where, and the keys of the images; None: not looked
        self._own_journal = BlockJournal(self.own_folder / INDEX)
        self._journals = [self._own_journal, *([BlockJournal(folder / INDEX)] if shard.total else [])]
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been journalled since, also by another process."""
        for journal in self._journals:
            for block in journal.new_blocks():
                self._take_in(block)

    def mend(self) -> None:
        """Blank the records of the index that cannot be read, under the lock of ``own_folder``: they are named once."""
        self._own_journal.mend()

    def check(self) -> None:
        """Compare every block with its digest, once: what is damaged counts as not stored from here on."""
        if self._broken is not None:
            return
        self._broken = []
        with ThreadPoolExecutor(available_cores()) as pool:
            for journal in self._journals:
                blocks = BlockJournal(journal.path).new_blocks()
                while some := list(islice(blocks, BLOCKS_AT_ONCE)):
                    damages = pool.map(lambda block: self.files(block.shard).damage(block), some)
                    for block, damage in zip(some, damages, strict=True):
                        first = self._place(block)
                        if damage and self._table.drop(first, first + len(block.keys)):
                            place = f"{SHARDS}/{block.shard.folder}/" if block.shard.total else ""
                            self._broken.append((place + damage, block.hex_keys()))

    @property
    def stores(self) -> tuple[FeatureStore, ...]:
        """This store; `TeacherEnsemble` are several."""
        return (self,)

    @property
    def name(self) -> str:
        """What decides the features, and what stands in front of the class names, in a word."""
        return f"{self.folder.name}-{self.context.digest}" if self.context else self.folder.name

    @property
    def damaged(self) -> list[str]:
        """Where the store is damaged; of no account once the images in question have been embedded again."""
        self.check()
        blocks = [place for place, keys in self._broken or [] if (self._table.find(keys).views == 0).any()]
        damages = [damage for journal in self._journals for damage in journal.damages]
        records = [f"{INDEX}, bytes {start:,} to {end:,}" for start, end in damages]
        prompts = [path.name for path in sorted(self.folder.glob("prompts-*.npy")) if not _is_whole(path)]
        return records + blocks + prompts

    def __contains__(self, key: object) -> bool:
        return bool(self.stored_views([str(key)])[0])

    def stored_views(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return how many views of each image [n] are stored."""
        return self._table.find(keys).views.astype(np.int64)

    def rows(self, keys: Sequence[str], *, views: int) -> NDArray[np.int64]:
        """Return where each image's features are, -1 where fewer than ``views`` of its views are stored."""
        found = self._table.find(keys)
        return np.where(found.views >= views, found.places, -1)

    def features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> torch.Tensor:
        """Return the teacher's unit features I [n, D] float32 of ``rows`` [n] under ``views`` [n]."""
        # float16 rounds a unit vector's length by up to 0.05 %.
        return torch.nn.functional.normalize(torch.from_numpy(self._gathered(rows, views)).float(), dim=1)

    def stored_features(self, rows: NDArray[np.int64], views: int) -> NDArray[np.float16]:
        """Return the features [views, n, D] of the first ``views`` of images, as they are stored."""
        stored = [self._gathered(rows, np.full(len(rows), view)) for view in range(views)]
        return np.array(stored, dtype=np.float16).reshape(views, len(rows), self.width)

    def append(self, keys: Sequence[str], features: NDArray[np.float16]) -> None:
        """Append a block [views, images, D]: written and flushed first, journalled after."""
        digests = self.files(self.shard).write(self._end, features)
        block = Block(self._end, packed(keys), digests, self.shard)
        self._own_journal.append(block)
        self._take_in(block)

    def files(self, shard: Shard) -> FeatureFiles:
        """Return the files of a part: the store's own, or a shard's."""
        return FeatureFiles(self.folder / SHARDS / shard.folder if shard.total else self.folder, self.width)

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
        write_bytes(self.folder / f"{stem}.{digest(buffer.getvalue()).hex()}.npy", buffer.getvalue())
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

    def _gathered(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the stored rows [n, D] of a view each."""
        gathered = np.empty((len(rows), self.width), dtype=np.float16)
        groups = (rows >> ROW_BITS) * MOST_VIEWS + views
        for group in np.unique(groups).tolist():
            chosen = groups == group
            part, view = divmod(group, MOST_VIEWS)
            gathered[chosen] = self.files(self._parts[part]).read(view, rows[chosen] & (1 << ROW_BITS) - 1)
        return gathered

    def _take_in(self, block: Block) -> None:
        first = self._place(block)
        self._table.add(block.keys, np.arange(first, first + len(block.keys)), len(block.digests))
        if block.shard == self.shard:
            self._end = max(self._end, block.row + len(block.keys))

    def _place(self, block: Block) -> int:
        """Return the place of a block's first image: the number of its part, and the row in it."""
        if block.shard not in self._part_numbers:
            self._part_numbers[block.shard] = len(self._parts)
            self._parts.append(block.shard)
        return (self._part_numbers[block.shard] << ROW_BITS) + block.row


def open_store(config: TeacherConfig, views: Views, root: Path, teacher: Load, shard: Shard = WHOLE) -> FeatureStore:
    """Open the store of a teacher and views, creating it when it is new; what is appended is the ``shard``'s.

    Raises:
        TargetsError: the store was made by something else.
    """
    if (stored := existing_store(config, views, root, shard)) is not None:
        return stored
    loaded = teacher(config)
    config = settled(config, loaded.precision, loaded.batch_size)
    if (stored := existing_store(config, views, root, shard)) is not None:
        return stored
    made_from = origin_of(config, views)
    folder = root / name_of(made_from)
    card = StoreCard(
        **made_from,
        teacher_model=config.model,
        teacher_weights=config.weights,
        width=loaded.width,
        logit_scale=loaded.logit_scale,
        preprocessing=loaded.preprocessing.to_dict(),
    )
    write_sealed(folder / "card.json", card.model_dump(mode="json", by_alias=True))
    return FeatureStore(folder, config, shard)


def existing_store(config: TeacherConfig, views: Views, root: Path, shard: Shard = WHOLE) -> FeatureStore | None:
    """Open the store of a teacher and views where there is one, of whatever precision and batch size are left open.

    Raises:
        TargetsError: the store was made by something else.
    """
    chosen = as_stored(config, views, root)
    if chosen is None:
        return None
    config, made_from = chosen, origin_of(chosen, views)
    folder = root / name_of(made_from)
    if not (folder / "card.json").exists():
        return None
    store = FeatureStore(folder, config, shard)
    if store.card.model_dump(mode="json", by_alias=True, include={"schema_version", "teacher", "views"}) != made_from:
        raise TargetsError(
            "the target store was made from something else than its name says", where=folder, fix="delete it"
        )
    return store


def origin_of(config: TeacherConfig, views: Views) -> dict[str, JsonValue]:
    """Return what decides a store's features, and so its name."""
    return {
        "schema": SCHEMA,
        "teacher": teacher_identity(config),
        "views": views_identity(views),
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
        store.check()
        missing = _missing(store, image_index, views)
        if not len(missing):
            continue
        require_space(store.own_folder, int(views[missing].sum()) * store.width * 2, "the target store")
        # Two processes that want one store mostly want the same images embedded: the second goes on with what the
        # first one stored, so waiting loses nothing.
        with locked(store.own_folder, "target store", wait=progress.note):
            store.refresh()  # another process may have appended before the lock was ours
            store.mend()
            missing = _missing(store, image_index, views)
            progress.start("teacher", len(missing), "img")
            stored = store.stored_views(image_index.keys)
            for first, count in np.unique(np.stack([stored[missing], views[missing]]), axis=1).T.tolist():
                chosen = missing[(stored[missing] == first) & (views[missing] == count)]
                _embed_views(store, teacher(store.config), image_index, chosen, range(first, count), recipe, progress)


def _missing(store: FeatureStore, image_index: ImageIndex, views: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the images of which the store lacks some of the first ``views`` [images] views."""
    return np.flatnonzero(store.stored_views(image_index.keys) < views)


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
    before = store.rows(image_index.keys, views=views.start)
    done: list[int] = []
    seen: list[torch.Tensor] = []
    waiting = torch.empty(0, *teacher.shape, dtype=torch.uint8, device=teacher.device)  # [views, S, S, 3]
    for number, batch in enumerate(make_dataloader(rendered, plan, workers=recipe.training.workers), start=1):
        last = number == len(plan)
        done += batch.positions.tolist()
        waiting = torch.cat([waiting, batch.pixels.flatten(0, 1).to(teacher.device, non_blocking=True)])
        while len(waiting) >= size or (last and len(waiting)):
            seen.append(_embed_full(teacher, waiting[:size]).half())
            waiting = waiting[size:]
        progress.advance(len(batch.positions))
        if last or (len(done) >= BLOCK_IMAGES and not len(waiting)):
            # [views, images, D]; up to here the host does not wait for a GPU
            block = torch.cat(seen).view(-1, len(views), store.width).transpose(0, 1).cpu().numpy()
            earlier = store.stored_features(before[done], views.start)
            store.append([image_index.keys[position] for position in done], np.concatenate([earlier, block]))
            done, seen = [], []


def _embed_full(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    """Embed a batch padded to the fixed size: features vary slightly with the size of the batch they are part of."""
    padding = pixels[-1:].expand(teacher.batch_size - len(pixels), -1, -1, -1)
    return teacher.embed_images(torch.cat([pixels, padding]))[: len(pixels)]


def _is_whole(path: Path) -> bool:
    """Tell whether a file's content is what its name says."""
    try:
        return path.name.split(".")[-2] == digest(path.read_bytes()).hex()
    except FileNotFoundError:  # another process has just removed it, as it was damaged
        return False

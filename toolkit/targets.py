"""Targets: what the teacher sees in every view of every image, computed once and kept in a memory-mapped store.

A store holds features, not logits, so that class names, templates, weightings and temperatures can change without a
teacher pass. It belongs to a teacher and a way of drawing views, not to a dataset: images are known by their content.

    targets/<fingerprint>/
        card.json        what the store is made from
        journal.jsonl    one line a block: its first row, its images' keys, how many views they have, a digest a view
        view-000.f16     [rows, D] float16, one file a view; view 0 is the evaluation view
        prompts-*.npy    [M, C, D] float32, one file for each set of classes and templates
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prgkit.errors import TargetsError
from prgkit.files import fingerprint, guarding_space, read_json, require_space, write_bytes, write_json
from prgkit.images import Catalogue, Preprocessing
from prgkit.prompts import fill
from prgkit.recipe import Recipe
from prgkit.run import append_line, complete_lines, locked
from prgkit.teacher import Teacher, teacher_identity
from prgkit.views import Rendered, load_batches
from prgkit.watch import Watch

TARGETS = Path("targets")
BLOCK_IMAGES = 256  # what a kill can lose at most


class Targets:
    """A store of teacher features, opened for reading and appending."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card: dict[str, Any] = read_json(folder / "card.json")
        self.width: int = self.card["width"]
        self.logit_scale: float = self.card["logit_scale"]
        self.preprocessing = Preprocessing.from_dict(self.card["preprocessing"])
        self._broken: list[tuple[str, list[str]]] = []  # where, and the keys of the images in it
        self._rows: dict[str, tuple[int, int]] = {}  # key -> (row, views)
        self._end = 0
        self._maps: dict[int, NDArray[np.float16]] = {}
        self._journalled = 0  # lines taken in
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been journalled since, also by another process."""
        blocks = list(complete_lines(self._journal)) if self._journal.exists() else []
        for block in blocks[self._journalled :]:
            self._take_in(block)
        self._journalled = len(blocks)

    @property
    def damaged(self) -> list[str]:
        """Where the store is damaged; of no account once the images in question have been embedded again."""
        return [place for place, keys in self._broken if any(key not in self._rows for key in keys)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps behind: another process maps the files itself."""
        return {**self.__dict__, "_maps": {}}

    def stored_views(self, key: str) -> int:
        """Return how many views of an image are stored."""
        return self._rows.get(key, (-1, 0))[1]

    def rows(self, keys: Sequence[str], *, views: int) -> NDArray[np.int64]:
        """Return the row of each image, -1 where fewer than ``views`` of its views are stored."""
        absent = (-1, 0)
        found = [self._rows.get(key, absent) for key in keys]
        return np.array([row if stored >= views else -1 for row, stored in found], dtype=np.int64)

    def features(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> torch.Tensor:
        """Return the teacher's unit features I [n, D] float32 of ``rows`` [n] under ``views`` [n]."""
        gathered = np.empty((len(rows), self.width), dtype=np.float16)
        for view in np.unique(views):
            chosen = views == view
            gathered[chosen] = self._map(int(view), int(rows[chosen].max()))[rows[chosen]]
        # float16 rounds a unit vector's length by up to 0.05 %.
        return torch.nn.functional.normalize(torch.from_numpy(gathered).float(), dim=1)

    def append(self, keys: Sequence[str], features: NDArray[np.float16]) -> None:
        """Append a block [views, images, D]: written and flushed first, journalled after."""
        digests = []
        for view, block in enumerate(features):
            content = np.ascontiguousarray(block).tobytes()
            path = self._view_file(view)
            with guarding_space(path, features.nbytes), open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(self._end * self.width * 2)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            digests.append(_digest(content))
        append_line(self._journal, {"row": self._end, "keys": list(keys), "digests": digests})
        self._journalled += 1
        self._note(self._end, keys, len(features))

    def prompts(self, classes: Sequence[str], templates: Sequence[str], teacher: Callable[[], Teacher]) -> torch.Tensor:
        """Return T [M, C, D] float32; a set of classes and templates is embedded once, by ``teacher()``."""
        texts = fill(templates, classes)
        path = self.folder / f"prompts-{fingerprint(texts)}.npy"
        if not path.exists():
            embedded = teacher().embed_prompts(texts).cpu().numpy()
            buffer = io.BytesIO()
            np.save(buffer, embedded, allow_pickle=False)
            write_bytes(path, buffer.getvalue())
        loaded: NDArray[np.float32] = np.load(path)
        return torch.from_numpy(loaded)

    def facts(self) -> dict[str, Any]:
        """Return what a run's card says of its teacher."""
        return {
            "model": self.card["teacher_model"],
            "weights": self.card["teacher_weights"],
            "fingerprint": fingerprint(self.card["teacher"]),
            "targets": str(self.folder),
            "width": self.width,
            "logit_scale": self.logit_scale,
        }

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _view_file(self, view: int) -> Path:
        return self.folder / f"view-{view:03d}.f16"

    def _map(self, view: int, last_row: int) -> NDArray[np.float16]:
        known = self._maps.get(view)
        if known is None or len(known) <= last_row:
            path = self._view_file(view)
            rows = path.stat().st_size // (2 * self.width)
            self._maps[view] = np.memmap(path, dtype=np.float16, mode="r", shape=(rows, self.width))
        return self._maps[view]

    def _take_in(self, block: dict[str, Any]) -> None:
        """Take a journalled block in, if its content is what was journalled; else its images are embedded again."""
        row, keys, digests = block["row"], block["keys"], block["digests"]
        size = len(keys) * self.width * 2
        for view, digest in enumerate(digests):
            path = self._view_file(view)
            content = b""
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(row * self.width * 2)
                    content = file.read(size)
            if _digest(content) != digest:
                self._broken.append((f"{path.name}, rows {row} to {row + len(keys) - 1}", keys))
                self._end = max(self._end, row + len(keys))
                return
        self._note(row, keys, len(digests))

    def _note(self, row: int, keys: Sequence[str], views: int) -> None:
        self._rows.update({key: (row + place, views) for place, key in enumerate(keys)})
        self._end = max(self._end, row + len(keys))


def open_targets(recipe: Recipe, root: Path, teacher: Callable[[], Teacher]) -> Targets:
    """Open the store of the recipe's teacher and views, creating it when it is new.

    Raises:
        TargetsError: the store was made by something else.
    """
    made_from = origin_of(recipe)
    folder = root / fingerprint(made_from)
    if not (folder / "card.json").exists():
        seeing = teacher()
        write_json(
            folder / "card.json",
            {
                **made_from,
                "teacher_model": recipe.teacher.model,
                "teacher_weights": recipe.teacher.weights,
                "width": seeing.width,
                "logit_scale": seeing.logit_scale,
                "preprocessing": seeing.preprocessing.to_dict(),
            },
        )
    targets = Targets(folder)
    if any(targets.card.get(key) != value for key, value in made_from.items()):
        raise TargetsError(
            "the target store was made from something else than its name says", where=folder, fix="delete it"
        )
    return targets


def existing_targets(recipe: Recipe, root: Path) -> Targets | None:
    """Open the store of the recipe's teacher and views where there is one."""
    folder = root / fingerprint(origin_of(recipe))
    return Targets(folder) if (folder / "card.json").exists() else None


def origin_of(recipe: Recipe) -> dict[str, Any]:
    """Return what decides a store's features, and so its name."""
    return {
        "schema": "prgkit.targets/1",
        "teacher": teacher_identity(recipe.teacher),
        "views": recipe.views.model_dump(mode="json", exclude={"count"}),
    }


def embed(
    targets: Targets,
    catalogue: Catalogue,
    *,
    views: NDArray[np.int64],
    recipe: Recipe,
    teacher: Callable[[], Teacher],
    watch: Watch,
) -> None:
    """Let the teacher see each image of ``catalogue`` in its first ``views`` [images] views, where it has not yet.

    Raises:
        DiskFullError: before the work, or at a block; what is journalled stays.
        RunError: another process is working on the store.
    """

    def missing_now() -> NDArray[np.int64]:
        stored = np.array([targets.stored_views(key) for key in catalogue.keys])
        return np.flatnonzero(stored < views)

    missing = missing_now()
    if not len(missing):
        return
    require_space(targets.folder, int(views[missing].sum()) * targets.width * 2, "the target store")
    with locked(targets.folder, "target store"):
        targets.refresh()  # another process may have appended before the lock was ours
        missing = missing_now()
        watch.start("teacher", len(missing), "img")
        for count in np.unique(views[missing]):
            _embed_views(targets, teacher(), catalogue, missing[views[missing] == count], int(count), recipe, watch)


def _embed_views(
    targets: Targets,
    teacher: Teacher,
    catalogue: Catalogue,
    positions: NDArray[np.int64],
    views: int,
    recipe: Recipe,
    watch: Watch,
) -> None:
    """Embed and store the first ``views`` views of ``positions``; each image is decoded once for all of them."""
    rendered = Rendered(catalogue, teacher.preprocessing, recipe.views)
    step = max(1, teacher.batch_size // views)
    chunks = [positions[start : start + step] for start in range(0, len(positions), step)]
    plan = [[(int(position), range(views)) for position in chunk] for chunk in chunks]
    keys: list[str] = []
    features: list[NDArray[np.float16]] = []
    for number, batch in enumerate(load_batches(rendered, plan, workers=recipe.training.workers), start=1):
        seen = torch.cat(
            [_embed_full(teacher, part) for part in torch.split(batch.pixels.flatten(0, 1), teacher.batch_size)]
        )
        features.append(seen.view(-1, views, targets.width).transpose(0, 1).half().numpy())  # [views, images, D]
        keys += [catalogue.keys[position] for position in batch.positions]
        watch.advance(len(batch.positions))
        if len(keys) >= BLOCK_IMAGES or number == len(plan):
            targets.append(keys, np.concatenate(features, axis=1))
            keys, features = [], []


def _embed_full(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
    """Embed a batch padded to the fixed size: features vary slightly with the size of the batch they are part of."""
    padding = pixels[-1:].expand(teacher.batch_size - len(pixels), -1, -1, -1)
    return teacher.embed_images(torch.cat([pixels, padding]))[: len(pixels)].cpu()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()

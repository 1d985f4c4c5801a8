"""The target stores of a folder: what each holds, which runs use it, and freeing those that none does."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from prgkit.data.cache import PICTURES
from prgkit.errors import RunError
from prgkit.storage.atomic import read_json, readable_bytes
from prgkit.storage.find import RUNS
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.run import Run
from prgkit.teacher.feature_files import INDEX, SHARDS, BlockJournal, KeyTable

DAY_SECONDS = 86_400


class StoredTargets(BaseModel, frozen=True):
    """What a store holds; one without a teacher is the folder of decoded pictures that all stores share."""

    store: str
    teacher: str | None
    images: int
    views: int | None
    bytes: int
    age_days: float
    runs: list[str]


def list_stores(root: Path) -> list[StoredTargets]:
    """Return a row for each store under ``root``, the largest first, and last the pictures that all of them share.

    The runs are those under runs/; one that lies elsewhere is not known of.
    """
    users = used_by()
    stores = [describe(card.parent, users) for card in root.glob("*/card.json")]
    rows = sorted(stores, key=lambda row: -row.bytes)
    if (root / PICTURES).exists():
        rows.append(describe_pictures(root / PICTURES))
    return rows


def prune(root: Path, *, rehearse: bool) -> list[StoredTargets]:
    """Free the stores that no run uses, and the pictures where no store is left; return the rows of what went.

    A store that another process is working on stays. With ``rehearse`` nothing is freed.
    """
    rows = list_stores(root)
    idle = [row for row in rows if row.teacher is not None and not row.runs and free(row, rehearse=rehearse)]
    kept = [row for row in rows if row.teacher is not None and row not in idle]
    pictures = [row for row in rows if row.teacher is None and not kept and free(row, rehearse=rehearse)]
    return idle + pictures


def free(row: StoredTargets, *, rehearse: bool) -> bool:
    """Delete a store unless another process holds it; return whether it went."""
    store = Path(row.store)
    try:
        with ExitStack() as held:
            for folder in (store, *store.glob(f"{SHARDS}/*")):
                held.enter_context(locked(folder, "target store"))
            if not rehearse:
                shutil.rmtree(store)
    except RunError:
        return False
    return True


def describe(folder: Path, users: dict[Path, list[str]]) -> StoredTargets:
    """Return what a store holds, without reading its features."""
    card = folder / "card.json"
    facts, table, views = read_json(card), KeyTable(), 0
    for block in BlockJournal(folder / INDEX).new_blocks():
        table.add(block.keys, np.zeros(len(block.keys), np.int64), len(block.digests))
        views = max(views, len(block.digests))
    return StoredTargets(
        store=str(folder),
        teacher=" ".join(filter(None, (facts.get("teacher_model"), facts.get("teacher_weights")))) or "unknown",
        images=len(table),
        views=views,
        bytes=size_of(folder),
        age_days=age_of(folder, INDEX, "card.json"),
        runs=users.get(folder.resolve(), []),
    )


def describe_pictures(folder: Path) -> StoredTargets:
    """Return what the store of decoded pictures holds."""
    blocks = [block for _, block in Journal(folder / "journal.jsonl", dict[str, Any]).lines() if block]
    return StoredTargets(
        store=str(folder),
        teacher=None,
        images=len({key for block in blocks for key in block["keys"]}),
        views=None,
        bytes=size_of(folder),
        age_days=age_of(folder, "journal.jsonl"),
        runs=[],
    )


def size_of(folder: Path) -> int:
    """Return the size of a folder's files and those below it [bytes]."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def age_of(folder: Path, *names: str) -> float:
    """Return how long ago a folder or one of these files in it was written [days]."""
    written = max(path.stat().st_mtime for path in (folder, *(folder / name for name in names)) if path.exists())
    return round((time.time() - written) / DAY_SECONDS, 2)


def used_by() -> dict[Path, list[str]]:
    """Return the runs anywhere under runs/ that were made from each store, alone or with others.

    Raises:
        PrgkitError: a run's card is damaged, so that there is no telling what it uses.
    """
    users: dict[Path, list[str]] = {}
    linked = RUNS.glob("*/card.json")  # rglob follows no link to a folder
    for card in sorted({*linked, *RUNS.rglob("card.json")}):  # deeper lie trials: runs/NAME-compared/trials/X
        run = Run(card.parent)
        if not run.recipe_file.exists():  # a card of something else
            continue
        for store in run.target_stores:
            place = (card.parent / run.card.origin / store).resolve()
            users.setdefault(place, []).append(str(card.parent))
    return users


def describe_stores(rows: list[StoredTargets]) -> dict[str, str]:
    """Put the rows into words, by the name of their folder."""
    lines = {}
    for row in rows:
        size, images = readable_bytes(row.bytes), f"{row.images:,} image{'s' if row.images != 1 else ''}"
        age = "written today" if row.age_days < 1 else f"last written {row.age_days:.0f} days ago"
        if row.teacher is None:
            lines[Path(row.store).name] = f"{images}, {size}, {age}; decoded pictures, which only save time"
            continue
        runs = ", ".join(row.runs) or "no run"
        lines[Path(row.store).name] = f"{row.teacher}: {images}, {row.views} views, {size}, {age}; used by {runs}"
    return lines

"""The features of one part of a target store: a file [rows, D] float16 for each view."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.data.snapshot import packed
from prgkit.progress import silent
from prgkit.storage.atomic import flush, guarding_space, mapped, read_sealed, write_bytes, write_sealed
from prgkit.storage.locks import locked
from prgkit.teacher.feature_index import Block, digest

SCHEMA = "prgkit.targets/3"
INDEX = "index.bin"
SHARDS = "shards"
OLD_JOURNAL = "journal.jsonl"  # of prgkit.targets/2
OPEN_FILES = 256  # mapped at once: a store may have thousands, and a process may open some hundreds


class FeatureFiles:
    """The files of one folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width

    def write(self, row: int, features: NDArray[np.float16]) -> tuple[bytes, ...]:
        """Write rows [views, images, D] from ``row`` on and flush them; return a digest a view.

        Raises:
            DiskFullError: there is no space for them.
        """
        digests = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for view, block in enumerate(features):
            content = np.ascontiguousarray(block).tobytes()
            path = self._path(view)
            with guarding_space(path, features.nbytes), open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(row * self.width * 2)
                file.write(content)
                flush(file)
            digests.append(digest(content))
        return tuple(digests)

    def read(self, view: int, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return rows [n, D] of a view."""
        path = self._path(view)
        status = path.stat()
        return _mapped(path, status.st_ino, status.st_size // (2 * self.width), self.width)[rows]

    def damage(self, block: Block) -> str:
        """Return where a block is not what was written; "" where it is whole."""
        for view, expected in enumerate(block.digests):
            path, content = self._path(view), b""
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(block.row * self.width * 2)
                    content = file.read(len(block.keys) * self.width * 2)
            if digest(content) != expected:
                return f"{path.name}, rows {block.row} to {block.row + len(block.keys) - 1}"
        return ""

    def _path(self, view: int) -> Path:
        return self.folder / f"view-{view:03d}.f16"


@lru_cache(OPEN_FILES)
def _mapped(path: Path, _inode: int, rows: int, width: int) -> NDArray[np.float16]:
    return mapped(path, np.float16, (rows, width))


def upgrade(folder: Path) -> None:
    """Bring a store of prgkit.targets/2, whose journal was of JSON lines, to this form: its features stay."""
    old = folder / OLD_JOURNAL
    if not old.exists():
        return
    with locked(folder, "target store", wait=silent):
        blocks = []
        for line in old.read_bytes().split(b"\n")[:-1] if old.exists() else []:
            try:
                found = json.loads(line)
                digests = tuple(bytes.fromhex(one) for one in found["digests"])
                blocks.append(Block(found["row"], packed(found["keys"]), digests).packed())
            except (ValueError, TypeError, KeyError):  # a damaged line: its images are embedded again
                continue
        write_bytes(folder / INDEX, b"".join(blocks))
        write_sealed(folder / "card.json", {**read_sealed(folder / "card.json"), "schema": SCHEMA})
        old.unlink(missing_ok=True)

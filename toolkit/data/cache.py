"""Decoded pictures, known by their content and kept beside the targets, so that an epoch decodes nothing.

They only save time: a picture that is not here is decoded from its file, to the same pixels. A store can be deleted.

    targets/pictures/
        journal.jsonl    one line a block: where it starts, its images' keys, heights and widths, a digest
        pictures.u8      [height, width, 3] uint8, one after the other
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from prgkit.data.files import STORE
from prgkit.errors import DiskFullError, RunError
from prgkit.storage.atomic import flush, free_bytes, is_disk_full, mapped
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked

Pixels = NDArray[np.uint8]  # [height, width, 3]

PICTURES = "pictures"
BLOCK_BYTES = 16 << 20  # what a kill can lose
MOST_BYTES = 8 << 30  # no more than this in one store,
SHARE_OF_DISK = 0.1  # and of what is free when it is opened


class Block(BaseModel, strict=True):
    """A line of the journal: pictures that lie one after the other."""

    offset: int  # [bytes], of the first
    keys: list[str]
    heights: list[int]  # [pixels]
    widths: list[int]  # [pixels]
    digest: str

    @property
    def size_bytes(self) -> int:
        """How long its pictures are together."""
        return 3 * sum(height * width for height, width in zip(self.heights, self.widths, strict=True))


class DecodedImageCache:
    """A store of pictures, opened for reading; `adding` opens it for more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []  # where; these pictures are decoded again
        self._places: dict[str, tuple[int, int, int]] = {}  # key -> (offset, height, width)
        self._end = 0
        self._map: NDArray[np.uint8] | None = None
        self._journal = Journal(folder / "journal.jsonl", Block)
        self.refresh()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory map behind: another process maps the file itself."""
        return {**self.__dict__, "_map": None}

    def get(self, key: str) -> Pixels | None:
        """Return a picture [height, width, 3], mapped from the disk and not to be written to."""
        if (place := self._places.get(key)) is None:
            return None
        offset, height, width = place
        if self._map is None or len(self._map) < offset + 3 * height * width:
            self._map = np.asarray(mapped(self._file, np.uint8, (self._file.stat().st_size,)))
        return self._map[offset : offset + 3 * height * width].reshape(height, width, 3)

    @contextmanager
    def adding(self) -> Iterator[CacheWriter]:
        """Give what adds to the store; where another process is adding to it, or the disk is full, nothing is added."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.folder, "picture store"))
                self.refresh()
                adder = CacheWriter(self, room_bytes=room_bytes(self.folder))
            except RunError:
                adder = CacheWriter(self, room_bytes=0)
            yield adder
            adder.flush()

    def refresh(self) -> None:
        """Take in what has been journalled since, also by another process, if its content is what was journalled."""
        lines = self._journal.new_lines()
        blocks = [block for _, block in lines if block is not None]
        with ThreadPoolExecutor(2) as pool:
            for block, whole in zip(blocks, pool.map(self._is_whole, blocks), strict=True):
                if whole:
                    self._note(block)
                else:
                    self.damaged.append(f"{self._file.name}, {block.size_bytes:,} bytes from {block.offset:,}")
        self.damaged += [f"{self._journal.path.name}, line {number}" for number, block in lines if block is None]
        self._end = self._file.stat().st_size if self._file.exists() else 0

    def append(self, keys: Sequence[str], pictures: Sequence[Pixels]) -> None:
        """Append a block: written and flushed first, journalled after."""
        content = b"".join(picture.tobytes() for picture in pictures)
        block = Block(
            offset=self._end,
            keys=list(keys),
            heights=[len(picture) for picture in pictures],
            widths=[picture.shape[1] for picture in pictures],
            digest=_digest(content),
        )
        with open(self._file, "r+b" if self._file.exists() else "w+b") as file:
            file.seek(self._end)
            file.write(content)
            flush(file)
        self._journal.append(block)
        self._end += len(content)
        self._note(block)

    @property
    def _file(self) -> Path:
        return self.folder / STORE

    def _note(self, block: Block) -> None:
        offset = block.offset
        for key, height, width in zip(block.keys, block.heights, block.widths, strict=True):
            self._places[key] = (offset, height, width)
            offset += 3 * height * width

    def _is_whole(self, block: Block) -> bool:
        if not self._file.exists():
            return False
        with open(self._file, "rb") as file:
            file.seek(block.offset)
            return _digest(file.read(block.size_bytes)) == block.digest


class CacheWriter:
    """Collects pictures from any number of threads and appends them in blocks, as long as there is room."""

    def __init__(self, pictures: DecodedImageCache, *, room_bytes: int) -> None:
        self._pictures = pictures
        self._room_bytes = room_bytes
        self._waiting: dict[str, Pixels] = {}
        self._waiting_bytes = 0
        self._lock = Lock()

    def wants(self, key: str) -> bool:
        """Return whether a picture would be taken."""
        return self._room_bytes >= BLOCK_BYTES and key not in self._pictures

    def add(self, key: str, picture: Pixels) -> None:
        """Take a picture [height, width, 3]; one that is there already, or for which there is no room, is passed by."""
        with self._lock:
            if key in self._pictures or key in self._waiting or picture.nbytes > self._room_bytes:
                return
            self._waiting[key] = picture
            self._waiting_bytes += picture.nbytes
            self._room_bytes -= picture.nbytes
            if self._waiting_bytes >= BLOCK_BYTES:
                self.flush()

    def flush(self) -> None:
        """Append what is waiting; a full disk ends the adding, since every picture can do without its place here."""
        if not self._waiting:
            return
        try:
            self._pictures.append(list(self._waiting), list(self._waiting.values()))
        except (OSError, DiskFullError) as error:
            if not isinstance(error, DiskFullError) and not is_disk_full(error):
                raise
            self._room_bytes = 0
        self._waiting.clear()
        self._waiting_bytes = 0


def room_bytes(folder: Path) -> int:
    """Return how many bytes may still be added to the store at ``folder``, which may not be there yet."""
    used = (folder / STORE).stat().st_size if (folder / STORE).exists() else 0
    return min(MOST_BYTES - used, int(SHARE_OF_DISK * free_bytes(folder)))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()

"""The files of a target store: a binary journal of blocks, the features of each view, and in memory each image's place.

A record of the journal is one block of images:

    mark [8 bytes], digest of all that follows [16], first row [8], images [4], views [4], shard [4], shards [4],
    a key an image [16 each], a digest a view [16 each]

Numbers are little-endian; ``shards`` is 0 where the rows are in the store's own files. Appended records and those of
another store's journal lie one after the other. A kill leaves a torn last record, which the next one overwrites.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prgkit.config.shard import WHOLE, Shard
from prgkit.data.snapshot import KEY_BYTES, packed
from prgkit.storage.atomic import flush, guarding_space, mapped

SCHEMA = "prgkit.targets/3"
INDEX = "index.bin"
SHARDS = "shards"
OPEN_FILES = 256  # mapped at once: a store may have thousands, and a process may open some hundreds
MARK = b"prgblk\r\n"
HEADER = struct.Struct("<8s16sQIIII")
DIGEST_BYTES = 16
CHECKED_FROM = len(MARK) + DIGEST_BYTES
MENDED = b"\0"  # fills what could not be read, so that it is told of once
Keys = NDArray[np.uint8]  # [images, 16]


class Block(NamedTuple):
    """Images whose features lie one after the other in each view's file of a part of the store."""

    row: int  # of the first
    keys: Keys
    digests: tuple[bytes, ...]  # one a view
    shard: Shard = WHOLE

    def hex_keys(self) -> list[str]:
        """Return the keys as hex digits."""
        return [key.tobytes().hex() for key in self.keys]

    def packed(self) -> bytes:
        """Return its record."""
        body = self.keys.tobytes() + b"".join(self.digests)
        counts = struct.pack("<QIIII", self.row, len(self.keys), len(self.digests), *self.shard)
        return MARK + digest(counts + body) + counts + body


class Damage(NamedTuple):
    """Bytes of the journal that are no record, though records or nothing should stand there."""

    start: int
    end: int


class BlockJournal:
    """The file of blocks. Several processes may read it at once; one that appends has to hold a lock of its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damages: list[Damage] = []
        self._end = 0  # of what this object has read

    def new_blocks(self) -> Iterator[Block]:
        """Yield the blocks that this object has neither returned here nor appended; note what is no block."""
        if not self.path.exists() or self.path.stat().st_size <= self._end:
            return
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = self._end
            while (start := data.find(MARK, start)) >= 0:
                block, end = read_block(data, start)
                if block is None:
                    start += 1
                    continue
                self._note_gap(data[self._end : start])
                self._end = start = end
                yield block

    def append(self, block: Block) -> None:
        """Append a block and flush it to the disk, over what a kill left of a torn one."""
        record = block.packed()
        with guarding_space(self.path, len(record)), open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(record)
            flush(file)
        self._end += len(record)

    def mend(self) -> None:
        """Blank what is damaged: what it told of is lost, and named. To be called by the holder of the store's lock."""
        if self.damages:
            with open(self.path, "r+b") as file:
                for start, end in self.damages:
                    file.seek(start)
                    file.write(MENDED * (end - start))
                flush(file)
        self.damages = []

    def _note_gap(self, gap: bytes) -> None:
        if gap.strip(MENDED):
            self.damages.append(Damage(self._end, self._end + len(gap)))


def read_block(data: mmap.mmap, start: int) -> tuple[Block | None, int]:
    """Return the block whose record begins at ``start``, and where it ends; None where it is damaged or torn."""
    if start + HEADER.size > len(data):
        return None, start
    _, expected, row, images, views, number, count = HEADER.unpack_from(data, start)
    keys_end = start + HEADER.size + images * KEY_BYTES
    end = keys_end + views * DIGEST_BYTES
    if end > len(data) or digest(data[start + CHECKED_FROM : end]) != expected:
        return None, start
    keys = np.frombuffer(data[start + HEADER.size : keys_end], np.uint8).reshape(-1, KEY_BYTES)
    digests = tuple(data[place : place + DIGEST_BYTES] for place in range(keys_end, end, DIGEST_BYTES))
    return Block(row, keys, digests, Shard(number, count)), end


class Places(NamedTuple):
    """Where images are: numbers that the store understands [n], -1 for none, and how many views they have [n]."""

    places: NDArray[np.int64]
    views: NDArray[np.uint16]


class KeyTable:
    """The place of each key, in sorted arrays of 26 bytes an image.

    Of one key's entries the one of most views counts, of equals the last.
    """

    def __init__(self) -> None:
        self._columns = Columns.empty(0)
        self._new: list[Columns] = []

    def __len__(self) -> int:
        self._merge()
        return len(self._columns.high)

    def add(self, keys: Keys, places: NDArray[np.int64], views: int) -> None:
        """Add keys [n, 16] and their places [n]."""
        halves = keys.view(">u8").astype(np.uint64)
        self._new.append(Columns(halves[:, 0], halves[:, 1], places, np.full(len(places), views, np.uint16)))

    def find(self, keys: Sequence[str]) -> Places:
        """Return the places [n] and views [n] of keys, given as hex digits."""
        self._merge()
        columns, wanted = self._columns, packed(keys).view(">u8").astype(np.uint64)
        if not len(columns.high):
            return Places(np.full(len(wanted), -1, np.int64), np.zeros(len(wanted), np.uint16))
        high, low = wanted[:, 0], wanted[:, 1]
        at = np.searchsorted(columns.high, high)
        last = len(columns.high) - 1
        # Different keys with the same first half stand side by side, and come once in 10^12 tables of a million.
        while len(astray := np.flatnonzero(columns.equals(at, high) & (columns.low[np.minimum(at, last)] != low))):
            at[astray] += 1
        found = columns.equals(at, high)
        at = np.minimum(at, last)
        return Places(np.where(found, columns.places[at], -1), np.where(found, columns.views[at], 0).astype(np.uint16))

    def drop(self, first: int, end: int) -> int:
        """Forget the keys whose places are from ``first`` to before ``end``; return how many those are."""
        self._merge()
        inside = (self._columns.places >= first) & (self._columns.places < end)
        if count := int(inside.sum()):
            self._columns = self._columns.taken(np.flatnonzero(~inside))
        return count

    def _merge(self) -> None:
        if self._new:
            parts = [*reversed(self._new), self._columns]
            self._columns, self._new = Columns.empty(0), []  # or they would stay in memory while they are copied
            self._columns = merged(parts)


class Columns(NamedTuple):
    """Entries of a table [n]: the two halves of each key, its place, and how many views are there."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    places: NDArray[np.int64]
    views: NDArray[np.uint16]

    @classmethod
    def empty(cls, count: int) -> Columns:
        """Return room for so many entries."""
        types = (np.uint64, np.uint64, np.int64, np.uint16)
        return cls(*(np.empty(count, kind) for kind in types))  # type: ignore[arg-type]

    def equals(self, at: NDArray[np.int64], high: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell of each entry [n], one past the last included, whether its key's first half is ``high`` [n]."""
        inside = at < len(self.high)
        same: NDArray[np.bool_] = self.high[np.minimum(at, len(self.high) - 1)] == high
        return inside & same

    def taken(self, order: NDArray[np.int64]) -> Columns:
        """Return these entries in this order."""
        return Columns(*(column[order] for column in self))  # type: ignore[arg-type]


def merged(parts: list[Columns]) -> Columns:
    """Return the entries of all parts, the last of the list before the others, sorted by key and each key once.

    The list is emptied on the way: ten million entries fill a quarter of a gigabyte.
    """
    columns: list[NDArray[Any]] = list(Columns.empty(sum(len(part.high) for part in parts)))
    start = 0
    while parts:
        part = parts.pop()
        for into, column in zip(columns, list[NDArray[Any]](part), strict=True):
            into[start : start + len(column)] = column
        start += len(part.high)
    high, low, _, views = columns
    order = np.argsort(high, kind="stable")
    equal = np.flatnonzero(np.diff(high[order]) == 0)
    if len(equal):  # of those alone the second halves have to be looked at
        tied = np.union1d(equal, equal + 1)
        among = order[tied]
        order[tied] = among = among[np.lexsort((among, views[among], low[among], high[among]))]
        superseded = (np.diff(high[among]) == 0) & (np.diff(low[among]) == 0)
        order = np.delete(order, tied[:-1][superseded])
    del high, low, views
    for number in range(len(columns)):
        columns[number] = columns[number][order]
    return Columns(*columns)


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


def digest(content: bytes) -> bytes:
    """Return 16 bytes that change with any byte of ``content``."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()

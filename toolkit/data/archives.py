"""Images in a zip archive or in tar shards, read where they lie: nothing is ever extracted."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.config.shard import WHOLE, Shard
from prgkit.data.decode import UnreadableImage, suffix_of
from prgkit.data.files import (
    HEAD_BYTES,
    LARGEST_FILE_BYTES,
    LeftOut,
    folder_name,
    is_hidden,
    no_images,
    pictures_among,
    printable,
    read_head,
    read_span,
    too_large,
)
from prgkit.errors import ImagesError
from prgkit.progress import silent
from prgkit.storage.atomic import cache_folder, fingerprint, writing
from prgkit.storage.remote import RemoteFile, fetch

# What Python's readers of archives raise on damaged bytes, besides errors of their own.
DAMAGES = (OSError, EOFError, ValueError, IndexError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error)
TAR = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz)$", re.IGNORECASE)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}  # by the first bytes: the module that reads it
TAR_LABELS = (".cls", ".json")
LABEL_KEYS = ("label", "class_name", "class", "cls", "category", "target")  # of a WebDataset's .json members
LINKS = "links (pack with tar -h)"


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file holds pictures that are read where they lie."""
    return suffix_of(path.name) == ".zip" or TAR.search(path.name) is not None


class TarSource:
    """The images in tar files, read at offsets found when they were opened; labels are WebDataset's .cls or .json.

    Where there are at least as many tars as ``own.total``, those of other parts are neither fetched nor opened.
    """

    def __init__(
        self,
        spec: str,
        shards: Sequence[Path | RemoteFile],
        note: Callable[[str], None] = silent,
        own: Shard = WHOLE,
    ) -> None:
        self.spec = spec
        self.given = shards
        self.is_part = 0 < own.total <= len(shards)
        self.titles = tuple(TAR.sub(".tar", shard.name) for shard in shards)
        self.shards: tuple[Path, ...] = ()
        self.names: list[str] = []
        places: list[tuple[int, int, int]] = []
        label_places: list[tuple[int, int]] = []
        self.left_out = LeftOut()
        for number, given in enumerate(shards):
            if self.is_part and number % own.total != own.number:
                self.shards += (Path(),)
                continue
            place = fetch(given, note) if isinstance(given, RemoteFile) else given
            shard = plain_tar(place, note)
            self.shards += (shard,)
            members, links = list_tar(shard, place)
            spans = {name: (offset, size) for name, offset, size in members}
            kept, left_out = pictures_among(list(spans), partial(read_member_head, shard, spans), labels=TAR_LABELS)
            chosen = frozenset(kept)
            for name, offset, size in members:
                if name in chosen:
                    self.names.append(name)
                    places.append((number, offset, size))
                    label_places.append(next((spans[label] for label in label_members(name) if label in spans), (0, 0)))
            self.left_out = self.left_out.and_(left_out).and_(LeftOut(Counter({LINKS: links} if links else {})))
        if not self.names and not self.is_part:
            raise no_images(spec, self.shards[0].parent, self.left_out)
        # Arrays, not objects: ImageNet has 1.3 million members.
        self.places: NDArray[np.int64] = np.array(places, np.int64).reshape(-1, 3)  # [images, (shard, offset, size)]
        # [images, (offset, size)], size 0: no label
        self.label_places: NDArray[np.int64] = np.array(label_places, np.int64).reshape(-1, 2)
        # Of what is in them: so it is the same whether they lie here or elsewhere.
        self.bytes_of_tars = np.bincount(self.places[:, 0], self.places[:, 2], len(self.shards))

    def __len__(self) -> int:
        return len(self.names)

    def whole(self) -> TarSource:
        """Return the images of all tars."""
        return TarSource(self.spec, self.given) if self.is_part else self

    def states(self) -> list[str]:
        """Return what changes with each tar, opened or not: its name, its size and a server's word for its content."""
        return [
            f"{one.name} {one.size} {one.version}"
            if isinstance(one, RemoteFile)
            else f"{one.name} {one.stat().st_size}"
            for one in self.given
        ]

    def name(self, index: int) -> str:
        """Return ``shard.tar/member``."""
        return printable(f"{self.titles[int(self.places[index, 0])]}/{self.names[index]}")

    def label(self, index: int) -> str | None:
        """Return what the .cls or .json member says, else the folder inside the archive."""
        offset, size = (int(value) for value in self.label_places[index])
        label = label_in(self._read(index, offset, size)) if size else None
        return folder_name(printable(self.names[index])) if label is None else label

    def size(self, index: int) -> int:
        """Return the member's size [bytes]."""
        return int(self.places[index, 2])

    def fetch(self, index: int) -> bytes:
        """Read the member where it lies."""
        _, offset, size = (int(value) for value in self.places[index])
        refuse_climbing(self.names[index], self.name(index))
        return self._read(index, offset, size)

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes of the tar that an image lies in; a remote one whose copy had to make room is fetched again."""
        number = int(self.places[index, 0])
        shard, given = self.shards[number], self.given[number]
        if isinstance(given, RemoteFile) and not shard.exists():
            plain_tar(fetch(given), silent)
        return read_span(shard, self.name(index), offset=offset, size=size)


class ZipSource:
    """The images in a zip archive, read where they lie: no handle is shared, so no lock is needed."""

    def __init__(self, spec: str, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                by_name = {posix(member.filename): member for member in members}
                kept, self.left_out = pictures_among(list(by_name), partial(read_packed_head, archive, by_name))
        except (zipfile.BadZipFile, *DAMAGES) as error:
            raise ImagesError(f"{spec} is damaged: {error}", where=path, fix="copy or download it again") from error
        self.path = path
        if not kept:
            raise no_images(spec, path, self.left_out)
        chosen = frozenset(kept)
        pictures = sorted((m for m in members if posix(m.filename) in chosen), key=lambda m: m.filename)
        self.names = [posix(member.filename) for member in pictures]
        self.places: NDArray[np.int64] = np.array(  # [images, (header, packed bytes, bytes, method, CRC, flags)]
            [(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC, m.flag_bits) for m in pictures]
        )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path inside the archive."""
        return printable(self.names[index])

    def label(self, index: int) -> str | None:
        """Return the name of the folder inside the archive."""
        return folder_name(self.name(index))

    def size(self, index: int) -> int:
        """Return the member's size [bytes], unpacked."""
        return int(self.places[index, 2])

    def fetch(self, index: int) -> bytes:
        """Read and decompress the member, never past the size it was announced with."""
        header, packed_bytes, size, method, crc, flags = (int(value) for value in self.places[index])
        name = self.name(index)
        refuse_climbing(self.names[index], name)
        if flags & 1:
            raise UnreadableImage(name, "encrypted")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnreadableImage(name, f"zip compression method {method}; pack it again with deflate")
        if size > LARGEST_FILE_BYTES:
            raise UnreadableImage(name, too_large(size))
        local = read_span(self.path, name, offset=header, size=30)
        lengths = struct.unpack("<HH", local[26:30])  # of the name and of the extra field, which precede the data
        packed = read_span(self.path, name, offset=header + 30 + sum(lengths), size=packed_bytes)
        try:
            data = packed if method == zipfile.ZIP_STORED else zlib.decompressobj(-15).decompress(packed, size or 1)
        except zlib.error as error:
            raise UnreadableImage(name, "damaged inside the archive") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise UnreadableImage(name, "damaged inside the archive (its checksum differs)")
        return data


def list_tar(path: Path, shard: Path) -> tuple[list[tuple[str, int, int]], int]:
    """Return name, offset and size of every plain file in the uncompressed tar of ``shard``, and how many links it has.

    A hard link to a file before it is that file again.
    """
    files: list[tuple[str, int, int]] = []
    spans: dict[str, tuple[int, int]] = {}
    links = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, target = posix(member.name), posix(member.linkname)
                if member.isreg() and not member.issparse():
                    spans[name] = (member.offset_data, member.size)
                elif member.islnk() and target in spans:
                    spans[name] = spans[target]
                else:
                    links += (member.issym() or member.islnk()) and not is_hidden(name)
                    continue
                files.append((name, *spans[name]))
        return files, links
    except (tarfile.TarError, *DAMAGES) as error:
        fix = "copy or download it again"
        raise ImagesError(f"{shard.name} is not a whole tar file: {error}", where=shard, fix=fix) from error


def plain_tar(shard: Path, note: Callable[[str], None]) -> Path:
    """Return a tar that members can be read from where they lie: a compressed one is decompressed once, in the cache.

    Raises:
        ImagesError: it is damaged, or the cache cannot be written to.
        DiskFullError: it does not fit there.
    """
    head = read_head(shard)
    module = next((name for first, name in COMPRESSED.items() if head.startswith(first)), None)
    if module is None:
        return shard
    status, place = shard.stat(), fingerprint(str(shard.resolve()))
    plain = cache_folder("shards") / f"{place}-{fingerprint([status.st_size, status.st_mtime_ns])}.tar"
    if plain.exists():
        return plain
    for older in plain.parent.glob(f"{place}-*.tar"):
        older.unlink(missing_ok=True)
    note(f"decompressing {shard.name} to {plain.parent}, once")
    reader = importlib.import_module(module)
    try:
        with reader.open(shard) as packed, writing(plain) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (EOFError, zlib.error, getattr(reader, "LZMAError", EOFError), OSError) as error:
        if reason := getattr(error, "strerror", None):  # of the system: what is damaged has none
            fix = "set XDG_CACHE_HOME to a folder that can be written to, or decompress the shards to plain .tar files"
            raise ImagesError(f"{shard.name} cannot be decompressed: {reason}", where=plain.parent, fix=fix) from error
        raise ImagesError(f"{shard.name} is damaged: {error}", where=shard, fix="copy or download it again") from error
    return plain


def label_members(name: str) -> tuple[str, ...]:
    """Return where an image's label may be: WebDataset ends the base at the first dot, others at the last."""
    folder, slash, file = name.rpartition("/")
    bases = f"{folder}{slash}{file.split('.')[0]}", os.path.splitext(name)[0]
    return tuple(base + suffix for suffix in TAR_LABELS for base in bases)


def label_in(member: bytes) -> str | None:
    """Return the label in a .cls or .json member, as text; None where there is none."""
    text = member.decode("utf-8", "replace").strip()
    if not text.startswith(("{", "[", '"')):
        return text or None
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    labels = [facts.get(key) for key in LABEL_KEYS] if isinstance(facts, dict) else [facts]
    return next((str(label) for label in labels if isinstance(label, str | int) and not isinstance(label, bool)), None)


def read_member_head(shard: Path, spans: Mapping[str, tuple[int, int]], name: str) -> bytes:
    """Return the first bytes of a tar's member."""
    offset, size = spans[name]
    try:
        return read_span(shard, name, offset=offset, size=min(size, HEAD_BYTES))
    except UnreadableImage:
        return b""


def read_packed_head(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    """Return the first bytes of a zip's member; none of one that is damaged or encrypted."""
    try:
        with archive.open(members[name]) as file:
            return file.read(HEAD_BYTES)
    except Exception:  # what its decompressors raise on damaged bytes, and that there is none
        return b""


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ``{000..004}`` and ``{a,b}`` as a shell does, one name at a time: a range may be absurdly long."""
    # The package braceexpand would hold a whole range in memory before it gives the first name.
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    first, last, choices = braces.groups()
    options: Iterable[str] = choices.split(",") if choices else counted(first, last)
    for option in options:
        yield from expand_braces(pattern[: braces.start()] + option + pattern[braces.end() :])


def counted(first: str, last: str) -> Iterator[str]:
    """Count up or down from one bound to the other; where one begins with a zero, as in {008..012}, all are as wide."""
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    width, step = max(len(first), len(last)) if padded else 0, 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def refuse_climbing(member: str, name: str) -> None:
    """Refuse a member whose path leaves its archive; nothing is extracted, but nobody packs pictures like this."""
    if member.startswith("/") or re.match(r"[A-Za-z]:", member) or ".." in member.split("/"):
        raise UnreadableImage(name, "its path climbs out of the archive")


def posix(name: str) -> str:
    """Bring an archive's own spelling of a path to forward slashes without a leading ``./``."""
    return name.replace("\\", "/").removeprefix("./")

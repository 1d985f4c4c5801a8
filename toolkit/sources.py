"""Images that lie in files: a folder, a zip archive, tar shards; nothing is ever extracted."""

from __future__ import annotations

import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.decoding import UnreadableImage, image_suffixes
from prgkit.errors import ImagesError, nearest
from prgkit.files import as_on_disk, composed

# What Python's readers of archives raise on damaged bytes, besides errors of their own.
DAMAGES = (OSError, EOFError, ValueError, IndexError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error)
LARGEST_FILE_BYTES = 1 << 30  # no photograph; a zip member can claim any size
# Controls, line and paragraph separators, and what changes the direction of text (bidirectional marks).
ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
KINDS = "a folder, a .zip, tar shards such as shards-{000..004}.tar, torchvision:NAME/split or hf:owner/name/split"


class Source(Protocol):
    """Numbered images, read by any number of threads, forks and pickled copies at once."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the image's name for people."""

    def label(self, index: int) -> str | int | None:
        """Return what the source says the image shows."""

    def fetch(self, index: int) -> bytes | Image.Image:
        """Return the image as its source has it: encoded, or as a picture; or raise UnreadableImage."""


def open_path(spec: str) -> Source:
    """Open a folder, a .zip, a .tar or several tars named with braces; ``~`` and ``$VARIABLES`` are expanded.

    Raises:
        ImagesError: there is nothing there, it is damaged, or it holds no images.
    """
    path = Path(os.path.expandvars(os.path.expanduser(spec)))
    try:
        path = as_on_disk(path)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ImagesError(f"{spec[:80]} cannot be opened: {error.strerror}", fix=f"give {KINDS}") from error
    if path.is_dir():
        return FolderSource(spec, path)
    if path.suffix.lower() == ".tar":
        shards = [str(path)] if path.exists() else expand_braces(str(path))
        return TarSource(spec, [require(Path(shard), spec) for shard in shards])  # ends at the first that is missing
    require(path, spec)
    if path.suffix.lower() == ".zip":
        return ZipSource(spec, path)
    if path.suffix.lower() in image_suffixes():
        raise ImagesError(f"{spec} is a single image", where=path, fix="give the folder that holds it")
    fix = "decompress it to a plain .tar" if re.search(r"\.(tar\.\w+|tgz)$", path.name.lower()) else f"give {KINDS}"
    raise ImagesError(f"{spec} is neither a folder nor an archive that can be read", where=path, fix=fix)


class FolderSource:
    """The images in a folder and its sub-folders, sorted by path; hidden files are ignored."""

    def __init__(self, spec: str, root: Path) -> None:
        everything = sorted(walk(root))
        self.root = root
        self.paths = [path for path in everything if is_image(path)]
        if not self.paths:
            raise no_images(spec, root, everything)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path below the folder."""
        return printable(self.paths[index])

    def label(self, index: int) -> str | None:
        """Return the name of the sub-folder the image lies in."""
        return folder_name(self.name(index))

    def fetch(self, index: int) -> bytes:
        """Read the file."""
        return read_span(self.root / self.paths[index], self.name(index))


class TarSource:
    """The images in tar files, read at offsets found when they were opened; labels are WebDataset's .cls members."""

    def __init__(self, spec: str, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        self.names: list[str] = []
        places: list[tuple[int, int, int]] = []
        label_places: list[tuple[int, int]] = []
        everything: list[str] = []
        for number, shard in enumerate(self.shards):
            members = list_tar(shard)
            spans = {name: (offset, size) for name, offset, size in members if name.endswith(".cls")}
            for name, offset, size in members:
                if is_image(name):
                    self.names.append(name)
                    places.append((number, offset, size))
                    label_places.append(next((spans[cls] for cls in label_members(name) if cls in spans), (0, 0)))
                else:
                    everything.append(name)
        if not self.names:
            raise no_images(spec, self.shards[0].parent, everything)
        # Arrays, not objects: ImageNet has 1.3 million members.
        self.places: NDArray[np.int64] = np.array(places)  # [images, (shard, offset, size)]
        self.label_places: NDArray[np.int64] = np.array(label_places)  # [images, (offset, size)], size 0: no label

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return ``shard.tar/member``."""
        return printable(f"{self.shards[int(self.places[index, 0])].name}/{self.names[index]}")

    def label(self, index: int) -> str | None:
        """Return what the .cls member says, else the folder inside the archive."""
        offset, size = (int(value) for value in self.label_places[index])
        if size == 0:
            return folder_name(printable(self.names[index]))
        shard = self.shards[int(self.places[index, 0])]
        text = read_span(shard, self.name(index), offset=offset, size=size).decode("utf-8", "replace").strip()
        return text or None

    def fetch(self, index: int) -> bytes:
        """Read the member where it lies."""
        number, offset, size = (int(value) for value in self.places[index])
        refuse_climbing(self.names[index], self.name(index))
        return read_span(self.shards[number], self.name(index), offset=offset, size=size)


class ZipSource:
    """The images in a zip archive, read where they lie: no handle is shared, so no lock is needed."""

    def __init__(self, spec: str, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except (zipfile.BadZipFile, *DAMAGES) as error:
            raise ImagesError(f"{spec} is damaged: {error}", where=path, fix="copy or download it again") from error
        self.path = path
        pictures = sorted((m for m in members if is_image(posix(m.filename))), key=lambda m: m.filename)
        if not pictures:
            raise no_images(spec, path, [member.filename for member in members])
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


def read_span(path: Path, name: str, *, offset: int = 0, size: int | None = None) -> bytes:
    """Read ``size`` bytes at ``offset``, or the whole file, through a handle of its own.

    A handle per read costs some microseconds; in return there is no position to share between threads or forks,
    no lock, and no limit on the number of shards.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise UnreadableImage(name, "not a regular file")
        wanted = status.st_size if size is None else size
        if wanted > LARGEST_FILE_BYTES:
            raise UnreadableImage(name, too_large(wanted))
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(wanted)
    except OSError as error:
        raise UnreadableImage(name, (error.strerror or str(error)).lower()) from error
    except (OverflowError, ValueError) as error:  # an archive that speaks of a place beyond any disk
        raise UnreadableImage(name, "damaged inside the archive") from error
    if len(data) < wanted:
        raise UnreadableImage(name, "truncated: the file ends before the image does")
    return data


def list_tar(path: Path) -> list[tuple[str, int, int]]:
    """Return the name, offset and size of every plain file in an uncompressed tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [member for member in tar if member.isreg() and not member.issparse()]
            return [(posix(member.name), member.offset_data, member.size) for member in files]
    except (tarfile.TarError, *DAMAGES) as error:
        fix = "copy or download it again; a compressed tar has to be decompressed first"
        raise ImagesError(f"{path.name} is not a whole tar file: {error}", where=path, fix=fix) from error


def label_members(name: str) -> tuple[str, str]:
    """Return where an image's label may be: WebDataset ends the base at the first dot, others at the last."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.split('.')[0]}.cls", f"{os.path.splitext(name)[0]}.cls"


def walk(root: Path) -> Iterator[str]:
    """Give the files below ``root``, hidden ones aside, as paths relative to it; linked folders are followed once."""

    def refuse(error: OSError) -> None:
        raise ImagesError(f"a folder cannot be listed: {error.strerror}", where=error.filename, fix="allow reading it")

    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ``{000..004}`` and ``{a,b}`` as a shell does, one name at a time: a range may be absurdly long."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    first, last, choices = found.groups()
    # Zero-padded to the width of the first bound, as in {008..012}.
    options: Iterable[str] = (
        choices.split(",") if choices else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    )
    for option in options:
        yield from expand_braces(pattern[: found.start()] + option + pattern[found.end() :])


def require(path: Path, spec: str, *, fix: str = f"give {KINDS}") -> Path:
    """Return ``path`` where it exists; else say what is there instead."""
    if path.exists():
        return path
    parents = [parent for parent in path.absolute().parents if parent.is_dir()]
    siblings = os.listdir(parents[0]) if parents and os.access(parents[0], os.R_OK) else []
    missing = path.absolute().relative_to(parents[0]).parts[0] if parents else path.name
    unset = re.search(r"\$\{?(\w+)", str(path))
    hint = f"; ${unset[1]} is not set" if unset else nearest(missing, siblings)
    what = f"{spec} does not exist{hint}" if path.name in spec else f"{path.name} of {spec} does not exist{hint}"
    raise ImagesError(what, where=parents[0] if parents else None, fix=fix)


def no_images(spec: str, where: Path, others: Iterable[str]) -> ImagesError:
    """Build the error for a place without images, telling what it holds instead."""
    counts = Counter(os.path.splitext(name)[1].lower() or "files without a suffix" for name in others)
    found = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(4))
    fix = f"it holds {found}; images end in .jpg, .png, .webp, .tif" if found else "it is empty: name another"
    return ImagesError(f"{spec} holds no images", where=where, fix=fix)


def refuse_climbing(member: str, name: str) -> None:
    """Refuse a member whose path leaves its archive; nothing is extracted, but nobody packs pictures like this."""
    if member.startswith("/") or re.match(r"[A-Za-z]:", member) or ".." in member.split("/"):
        raise UnreadableImage(name, "its path climbs out of the archive")


def is_image(path: str) -> bool:
    """Tell whether a relative path looks like an image and no part of it is hidden."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))
    return not hidden and os.path.splitext(path)[1].lower() in image_suffixes()


def posix(name: str) -> str:
    """Bring an archive's own spelling of a path to forward slashes without a leading ``./``."""
    return name.replace("\\", "/").removeprefix("./")


def folder_name(name: str) -> str | None:
    """Return the last folder of a relative path, or None where there is none."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return folder or None


def printable(name: str) -> str:
    """Return a file's name as it is shown and compared: valid UTF-8, composed (NFC), and without a character that acts.

    A line break would end a row of a table, an escape commands a terminal, a mark of direction reorders the line.
    """
    text = composed(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def too_large(size: int) -> str:
    """Say that a file is larger than any image should be."""
    return f"{size / 2**30:.1f} GiB, and the limit is {LARGEST_FILE_BYTES / 2**30:.0f} GiB"

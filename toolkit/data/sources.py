"""Images that lie in files: a folder, a zip archive, tar shards; none is ever extracted."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.data.decode import CAMERA_RAW, UnreadableImage, image_suffixes, is_picture, suffix_of
from prgkit.errors import ImagesError, nearest
from prgkit.progress import silent
from prgkit.storage.atomic import as_on_disk, cache_folder, composed, fingerprint, writing

# What Python's readers of archives raise on damaged bytes, besides errors of their own.
DAMAGES = (OSError, EOFError, ValueError, IndexError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error)
LONGEST_SAID = 200  # characters of a path that is wrong
LARGEST_FILE_BYTES = 1 << 30  # no photograph; a zip member can claim any size
HEAD_BYTES = 4096
# There may be one for each picture, so none of them is looked into.
SIDECARS = frozenset({".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".cls", ".yaml", ".yml", ".md", ".html"})
TAR = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz)$", re.IGNORECASE)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}  # by the first bytes: the module that reads it
TAR_LABELS = (".cls", ".json")
LABEL_KEYS = ("label", "class_name", "class", "cls", "category", "target")  # of a WebDataset's .json members
# What a folder that prgkit wrote says of itself in the first lines of its card; decoded pictures have none.
OURS = re.compile(rb'"schema": "prgkit\.(run|bundle|targets)/')
CARDS = ("card.json", "manifest.json")
STORE = "pictures.u8"
# Where systems keep thumbnails, deleted files and finds of their own beside somebody's pictures, in lower case.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
    | {"thumbs", "thumbnails"}
)
LINKS = "links (pack with tar -h)"
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


def open_path(spec: str, note: Callable[[str], None] = silent) -> Source:
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
    if TAR.search(path.name):
        shards = [str(path)] if path.exists() else expand_braces(str(path))
        return TarSource(
            spec, [require(Path(shard), spec) for shard in shards], note
        )  # ends at the first that is missing
    require(path, spec)
    if path.suffix.lower() == ".zip":
        return ZipSource(spec, path)
    if suffix_of(path.name) in image_suffixes() or is_picture(read_head(path), path.name):
        raise ImagesError(f"{spec} is a single image", where=path, fix="give the folder that holds it")
    fix = "decompress it to a plain .tar" if re.search(r"\.tar\.\w+$", path.name.lower()) else f"give {KINDS}"
    raise ImagesError(f"{spec} is neither a folder nor an archive that can be read", where=path, fix=fix)


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file holds pictures that are read where they lie."""
    return suffix_of(path.name) == ".zip" or TAR.search(path.name) is not None


class FolderSource:
    """The images in a folder and its sub-folders, sorted by path; hidden files are ignored."""

    def __init__(self, spec: str, root: Path) -> None:
        self.root = root
        self.paths, self.left_out = pictures_among(sorted(walk(root)), lambda path: read_head(root / path))
        if not self.paths:
            raise no_images(spec, root, self.left_out)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path below the folder."""
        return printable(self.paths[index])

    def label(self, index: int) -> str | None:
        """Return the name of the sub-folder the image lies in."""
        return folder_name(self.name(index))

    def size(self, index: int) -> int:
        """Return the file's size [bytes]; -1 where it is gone."""
        return self._status(index, "st_size")

    def date(self, index: int) -> int:
        """Return when the file was changed [ns]; -1 where it is gone."""
        return self._status(index, "st_mtime_ns")

    def _status(self, index: int, part: str) -> int:
        try:
            return int(getattr(os.stat(self.root / self.paths[index]), part))
        except OSError:
            return -1

    def fetch(self, index: int) -> bytes:
        """Read the file."""
        return read_span(self.root / self.paths[index], self.name(index))


class TarSource:
    """The images in tar files, read at offsets found when they were opened; labels are WebDataset's .cls or .json."""

    def __init__(self, spec: str, shards: Sequence[Path], note: Callable[[str], None] = silent) -> None:
        self.shards = tuple(plain_tar(shard, note) for shard in shards)
        self.titles = tuple(TAR.sub(".tar", shard.name) for shard in shards)
        self.names: list[str] = []
        places: list[tuple[int, int, int]] = []
        label_places: list[tuple[int, int]] = []
        self.left_out = LeftOut()
        for number, shard in enumerate(self.shards):
            members, links = list_tar(shard, shards[number])
            spans = {name: (offset, size) for name, offset, size in members}
            kept, left_out = pictures_among(list(spans), partial(read_member_head, shard, spans), labels=TAR_LABELS)
            chosen = frozenset(kept)
            for name, offset, size in members:
                if name in chosen:
                    self.names.append(name)
                    places.append((number, offset, size))
                    label_places.append(next((spans[one] for one in label_members(name) if one in spans), (0, 0)))
            self.left_out = self.left_out.and_(left_out).and_(LeftOut(Counter({LINKS: links} if links else {})))
        if not self.names:
            raise no_images(spec, shards[0].parent, self.left_out)
        # Arrays, not objects: ImageNet has 1.3 million members.
        self.places: NDArray[np.int64] = np.array(places)  # [images, (shard, offset, size)]
        self.label_places: NDArray[np.int64] = np.array(label_places)  # [images, (offset, size)], size 0: no label

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return ``shard.tar/member``."""
        return printable(f"{self.titles[int(self.places[index, 0])]}/{self.names[index]}")

    def label(self, index: int) -> str | None:
        """Return what the .cls or .json member says, else the folder inside the archive."""
        offset, size = (int(value) for value in self.label_places[index])
        shard = self.shards[int(self.places[index, 0])]
        said = label_in(read_span(shard, self.name(index), offset=offset, size=size)) if size else None
        return folder_name(printable(self.names[index])) if said is None else said

    def size(self, index: int) -> int:
        """Return the member's size [bytes]."""
        return int(self.places[index, 2])

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
    found = [facts.get(key) for key in LABEL_KEYS] if isinstance(facts, dict) else [facts]
    return next((str(one) for one in found if isinstance(one, str | int) and not isinstance(one, bool)), None)


@dataclass(frozen=True)
class LeftOut:
    """What a source passed over."""

    kinds: Counter[str] = field(default_factory=Counter)  # how many files of each
    own: tuple[str, ...] = ()  # folders that prgkit wrote
    system: Counter[str] = field(default_factory=Counter)  # how many files in each of `SYSTEM_FOLDERS`

    def and_(self, other: LeftOut) -> LeftOut:
        """Return both together."""
        return LeftOut(self.kinds + other.kinds, self.own + other.own, self.system + other.system)

    def __str__(self) -> str:
        parts = []
        if count := self.kinds.total():
            what = "file that is no picture" if count == 1 else "files that are no pictures"
            parts.append(f"passed over {count:,} {what}: {most(self.kinds)}")
        if count := self.system.total():
            parts.append(f"passed over {count:,} in folders of thumbnails or of the system's: {most(self.system)}")
        if self.own:
            what = "folder" if len(self.own) == 1 else "folders"
            parts.append(f"passed over {len(self.own):,} {what} that prgkit wrote: {some(self.own)}")
        return "; ".join(parts)


def most(counts: Counter[str]) -> str:
    """Return the most frequent kinds with their counts."""
    kinds = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    return some([f"{count:,} {kind}" for kind, count in kinds], 6)


def pictures_among(
    names: Sequence[str], head_of: Callable[[str], bytes], *, labels: Container[str] = ()
) -> tuple[list[str], LeftOut]:
    """Return which of the files are pictures, by suffix or else by their first bytes, and what is left out.

    ``head_of`` reads the first bytes of a file; files with a suffix in ``labels`` are not worth a word.
    """
    suffixes = image_suffixes()
    own = own_folders(names, head_of)
    inside = tuple(f"{folder}/" for folder in own)
    kept: list[str] = []
    kinds: Counter[str] = Counter()
    system: Counter[str] = Counter()
    for name in names:
        suffix = suffix_of(name)
        if name.startswith(inside) or is_hidden(name):
            continue
        if folder := system_folder(name):
            system[f"in {folder}"] += 1
        elif suffix in suffixes or (suffix not in SIDECARS and is_picture(head_of(name), name)):
            kept.append(name)
        elif suffix not in labels:
            kinds[kind_of(suffix)] += 1
    return kept, LeftOut(kinds, own, system)


def system_folder(name: str) -> str | None:
    """Return the first part of a path that is one of `SYSTEM_FOLDERS`; None where none is."""
    return next((part for part in name.split("/")[:-1] if part.lower() in SYSTEM_FOLDERS), None)


def own_folders(names: Iterable[str], head_of: Callable[[str], bytes]) -> tuple[str, ...]:
    """Return the folders among the files that prgkit wrote: runs, bundles, stores; not one inside the other.

    Their golden pictures are copies of what a student was shown. The folder that was asked for is none of them.
    """
    found: list[str] = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder and (file == STORE or (file in CARDS and OURS.search(head_of(name)))):
            found.append(folder)
    found.sort(key=len)
    outermost: list[str] = []
    for folder in found:
        if not any(f"{folder}/".startswith(f"{other}/") for other in outermost):
            outermost.append(folder)
    return tuple(sorted(outermost))


def kind_of(suffix: str) -> str:
    """Name a kind of files that are no pictures, and what to do about them where something can be done."""
    if suffix in CAMERA_RAW:
        return f"{suffix} (camera raw: convert to JPEG)"
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "of other names" if suffix else "without a suffix"


def some(words: Sequence[str], most: int = 3) -> str:
    """Return the first few."""
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file; none of what is no regular file or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would wait forever
            return b""
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


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


def walk(root: Path) -> Iterator[str]:
    """Give the files below ``root``, hidden ones aside, as paths relative to it; linked folders are followed once."""

    def refuse(error: OSError) -> None:
        if os.path.basename(error.filename).lower() in SYSTEM_FOLDERS:  # nobody but the system may look into some
            return
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
    if os.path.exists(path):  # of the two spellings, the one that takes a name too long for one that is not there
        return path
    parents = [parent for parent in path.absolute().parents if os.path.isdir(parent)]
    siblings = os.listdir(parents[0]) if parents and os.access(parents[0], os.R_OK) else []
    missing = path.absolute().relative_to(parents[0]).parts[0] if parents else path.name
    unset = re.search(r"\$\{?(\w+)", str(path))
    hint = f"; ${unset[1]} is not set" if unset else nearest(missing, siblings)
    spec = spec if len(spec) < LONGEST_SAID else f"{spec[:LONGEST_SAID]}..."
    what = (
        f"{spec} does not exist{hint}"
        if path.name in spec or spec.endswith("...")
        else f"{path.name} of {spec} does not exist{hint}"
    )
    raise ImagesError(what, where=parents[0] if parents else None, fix=fix)


def no_images(spec: str, where: Path, left_out: LeftOut) -> ImagesError:
    """Build the error for a place without images, telling what it holds instead."""
    found = [most(counts) for counts in (left_out.kinds, left_out.system) if counts]
    found += [f"what prgkit wrote ({some(left_out.own)})"] if left_out.own else []
    fix = (
        f"it holds {', '.join(found)}; images end in .jpg, .png, .webp, .tif" if found else "it is empty: name another"
    )
    return ImagesError(f"{spec} holds no images", where=where, fix=fix)


def refuse_climbing(member: str, name: str) -> None:
    """Refuse a member whose path leaves its archive; nothing is extracted, but nobody packs pictures like this."""
    if member.startswith("/") or re.match(r"[A-Za-z]:", member) or ".." in member.split("/"):
        raise UnreadableImage(name, "its path climbs out of the archive")


def is_hidden(path: str) -> bool:
    """Tell whether a part of a relative path is hidden."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


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

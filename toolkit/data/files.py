"""Images that lie in files: those of a folder, and which files of a folder or an archive are images at all."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from prgkit.data.decode import CAMERA_RAW, UnreadableImage, image_suffixes, is_picture, suffix_of
from prgkit.errors import ImagesError, nearest, some
from prgkit.storage.atomic import composed

LONGEST_SAID = 200  # characters of a path that is wrong
LARGEST_FILE_BYTES = 1 << 30  # no photograph; a zip member can claim any size
HEAD_BYTES = 4096
# There may be one for each picture, so none of them is looked into.
SIDECARS = frozenset({".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".cls", ".yaml", ".yml", ".md", ".html"})
# What a folder that prgkit wrote says of itself in the first lines of its card; decoded pictures have none.
OURS = re.compile(rb'"schema": "prgkit\.(run|bundle|targets)/')
CARDS = ("card.json", "manifest.json")
STORE = "pictures.u8"
# Where systems keep thumbnails, deleted files and finds of their own beside somebody's pictures, in lower case.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}
    | {"thumbs", "thumbnails"}
)
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
    folders: list[str] = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder and (file == STORE or (file in CARDS and OURS.search(head_of(name)))):
            folders.append(folder)
    outermost: list[str] = []
    for folder in sorted(folders, key=len):
        if not any(f"{folder}/".startswith(f"{other}/") for other in outermost):
            outermost.append(folder)
    return tuple(sorted(outermost))


def kind_of(suffix: str) -> str:
    """Name a kind of files that are no pictures, and what to do about them where something can be done."""
    if suffix in CAMERA_RAW:
        return f"{suffix} (camera raw: convert to JPEG)"
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "of other names" if suffix else "without a suffix"


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file; none of what is no regular file or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would wait forever
            return b""
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
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
    content = [most(counts) for counts in (left_out.kinds, left_out.system) if counts]
    content += [f"what prgkit wrote ({some(left_out.own)})"] if left_out.own else []
    images = "images end in .jpg, .png, .webp, .tif"
    fix = f"it holds {', '.join(content)}; {images}" if content else "it is empty: name another"
    return ImagesError(f"{spec} holds no images", where=where, fix=fix)


def is_hidden(path: str) -> bool:
    """Tell whether a part of a relative path is hidden."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def folder_name(name: str) -> str | None:
    """Return the last folder of a relative path, or None where there is none."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return folder or None


def printable(name: str) -> str:
    """Return a file's name as it is shown and compared: valid UTF-8, composed (NFC), and without a character that acts.

    A line break would end a row of a table, an escape commands a terminal, a mark of direction reorders the line.
    """
    text = composed(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    return ACTING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def too_large(size: int) -> str:
    """Say that a file is larger than any image should be."""
    return f"{size / 2**30:.1f} GiB, and the limit is {LARGEST_FILE_BYTES / 2**30:.0f} GiB"

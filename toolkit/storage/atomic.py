"""Files that appear whole or not at all: atomic writes, fingerprints, and the disk space they need."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from prgkit.errors import DiskFullError, PrgkitError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray
    from pydantic import JsonValue

LARGEST_TEXT_BYTES = 2 << 20  # of a recipe or a list of classes: ImageNet-21k's names are a quarter of this
REMAKE = "delete it and run the command again that made it"
# How a disk says that it does not know what it is asked for: to flush, to set a file's mode, to map it into memory.
NOT_THERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENODEV)
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # the only way to read it is to set it


def read_text(path: Path, *, most_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """Read a text file that people write: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        ValueError: it cannot be read, is no text, or not one that a person wrote: a device, a pipe, or larger than
            ``most_bytes``; in words that can stand behind a colon.
    """
    try:
        if not path.is_file():  # reading /dev/zero never ends, and opening a pipe waits forever
            raise ValueError("it is not a regular file" if path.exists() else "No such file")
        if (size := path.stat().st_size) > most_bytes:
            raise ValueError(f"it is {readable_bytes(size)}, and the limit is {readable_bytes(most_bytes)}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    try:
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def as_on_disk(path: Path) -> Path:
    """Return a path in the Unicode form that its parts have on the disk: a name typed here may be a Mac's there."""
    if path.exists() or path.parent == path:
        return path
    folder = as_on_disk(path.parent)
    try:
        alike = [name for name in os.listdir(folder) if composed(name) == composed(path.name)]
    except OSError:
        return path
    return folder / alike[0] if len(alike) == 1 else path


def composed(name: str) -> str:
    """Return a name with its accents in one piece with their letters (NFC), the form in which names are compared."""
    return unicodedata.normalize("NFC", name)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed and renamed to ``path``, on failure removed.

    Raises:
        DiskFullError: the disk was full before the file was whole; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers that share a disk have processes of the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            flush(file)
            with where_there():
                os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries write files that only their owner can read
        os.replace(temporary, path)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(path, None) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush(file: BinaryIO | TextIO) -> None:
    """Bring what was written to an open file onto the disk, where the disk can be asked for it."""
    if file.writable():
        file.flush()
    with where_there():
        os.fsync(file.fileno())


@contextmanager
def where_there() -> Iterator[None]:
    """Do without what a disk does not know (FAT, SMB, 9p, FUSE), where that only makes things safer or faster."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def mapped(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return a file's numbers, mapped from the disk and not to be written to; read where the disk cannot map."""
    import numpy as np  # which the command line's help does not wait for

    with where_there():
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)
    return np.fromfile(path, dtype=dtype, count=math.prod(shape)).reshape(shape)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically, creating its folder."""
    with writing(path) as temporary, guarding_space(path, len(data)):
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically as UTF-8; a byte of a file's name that is none is written as an escape."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, fix: str = REMAKE) -> Any:
    """Read a JSON file.

    Raises:
        PrgkitError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PrgkitError(f"there is no {path.name}", where=path.parent) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PrgkitError(f"{path.name} is damaged: {error}", where=path, fix=fix) from error


def write_sealed(path: Path, value: dict[str, JsonValue]) -> None:
    """Write a JSON object with a digest of itself in it: a byte that flips on the disk is found when it is read."""
    content = {key: part for key, part in value.items() if key != "digest"}
    write_json(path, {**content, "digest": fingerprint(content)})


def read_sealed(path: Path, *, fix: str = REMAKE) -> dict[str, JsonValue]:
    """Read what `write_sealed` wrote, without its digest.

    Raises:
        PrgkitError: the file is missing or damaged; ``fix`` says what to do then.
    """
    value = read_json(path, fix=fix)
    if not isinstance(value, dict):
        raise PrgkitError(f"{path.name} is damaged: it holds no object", where=path, fix=fix)
    if value.pop("digest", None) != fingerprint(value):
        raise PrgkitError(f"{path.name} is damaged: its content is not what was written", where=path, fix=fix)
    return value


def cache_folder(*parts: str) -> Path:
    """Return a folder for what can be made again: in the user's cache, or where nobody is at home, in the system's."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry for the user: many containers
        root = Path(tempfile.gettempdir())
    return root.joinpath("prgkit", *parts)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that change when the JSON-able ``value`` does, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def require_space(
    folder: Path,
    needed_bytes: int,
    purpose: str,
    *,
    fix: str = "free some space, or choose another disk with --run and --targets",
) -> None:
    """Refuse before the work starts, not after hours of it.

    Raises:
        DiskFullError: ``folder``'s disk has less than ``needed_bytes`` free.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DiskFullError(
            f"{purpose} needs {readable_bytes(needed_bytes)}, and {readable_bytes(free)} are free",
            where=folder,
            fix=fix,
        )


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder that may not be there yet; a disk that cannot tell holds anything."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    with where_there():
        usage = shutil.disk_usage(existing)
        return usage.free if usage.total else sys.maxsize
    return sys.maxsize


@contextmanager
def guarding_space(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn the system's "no space left" into a DiskFullError that says how much was needed."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(path, needed_bytes) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a write failed for want of space; safetensors and onnx report it in words of their own."""
    if isinstance(error, DiskFullError):
        return False
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def disk_full(path: Path, needed_bytes: int | None) -> DiskFullError:
    """Build the error for a write to ``path`` that found the disk full."""
    need = f"; it needed {readable_bytes(needed_bytes)}" if needed_bytes else ""
    return DiskFullError(
        f"no disk space left for {path.name}{need}",
        where=path.parent,
        fix="free some space and run the same command again: finished work is kept",
    )


def readable_bytes(count: int) -> str:
    """Return a byte count as people read it: ``1.5 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"

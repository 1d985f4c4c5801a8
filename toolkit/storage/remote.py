"""Files that lie elsewhere, by their URL: fetched once into the user's cache, and read there."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prgkit.errors import ImagesError, PrgkitError, one_line
from prgkit.progress import silent
from prgkit.storage.atomic import cache_folder, fingerprint, flush, free_bytes, guarding_space, readable_bytes
from prgkit.storage.locks import locked

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
CHUNK_BYTES = 8 << 20
PAUSES_SECONDS = (0.5, 2.0, 8.0, 30.0)  # before each new attempt
SHARE_OF_DISK = 0.8  # of what is free or filled with copies already
COPIES = "remote"  # folder of the cache
Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """A file at a URL, as it is now."""

    url: str
    size: int | None  # bytes; None where the server does not say
    version: str  # changes with the content, as far as the server tells

    @property
    def name(self) -> str:
        """Its own name, without the path and the query of the URL."""
        return re.split(r"[?#]", self.url)[0].rstrip("/").rpartition("/")[2]

    @property
    def copy(self) -> Path:
        """Where its copy lies, once it is fetched."""
        return cache_folder(COPIES) / f"{fingerprint([self.url, self.size, self.version])}-{self.name}"


def is_url(text: str) -> bool:
    """Tell whether a place is named by a URL, such as ``s3://bucket/shards-000.tar``."""
    return URL.match(text) is not None


def look_up(url: str) -> RemoteFile:
    """Return what a server says of a file.

    Raises:
        ImagesError: it is not there, or cannot be reached after several attempts.
    """
    with saying_what_failed(url):
        found = persist(url, lambda: file_system(url).info(url))
    version = next((found[key] for key in ("ETag", "etag", "mtime", "LastModified") if found.get(key)), "")
    return RemoteFile(url, found.get("size"), str(version))


def fetch(remote: RemoteFile, note: Callable[[str], None] = silent) -> Path:
    """Return the copy of a file, which is made where there is none; where the disk fills, the oldest copies go.

    A broken connection is taken up again where it broke.

    Raises:
        ImagesError: the file cannot be had after several attempts; what came so far is kept.
        DiskFullError: there is no space for it.
    """
    copy = remote.copy
    if copy.exists():
        return copy
    with locked(copy.with_name(f"{copy.name}.fetching"), "download", wait=note):
        if copy.exists():  # another process has fetched it meanwhile
            return copy
        make_room(copy.parent, remote.size or 0)
        note(f"fetching {remote.url}" + (f" ({readable_bytes(remote.size)})" if remote.size else ""))
        part = copy.with_name(f"{copy.name}.part")
        with saying_what_failed(remote.url), guarding_space(part, remote.size or CHUNK_BYTES):
            persist(remote.url, lambda: download(remote, part))
            part.replace(copy)
    return copy


def download(remote: RemoteFile, part: Path) -> None:
    """Append what is missing of a file to ``part``.

    Raises:
        OSError: the connection ended before the file did.
    """
    with open(part, "ab") as file, file_system(remote.url).open(remote.url, "rb", block_size=CHUNK_BYTES) as source:
        if file.tell():
            try:
                source.seek(file.tell())
            except Exception:  # a server that gives whole files alone
                file.truncate(0)
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
        flush(file)
        if remote.size is not None and file.tell() != remote.size:
            have = file.tell()
            if have > remote.size:
                file.truncate(0)
            raise OSError(f"{have:,} of {remote.size:,} bytes came")


def make_room(folder: Path, needed_bytes: int) -> None:
    """Remove the oldest copies until one of ``needed_bytes`` fits beside the others."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
    used = sum(path.stat().st_size for path in copies)
    limit = SHARE_OF_DISK * (free_bytes(folder) + used)
    for path in copies:
        if used + needed_bytes <= limit:
            return
        used -= path.stat().st_size
        path.unlink(missing_ok=True)


def file_system(url: str) -> Any:
    """Return the file system of a URL, by fsspec."""
    import fsspec

    return fsspec.core.url_to_fs(url, skip_instance_cache=True)[0]


def persist(url: str, act: Callable[[], Result]) -> Result:
    """Return what ``act`` does, tried again after a pause where another attempt may mend what went wrong.

    Raises:
        ImagesError: the last attempt failed as well.
        Exception: what no attempt can mend.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return act()
        except (PermissionError, ImportError, ValueError, PrgkitError, MemoryError):
            raise
        except Exception as error:  # of a client of some kind of storage: each has its own
            if is_absent(error) or is_of_this_machine(error):
                raise
            reason = one_line(error.__cause__ or error)[:200]
        if pause is not None:
            time.sleep(pause)
    fix = "check the network and the server; the same command goes on from what came so far"
    raise ImagesError(f"{url} could not be fetched in {1 + len(PAUSES_SECONDS)} attempts: {reason}", fix=fix)


def is_absent(error: Exception) -> bool:
    """Tell whether a server said that it has no such file: fsspec's HTTP client says so of any failure."""
    if not isinstance(error, FileNotFoundError):
        return False
    if type(error.__cause__).__module__.startswith("aiohttp"):
        status = getattr(error.__cause__, "status", 0)  # none of a connection that failed
        return 400 <= status < 500 and status not in (408, 429)  # it timed out, or there were too many requests
    return not is_broken_off(error.__cause__)


def is_of_this_machine(error: Exception) -> bool:
    """Tell whether an error is the system's, such as a full disk, and not a client's, which may name an errno too."""
    own = type(error).__module__ == "builtins" and error.__cause__ is None
    return own and isinstance(error, OSError) and error.errno is not None and not is_broken_off(error)


def is_broken_off(error: BaseException | None) -> bool:
    """Tell whether an error is of a connection."""
    return isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError)  # two before Python 3.11


@contextmanager
def saying_what_failed(url: str) -> Iterator[None]:
    """Turn what no further attempt can mend into an error that says so."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImagesError(f"{url} does not exist", fix="check the name, and that the bucket may be read") from error
    except PermissionError as error:
        fix = "give this machine the right to read it, as the storage's own tools need it"
        raise ImagesError(f"{url} may not be read: {one_line(error)[:200]}", fix=fix) from error
    except (ImportError, ValueError) as error:  # fsspec's for a protocol that it does not know, or has no client for
        fix = "pip install 'prgkit[remote]' for http(s):// and s3://, gcsfs for gs://"
        raise ImagesError(f"{url} cannot be opened: {one_line(error)[:200]}", fix=fix) from error

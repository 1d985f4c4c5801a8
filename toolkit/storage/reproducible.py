"""Single files of a bundle that lose nothing and are the same each time: PNGs, arrays, an archive's entries."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.errors import ExportError
from prgkit.storage.atomic import write_bytes

Pixels = NDArray[np.uint8]


def member(name: str) -> zipfile.ZipInfo:
    """Return an archive entry without a clock or a system in it, so that equal content makes equal bytes."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def png(picture: Image.Image) -> bytes:
    """Encode a picture without loss and without metadata."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def as_pixels(data: bytes) -> Pixels:
    """Decode a PNG to [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


def read_png(path: Path) -> Pixels:
    """Read a PNG of the bundle."""
    try:
        return as_pixels(path.read_bytes())
    except OSError as error:
        raise ExportError(
            f"{path.name} cannot be read: {error}", where=path.parent, fix="make it again: prgkit export"
        ) from error


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one .npy file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> NDArray[Any]:
    """Read one .npy file of the bundle; nothing in it can run."""
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ExportError(
            f"{path.name} cannot be read: {error}", where=path.parent, fix="make it again: prgkit export"
        ) from error
    return array

"""TensorRT's timing cache: what one build found fastest on this GPU, so that the next need not measure it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prgkit.errors import DiskFullError
from prgkit.storage.atomic import cache_folder, write_bytes


def cache_path(version: str, gpu: str) -> Path:
    """Return the file for a TensorRT version and a GPU, in the user's own cache: a cache in a bundle is a stranger's.

    TensorRT itself keys a cache by its version and the properties of the device, and refuses another's.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt-{version}-{gpu}")
    return cache_folder(f"{name}.timing")


def attach_cache(config: Any, path: Path) -> bool:
    """Give a builder the cache in ``path``, or a new one where there is none that TensorRT accepts; returns which."""
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    if known and attached(config, known):
        return True
    attached(config, b"")
    return False


def keep_cache(config: Any, path: Path) -> None:
    """Write what a build has measured, whole or not at all; where it cannot be written, only time is lost."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        write_bytes(path, bytes(cache.serialize()))
    except (OSError, DiskFullError):
        return


def attached(config: Any, content: bytes) -> bool:
    """Tell whether TensorRT takes a serialised cache as one of this version and this GPU."""
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))

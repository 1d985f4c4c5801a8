"""What lies in a bundle besides its models, by digest: a changed image, label or logit is named, and not measured."""

from __future__ import annotations

from pathlib import Path

from prgkit.errors import ExportError, PrgkitError
from prgkit.export.bundle.manifest import PARTS, VECTORS
from prgkit.storage.atomic import read_json, sha256


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the bundle's `PARTS`, and of its class vectors, by its path in the bundle.

    One that was published without images has none of the parts.
    """
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*"))
    paths += [folder / VECTORS] if (folder / VECTORS).exists() else []
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def require_unchanged(folder: Path, part: str) -> None:
    """Compare one part of a bundle, a folder or a file, with what its manifest says was exported.

    Raises:
        ExportError: a file is missing or is not what was exported.
    """
    fix = "copy the bundle again, or make it again: prgkit export"
    try:
        stated = read_json(folder / "manifest.json").get("checksums", {})
    except (PrgkitError, AttributeError):  # `open_bundle` says so
        return
    for name, digest in stated.items():
        if name != part and not name.startswith(f"{part}/"):
            continue
        path = folder / name
        if not path.is_file():
            raise ExportError(f"{name} is missing from the bundle", where=folder, fix=fix)
        if sha256(path) != digest:
            raise ExportError(f"{name} is damaged: its content is not what was exported", where=path, fix=fix)

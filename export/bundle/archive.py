"""A bundle as one file: an archive of what its manifest describes, and of nothing else."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from prgkit.errors import ExportError
from prgkit.export.bundle.artifact_cache import files_of
from prgkit.export.bundle.bundle import files_in, open_bundle
from prgkit.export.bundle.checksums import require_unchanged
from prgkit.export.bundle.manifest import FILE, PARTS, Manifest
from prgkit.storage.atomic import require_space, writing
from prgkit.storage.find import run_name
from prgkit.storage.reproducible import member


def pack(folder: Path) -> Path:
    """Write a bundle beside itself as NAME.zip, which unzips to a folder NAME, and return where it is.

    Equal bundles make equal bytes: the entries are sorted, know no clock, and are stored as they are. Weights and PNGs
    would hardly get smaller, and what deflate makes of them differs between versions of zlib.

    Raises:
        ExportError: the bundle is damaged or lacks a file, or NAME.zip is there already and is something else.
        DiskFullError: there is no room for it.
    """
    bundle = open_bundle(folder)
    for part in PARTS:
        require_unchanged(folder, part)
    archive = archive_of(folder, bundle.manifest)
    if archive.exists() and not is_packed_bundle(archive):
        raise ExportError(
            f"{archive.name} is there already and is not a packed bundle",
            where=archive,
            fix="move it away, or rename it",
        )
    paths = sorted(packed_files(folder, bundle.manifest), key=lambda path: path.relative_to(folder).as_posix())
    for path in paths:
        if not path.is_file():
            name, fix = path.relative_to(folder).as_posix(), "copy the bundle again, or make it again: prgkit export"
            raise ExportError(f"{name} is missing from the bundle", where=folder, fix=fix)
    require_space(archive.parent, sum(path.stat().st_size for path in paths), "the archive", fix="free some space")
    for leftover in archive.parent.glob(f".{archive.name}.*.part"):  # of one that was killed while it packed
        leftover.unlink(missing_ok=True)
    with writing(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as opened:
        for path in paths:
            entry = member(f"{archive.stem}/{path.relative_to(folder).as_posix()}")
            entry.file_size = path.stat().st_size  # said beforehand, so that only what needs it is written as zip64
            with open(path, "rb") as source, opened.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return archive


def archive_of(folder: Path, manifest: Manifest) -> Path:
    """Return where a bundle is packed to: beside it, under the name of its run."""
    parent = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    return parent / f"{run_name(manifest.run.name)}.zip"


def left_out(folder: Path) -> list[str]:
    """Return the names of what lies in a bundle's folder and is not packed: reports, ticks, whatever was put there."""
    manifest = open_bundle(folder, verify=()).manifest
    packed = {path.relative_to(folder).parts[0] for path in packed_files(folder, manifest)}
    names = {path.name for path in folder.iterdir()} - packed
    return sorted(name for name in names if not name.startswith(".lock"))


def packed_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files that the manifest describes, and the manifest and README themselves."""
    return [folder / FILE, folder / "README.md", *bundle_files(folder, manifest)]


def bundle_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files that a manifest describes: models, images and what is known of these; nobody else's."""
    models = [path for artifact in manifest.artifacts for part in files_of(folder, artifact) for path in files_in(part)]
    return [*models, *(folder / name for name in manifest.checksums)]


def is_packed_bundle(path: Path) -> bool:
    """Tell whether a file is an archive that `pack` wrote, of whatever run."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/manifest.json") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False

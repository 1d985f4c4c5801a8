"""Artifacts that an export has finished: written down one by one, so that the next export takes them as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prgkit.errors import ExportError, PrgkitError
from prgkit.export.bundle.bundle import require_artifact, verify_artifact
from prgkit.export.runtimes.engine_metadata import engine_metadata_path, load_engine_metadata
from prgkit.export.runtimes.fidelity import Facts
from prgkit.storage.atomic import fingerprint, read_sealed, writing
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked
from prgkit.storage.run import TICKS

RELABELLED = "relabelled"  # what `building` calls the folder that takes the place of one with other classes
JOURNAL = "finished.jsonl"  # in a folder that is being built; in a bundle the manifest says the same

Artifact = dict[str, Any]  # a manifest's entry


class ArtifactCache:
    """What is finished in a folder that is being built, and what can be taken over from the bundle it will replace.

    An artifact is the same if it was made from the same: its entry carries a fingerprint of the student, the images
    that it was compared on, the options, and the versions of what wrote it. Its parity travels with it.
    """

    def __init__(self, folder: Path, *, bundle: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        self.bundle = bundle
        self.note = note
        self.entries: list[Artifact] = [entry for entry in journalled(folder) if is_whole(folder, entry)]

    def get(self, name: str, made_from: Any, make: Callable[[], Artifact]) -> Artifact:
        """Return the entry of an artifact that is finished, or of one that ``make`` finishes now."""
        if (entry := self.take(name, made_from)) is None:
            return self.add(make(), made_from)
        self.note(f"{entry['file']}: finished before, and made from the same; it is kept")
        return entry

    def take(self, name: str, made_from: Any) -> Artifact | None:
        """Return the entry of an artifact that was made from the same before, with its file in place, or None."""
        for folder, entries in ((self.folder, self.entries), (self.bundle, in_bundle(self.bundle))):
            for entry in entries:
                if (entry["name"], entry.get("made_from")) != (name, fingerprint(made_from)):
                    continue
                if folder == self.folder:
                    return entry
                if is_whole(folder, entry):
                    return self.bring(entry)
        return None

    def not_kept(self, name: str, made_from: Any) -> Facts | None:
        """Return what was found of an artifact that was made from the same and not kept, or None."""
        for found in in_bundle(self.bundle, "not_kept"):
            if (found["name"], found.get("made_from")) == (name, fingerprint(made_from)):
                return found
        return None

    def carry_over(
        self, artifacts: Sequence[Artifact], origin: Any, *, decided: Callable[[str], bool]
    ) -> tuple[list[Artifact], list[Facts]]:
        """Take over what else the bundle holds of the same student, and what was not kept; say what it loses.

        Args:
            artifacts: what this export has made.
            origin: what its FP32 file is made from.
            decided: tells of an artifact's name whether this export was to decide on it, whatever came of that.
        """
        before, names = in_bundle(self.bundle), {entry["name"] for entry in artifacts}
        same = ("onnx-fp32", fingerprint(origin)) in [(entry["name"], entry.get("made_from")) for entry in before]
        others = [entry for entry in before if entry["name"] not in names]
        kept = [one for one in others if same and not decided(one["name"]) and is_whole(self.bundle, one)]
        for told, entries in (
            ("stays in the bundle, not asked for, and of the same student", kept),
            ("no longer in the bundle", [entry for entry in others if entry not in kept]),
        ):
            if entries:
                self.note(f"{told}: {', '.join(entry['file'] for entry in entries)}")
        refused = [one for one in in_bundle(self.bundle, "not_kept") if same and not decided(one["name"])]
        return [self.bring(entry) for entry in kept], refused

    def bring(self, entry: Artifact) -> Artifact:
        """Give an artifact of the bundle a second name here, or copy it, and write down that it is finished."""
        for path in files_of(self.bundle, entry):
            with writing(self.folder / path.name) as temporary:
                link(str(path), str(temporary))
        Journal(self.folder / JOURNAL, Artifact).append(entry)
        self.entries.append(entry)
        return entry

    def add(self, entry: Artifact, made_from: Any) -> Artifact:
        """Write down that an artifact is finished: its file is whole, and was compared."""
        known = {**entry, "made_from": fingerprint(made_from)}
        Journal(self.folder / JOURNAL, Artifact).append(known)
        self.entries.append(known)
        return known

    def leave_only(self, artifacts: Iterable[Artifact]) -> None:
        """Remove what else is finished: a killed export may have been of another student, or asked for more."""
        wanted = {path for entry in artifacts for path in files_of(self.folder, entry)}
        for path in {path for entry in self.entries for path in files_of(self.folder, entry)} - wanted:
            path.unlink(missing_ok=True)


@contextmanager
def building(folder: Path, name: str = "new") -> Iterator[Path]:
    """Give a folder beside ``folder``, known by ``name``, that takes its place when all went well.

    When not, or after a kill, only artifacts that were finished stay in it, for the next export. Measurements made on
    the old bundle (its ``bench`` folder) and what was ticked in it move into the new one: they are the user's.
    """
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in (name, "old"))
    put_back(folder)
    shutil.rmtree(old, ignore_errors=True)
    clear_unfinished(new)
    if name != RELABELLED:  # what a killed relabel has left is of no use to an export
        shutil.rmtree(folder.with_name(f".{folder.name}.{RELABELLED}"), ignore_errors=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise ExportError(
            "the folder holds something that is not a bundle", where=folder, fix="remove it, or choose another"
        )
    new.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        for kept in ("bench", TICKS.parent.name):
            if (folder / kept).exists() and not (new / kept).exists():
                shutil.copytree(folder / kept, new / kept)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        (folder / JOURNAL).unlink(missing_ok=True)  # the manifest says the same
        shutil.rmtree(old, ignore_errors=True)
    finally:
        clear_unfinished(new)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a bundle, where there is one, for this process alone.

    Raises:
        RunError: another process holds it.
    """
    with locked(folder, "bundle") if (folder / "manifest.json").exists() else nullcontext():
        yield


def put_back(folder: Path) -> None:
    """Give a folder its name again where `building` was killed between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove all of a folder but what is finished in it; where nothing is, the folder itself."""
    entries = [entry for entry in journalled(folder) if is_whole(folder, entry)]
    if not entries:
        shutil.rmtree(folder, ignore_errors=True)
        return
    kept = {path for entry in entries for path in files_of(folder, entry)} | {folder / JOURNAL}
    for path in set(folder.iterdir()) - kept:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_whole(folder: Path, entry: Artifact) -> bool:
    """Tell whether an artifact's file, and an engine's card with it, are there and what they were."""
    try:
        require_artifact(entry, folder)
        verify_artifact(folder, entry)
        if entry["format"] == "engine":
            load_engine_metadata(folder / entry["file"])
    except (PrgkitError, OSError):
        return False
    return True


def files_of(folder: Path, entry: Artifact) -> list[Path]:
    """Return an artifact's file, and with an engine's its card."""
    path = folder / entry["file"]
    return [path, engine_metadata_path(path)] if entry["format"] == "engine" else [path]


def journalled(folder: Path) -> Iterator[Artifact]:
    """Yield what a folder's journal says is finished; a damaged line says nothing."""
    lines = Journal(folder / JOURNAL, Artifact).lines()
    yield from (entry for _, entry in lines if entry is not None and "name" in entry)


def in_bundle(folder: Path, part: str = "artifacts") -> list[dict[str, Any]]:
    """Return the entries of a part of a bundle's manifest, where there is one that can be read."""
    try:
        manifest = read_sealed(folder / "manifest.json")
    except PrgkitError:
        return []
    entries = manifest.get(part) if isinstance(manifest, dict) else None
    return [entry for entry in entries or [] if isinstance(entry, dict) and "name" in entry]


def link(source: str, target: str) -> None:
    """Let a second name stand for a file, as what changes is written to a file of its own; else copy it."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)

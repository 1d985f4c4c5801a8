"""Artifacts that an export has finished: written down one by one, so that the next export takes them as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prgkit.errors import PrgkitError
from prgkit.export.bundle import require_artifact, verify_artifact
from prgkit.export.card import card_path, load_card
from prgkit.export.floor import Facts
from prgkit.files import fingerprint, read_json, writing
from prgkit.run import append_line, numbered_lines

JOURNAL = "finished.jsonl"  # in a folder that is being built; in a bundle the manifest says the same

Artifact = dict[str, Any]  # a manifest's entry


class Finished:
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
                    for path in files_of(folder, entry):
                        with writing(self.folder / path.name) as temporary:
                            shutil.copyfile(path, temporary)
                    return self.add(entry, made_from)
        return None

    def refused(self, name: str, made_from: Any) -> Facts | None:
        """Return what was found of an artifact that was made from the same and not kept, or None."""
        for found in in_bundle(self.bundle, "not_kept"):
            if (found["name"], found.get("made_from")) == (name, fingerprint(made_from)):
                return found
        return None

    def add(self, entry: Artifact, made_from: Any) -> Artifact:
        """Write down that an artifact is finished: its file is whole, and was compared."""
        known = {**entry, "made_from": fingerprint(made_from)}
        append_line(self.folder / JOURNAL, known)
        self.entries.append(known)
        return known

    def leave_only(self, artifacts: Iterable[Artifact]) -> None:
        """Remove what else is finished: a killed export may have been of another student, or asked for more."""
        wanted = {path for entry in artifacts for path in files_of(self.folder, entry)}
        for path in {path for entry in self.entries for path in files_of(self.folder, entry)} - wanted:
            path.unlink(missing_ok=True)


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
            load_card(folder / entry["file"])
    except (PrgkitError, OSError):
        return False
    return True


def files_of(folder: Path, entry: Artifact) -> list[Path]:
    """Return an artifact's file, and with an engine's its card."""
    path = folder / entry["file"]
    return [path, card_path(path)] if entry["format"] == "engine" else [path]


def journalled(folder: Path) -> Iterator[Artifact]:
    """Yield what a folder's journal says is finished; a damaged line says nothing."""
    if (folder / JOURNAL).exists():
        yield from (entry for _, entry in numbered_lines(folder / JOURNAL) if entry is not None and "name" in entry)


def in_bundle(folder: Path, part: str = "artifacts") -> list[dict[str, Any]]:
    """Return the entries of a part of a bundle's manifest, where there is one that can be read."""
    try:
        manifest = read_json(folder / "manifest.json")
    except PrgkitError:
        return []
    entries = manifest.get(part) if isinstance(manifest, dict) else None
    return [entry for entry in entries or [] if isinstance(entry, dict) and "name" in entry]

"""Artifacts that an export has finished: written down one by one, so that the next export takes them as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path

from pydantic import JsonValue

from prgkit.errors import ExportError, PrgkitError
from prgkit.export.bundle.bundle import verify_artifact
from prgkit.export.bundle.engine_metadata import engine_metadata_path, load_engine_metadata
from prgkit.export.bundle.fidelity import int8_sentence
from prgkit.export.bundle.manifest import (
    ENGINE,
    FILE,
    PARTS,
    QDQ,
    SCHEMA,
    VECTORS,
    Artifact,
    Manifest,
    NotKept,
    Quantization,
    read_manifest,
    require_inside,
)
from prgkit.progress import silent
from prgkit.storage.atomic import fingerprint, read_json, writing
from prgkit.storage.journal import Journal
from prgkit.storage.locks import locked

RELABELLED = "relabelled"  # what `building` calls the folder that takes the place of one with other classes
JOURNAL = "finished.jsonl"  # in a folder that is being built; in a bundle the manifest says the same

Origin = dict[str, JsonValue]  # all that decides an artifact


class ArtifactCache:
    """What is finished in a folder that is being built, and what can be taken over from the bundle it replaces.

    An artifact is the same if it was made from the same: it carries a fingerprint of the student, the images that it
    was compared on, the options, and the versions of what wrote it. Its parity travels with it.
    """

    def __init__(self, folder: Path, *, bundle: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        self.bundle = bundle
        self.note = note
        self.before = manifest_of(bundle)
        self.artifacts = [artifact for artifact in journalled(folder) if is_whole(folder, artifact)]

    def get(self, name: str, made_from: Origin, make: Callable[[], Artifact]) -> Artifact:
        """Return an artifact that is finished, or one that ``make`` finishes now."""
        return self.take(name, made_from) or self.add(make(), made_from)

    def take(self, name: str, made_from: Origin) -> Artifact | None:
        """Return an artifact that was made from the same before, with its file in place, and say so; or None."""
        wanted = (name, fingerprint(made_from))

        def is_it(artifact: Artifact) -> bool:
            return (artifact.name, artifact.made_from) == wanted

        found = next(filter(is_it, self.artifacts), None)
        before = next(filter(is_it, self.before.artifacts if self.before else ()), None)
        if found is None and before is not None and is_whole(self.bundle, before):
            found = self.bring(before)
        if found is not None:
            self.note(f"{found.file}: finished before, and made from the same; it is kept")
        return found

    def not_kept(self, name: str, made_from: Origin) -> Quantization | None:
        """Return what became of an INT8 file that was made from the same and not kept, or None."""
        for facts in self.before.not_kept if self.before else ():
            if isinstance(facts, Quantization) and (facts.name, facts.made_from) == (name, fingerprint(made_from)):
                return facts
        return None

    def carry_over(
        self, artifacts: Sequence[Artifact], origin: Origin | None, *, decided: Callable[[str], bool], margin: float
    ) -> tuple[list[Artifact], list[NotKept]]:
        """Take over what else the bundle holds of the same student, and what was not kept; say what it loses.

        Args:
            artifacts: what this export has made.
            origin: what its FP32 file is made from; None where nothing can be taken over.
            decided: tells of an artifact's name whether this export was to decide on it, whatever came of that.
            margin: by how many percent points INT8 may be worse; what was kept by a larger one may not stay.
        """
        if self.before is None:
            return [], []
        before, names = self.before.artifacts, {artifact.name for artifact in artifacts}
        same = ("onnx-fp32", fingerprint(origin)) in [(artifact.name, artifact.made_from) for artifact in before]
        others = [artifact for artifact in before if artifact.name not in names]
        stay = [other for other in others if same and not decided(other.name) and is_whole(self.bundle, other)]
        refused = {one.name: facts for one in stay if (facts := refused_by(margin, one, before))}
        stay, others = ([one for one in group if one.name not in refused] for group in (stay, others))
        for artifact in before:
            if artifact.name in refused:
                self.note(f"no longer in the bundle: {artifact.file}: {int8_sentence(refused[artifact.name])}")
        for message, group in (
            ("stays in the bundle, not asked for, and of the same student", stay),
            ("no longer in the bundle", [other for other in others if other not in stay]),
        ):
            if group:
                self.note(f"{message}: {', '.join(artifact.file for artifact in group)}")
        not_kept = [facts for facts in self.before.not_kept if same and not decided(facts.name)]
        return [self.bring(artifact) for artifact in stay], [*not_kept, *refused.values()]

    def bring(self, artifact: Artifact) -> Artifact:
        """Give an artifact of the bundle a second name here, or copy it, and write down that it is finished."""
        for path in files_of(self.bundle, artifact):
            target = self.folder / path.name
            if path.is_dir():
                remove(target)
                shutil.copytree(path, target, copy_function=link)
                continue
            with writing(target) as temporary:
                link(str(path), str(temporary))
        return self.write_down(artifact)

    def add(self, artifact: Artifact, made_from: Origin) -> Artifact:
        """Write down that an artifact is finished: its file is whole, and was compared."""
        return self.write_down(artifact.model_copy(update={"made_from": fingerprint(made_from)}))

    def write_down(self, artifact: Artifact) -> Artifact:
        """Add a finished artifact to the journal."""
        Journal(self.folder / JOURNAL, Artifact).append(artifact)
        self.artifacts.append(artifact)
        return artifact

    def give_way(self, name: str) -> None:
        """Do nothing: in a folder that is being built nothing is claimed of an artifact before it is finished."""

    def leave_only(self, artifacts: Iterable[Artifact]) -> None:
        """Remove what else is finished: a killed export may have been of another student, or asked for more."""
        wanted = {path for artifact in artifacts for path in files_of(self.folder, artifact)}
        for path in {path for artifact in self.artifacts for path in files_of(self.folder, artifact)} - wanted:
            remove(path)


@contextmanager
def building(folder: Path, name: str = "new", *, note: Callable[[str], None] = silent) -> Iterator[Path]:
    """Give a folder beside ``folder``, known by ``name``, that takes its place when all went well.

    When not, or after a kill, only artifacts that were finished stay in it, for the next export. What no export made
    of the old one moves into the new one: measurements, ticks, whatever the user put there; ``note`` is told what
    cannot, since the new one has a file of that name.
    """
    folder = folder.resolve()  # a link to a bundle stays a link
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in (name, "old"))
    put_back(folder)
    shutil.rmtree(old, ignore_errors=True)
    clear_unfinished(new)
    if name != RELABELLED:  # what a killed relabel has left is of no use to an export
        shutil.rmtree(folder.with_name(f".{folder.name}.{RELABELLED}"), ignore_errors=True)
    if folder.exists() and any(folder.iterdir()) and not is_bundle(folder):
        raise ExportError(
            "the folder holds something that is not a bundle", where=folder, fix="remove it, or choose another"
        )
    new.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        for path in of_the_user(folder):  # they have two names until the old folder goes: a kill loses none
            if os.path.lexists(new / path.name):
                note(f"{path.name}, which no export made, makes way for the bundle's own of that name")
            else:
                link_all(path, new / path.name)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        (folder / JOURNAL).unlink(missing_ok=True)  # the manifest says the same
        shutil.rmtree(old, ignore_errors=True)
    finally:
        clear_unfinished(new)


def require_elsewhere(folder: Path, command: str, *, fix: str, stands_in: Path | None = None) -> None:
    """Refuse to replace the folder that the user stands in: the shell would be left in one that is gone.

    ``stands_in`` is where that is, by default where this process is.

    Raises:
        ExportError: it is that folder, or lies in it.
    """
    if (stands_in or Path.cwd()).is_relative_to(folder.resolve()):
        what = f"{command} puts another folder in the place of the one that you stand in"
        raise ExportError(what, where=folder, fix=fix)


def of_the_user(folder: Path) -> Iterator[Path]:
    """Yield what lies in a bundle and no export made: measurements, ticks, whatever the user put there.

    Where its manifest cannot be read, what is called as an export calls its files counts as made by one.
    """
    manifest = manifest_of(folder)
    made = {FILE, "README.md", JOURNAL, VECTORS, *PARTS}
    for artifact in manifest.artifacts if manifest else ():
        made |= {path.name for path in files_of(folder, artifact)}
    # An engine is in no manifest after a kill while another was built in its place.
    names = (".lock*", ".*.part", "model.*.tensorrt*.engine*" if manifest else "model.*")
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in made and not any(fnmatch(path.name, name) for name in names):
            yield path


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder's manifest is one of a bundle's, of whatever version: other programs have one, too."""
    try:
        content = read_json(folder / FILE)
    except PrgkitError:
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith(SCHEMA.partition("/")[0])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a bundle, where there is one, for this process alone.

    Raises:
        RunError: another process holds it.
    """
    with locked(folder, "bundle") if is_bundle(folder) else nullcontext():
        yield


def put_back(folder: Path) -> None:
    """Give a folder its name again where `building` was killed between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove all of a folder but what is finished in it; where nothing is, the folder itself."""
    artifacts = [artifact for artifact in journalled(folder) if is_whole(folder, artifact)]
    if not artifacts:
        shutil.rmtree(folder, ignore_errors=True)
        return
    kept = {path for artifact in artifacts for path in files_of(folder, artifact)} | {folder / JOURNAL}
    for path in set(folder.iterdir()) - kept:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_whole(folder: Path, artifact: Artifact) -> bool:
    """Tell whether an artifact's file, and an engine's metadata with it, are there and what they were."""
    try:
        require_inside(artifact.file, folder)
        verify_artifact(folder, artifact)
        if artifact.format == "engine":
            load_engine_metadata(folder / artifact.file)
    except (PrgkitError, OSError):
        return False
    return True


def refused_by(margin: float, artifact: Artifact, beside: Sequence[Artifact]) -> Quantization | None:
    """Return how an INT8 file stands to FP32 where that is not good enough; an engine is as good as what it is of."""
    source = next((one for one in beside if one.format == QDQ), artifact)
    facts = (source if (artifact.format, artifact.precision) == (ENGINE, "int8") else artifact).quantization
    if facts is None or facts.comparison is None or facts.comparison.holds(margin):
        return None
    return facts.model_copy(update={"name": artifact.name, "kept": False, "margin": margin, "made_from": None})


def files_of(folder: Path, artifact: Artifact) -> list[Path]:
    """Return an artifact's file or folder, and with an engine's its metadata."""
    path = folder / artifact.file
    return [path, engine_metadata_path(path)] if artifact.format == "engine" else [path]


def journalled(folder: Path) -> Iterator[Artifact]:
    """Yield what a folder's journal says is finished; a damaged line says nothing."""
    yield from (artifact for _, artifact in Journal(folder / JOURNAL, Artifact).lines() if artifact is not None)


def manifest_of(folder: Path) -> Manifest | None:
    """Return a bundle's manifest, where there is one that can be read."""
    try:
        return read_manifest(folder)
    except PrgkitError:
        return None


def link(source: str, target: str) -> None:
    """Let a second name stand for a file, as what changes is written to a file of its own; else copy it."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def link_all(source: Path, target: Path) -> None:
    """Let second names stand for a file, or for all files of a folder; a symbolic link stays one."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))

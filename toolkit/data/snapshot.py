"""Which images a run was made from: kept in the run, so that what is added to a folder later changes nothing unsaid."""

from __future__ import annotations

import hashlib
import io
import shlex
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prgkit.config.prompts import canonical
from prgkit.config.recipe import Recipe
from prgkit.config.sections import ImageSpec
from prgkit.data.index import ImageIndex
from prgkit.data.sources import ImageSource, lies_in_files, number_of, open_images
from prgkit.errors import ImagesError, RunError
from prgkit.progress import Progress
from prgkit.storage.atomic import write_bytes
from prgkit.storage.remote import is_url
from prgkit.storage.run import Run

KEY_BYTES = 16
MOST_READ = 1000
Arrays = dict[str, NDArray[Any]]


class Snapshot(NamedTuple):
    """The images that a run was made from."""

    keys: frozenset[str]  # of their content
    labelled_keys: frozenset[str]  # those of the few images whose labels are learned from
    files: NDArray[np.uint64]  # a number for each file's name and size, sorted
    dated_files: NDArray[np.uint64]  # the same of its date as well
    labels: NDArray[np.uint64] | None  # a number for each labelled image's file and its label; None: not known


def save_snapshot(run: Run, image_index: ImageIndex, labelled: ImageIndex | None, classes: Sequence[str]) -> None:
    """Write into a run that has learned nothing yet what it is going to learn from and be judged on."""
    source = image_index.source
    files, dated = ((source.file_digests(dated=each) if lies_in_files(source.spec) else []) for each in (False, True))
    arrays: Arrays = {
        "images": packed(image_index.keys),
        "labelled": packed(labelled.keys if labelled else ()),
        "files": np.sort(np.array(files, dtype=np.uint64)),
        "dated": np.sort(np.array(dated, dtype=np.uint64)),
    }
    if labelled is not None:
        arrays["labels"] = label_digests(labelled.source, classes)[1]
    sealed: dict[str, Any] = {**arrays, "digest": digest_of(arrays)}
    buffer = io.BytesIO()
    np.savez(buffer, **sealed)
    if run.snapshot_file.exists():  # of an earlier start, maybe of other images: what was told of those goes
        run.quality_file.unlink(missing_ok=True)
    write_bytes(run.snapshot_file, buffer.getvalue())


def load_snapshot(run: Run) -> Snapshot | None:
    """Return what a run was made from; None where that is not known.

    Raises:
        RunError: the file that says it is damaged.
        OSError: it cannot be read.
    """
    if not run.snapshot_file.exists():
        return None
    content = io.BytesIO(run.snapshot_file.read_bytes())  # what the system refuses is no damage
    try:
        with np.load(content, allow_pickle=False) as archive:
            # "labels" is there where labels were learned from.
            names = {"images", "labelled", "files", "dated", *archive.files} - {"digest"}
            arrays = {name: archive[name] for name in names}
            whole = bytes(archive["digest"]) == bytes(digest_of(arrays))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        whole = False
    if not whole:
        raise RunError(
            f"{run.snapshot_file.name}, which says what the run was made from, is damaged",
            where=run.snapshot_file,
            fix="delete it; the images that are there now are then taken to be those",
        )
    keys, labelled_keys = (frozenset(bytes(key).hex() for key in arrays[name]) for name in ("images", "labelled"))
    return Snapshot(keys, labelled_keys, arrays["files"], arrays["dated"], arrays.get("labels"))


def restrict_to_snapshot(
    image_index: ImageIndex, run: Run, progress: Progress, *, all_needed: bool = False, labelled: bool = False
) -> ImageIndex:
    """Return those of the images that a run was made from, and say how many others there are, and how many are gone.

    Raises:
        RunError: some are gone, and ``all_needed``.
        ImagesError: all are gone.
    """
    snapshot = load_snapshot(run)
    if snapshot is None:
        return image_index
    keys = snapshot.labelled_keys if labelled else snapshot.keys
    positions = np.flatnonzero([key in keys for key in image_index.keys])
    others, gone = len(image_index) - len(positions), len(keys) - len(positions)
    spec, what = image_index.source.spec, "labelled images" if labelled else "images"
    if gone and all_needed:
        raise RunError(
            f"{gone:,} of the {len(keys):,} {what} that this run was made from are gone from {spec}, or have changed",
            where=run.folder,
            fix=f"put them back to go on, or start anew with what is there: {restart_command(run)}",
        )
    if not len(positions):
        raise ImagesError(
            f"none of the {len(keys):,} {what} that this run was made from is in {spec} any more", where=spec
        )
    if others:
        stranger = next(position for position, key in enumerate(image_index.keys) if key not in keys)
        name = image_index.source.name(int(image_index.indices[stranger]))
        progress.note(
            f"{spec} holds {others:,} {what} that this run was not made from, e.g. {name}: it does not learn from them "
            f"and is not judged on them; to learn from all: {restart_command(run)}"
        )
    if gone:
        progress.note(f"{gone:,} of the {len(keys):,} {what} that this run was made from are gone from {spec}")
    return image_index.subset(positions)


def report_changes(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Say of a finished run whether its images, or the labels that it learned from, are others now."""
    snapshot, spec = load_snapshot(run), recipe.data.labelled_spec
    if snapshot is None:
        return
    if lies_in_files(recipe.data.images):
        report_images(run, recipe.data.images, snapshot, progress)
    if spec is None or not recipe.learns_labels or snapshot.labels is None or is_url(spec.source):
        return
    if spec.labels is not None or lies_in_files(spec.source):
        report_labels(run, spec, recipe.classes, snapshot.labels, progress)


def report_images(run: Run, spec: str, snapshot: Snapshot, progress: Progress) -> None:
    """Say what is new among the images, and what is gone, by names and sizes.

    Of those that have another date than then, up to `MOST_READ` are read: a copied folder has new dates and old images.
    """
    try:
        source = open_images(spec).with_grey(run.image_facts.grey_range)
    except ImagesError as error:
        progress.note(f"the images that it was made from are not there any more: {error.what}")
        return
    files = np.array(source.file_digests(), dtype=np.uint64)
    new = np.flatnonzero(~np.isin(files, snapshot.files))
    dates = source.file_digests(dated=True)
    touched = np.setdiff1d(np.flatnonzero(~np.isin(dates, snapshot.dated_files)), new)[:MOST_READ]
    unread = {skipped.name for skipped in run.image_facts.unreadable}  # from the start: of no content that is known
    known = [index for index in touched.tolist() if source.name(index) not in unread]
    changed = [index for index in known if is_changed(source, index, snapshot)]
    new = np.union1d(new, changed).astype(np.int64)
    gone = len(np.setdiff1d(snapshot.files, files))
    if told := in_words([source.name(index) for index in new.tolist()], gone, what="files"):
        progress.note(f"{spec} is not what the run was made from any more: {told}{restart_command(run)}")


def report_labels(
    run: Run, spec: ImageSpec, classes: Sequence[str], learned: NDArray[np.uint64], progress: Progress
) -> None:
    """Say which labels are new and how many are gone, by the images' names and sizes; no image is read."""
    try:
        source = open_images(spec)
        labelled, digests = label_digests(source, classes)
    except ImagesError as error:
        progress.note(f"the labels that it learned from are not there any more: {error.what}")
        return
    new = labelled[~np.isin(digests, learned)]
    gone = len(np.setdiff1d(learned, digests))
    if told := in_words([source.name(index) for index in new.tolist()], gone, what="labels"):
        place = spec.labels or spec.source
        progress.note(f"{place} does not hold the labels that it learned from any more: {told}{restart_command(run)}")


def label_digests(source: ImageSource, classes: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the images that have a label, and a number for the name, the size and the label of each."""
    labels, files = source.labels(range(len(source)), classes), source.file_digests()
    labelled = [index for index, label in enumerate(labels) if label is not None]
    states = (f"{files[index]} {canonical(str(labels[index]))}".encode() for index in labelled)
    return np.array(labelled, dtype=np.int64), np.array([number_of(state) for state in states], dtype=np.uint64)


def in_words(new: Sequence[str], gone: int, *, what: str) -> str:
    """Tell what is new and what is gone, up to the command that learns from all; nothing where that is none."""
    changes = [f"{len(new):,} {what} are new or changed, e.g. {new[0]}"] if new else []
    changes += [f"{gone:,} that were there are gone or changed"] if gone else []
    return f"{'; '.join(changes)}. It has not learned from what is new; to learn from all: " if changes else ""


def is_changed(source: ImageSource, index: int, snapshot: Snapshot) -> bool:
    """Tell whether an image's content is none that the run was made from."""
    try:
        return source.key(index) not in snapshot.keys
    except ImagesError:  # it can no longer be read
        return True


def restart_command(run: Run) -> str:
    """Return the command that starts a run from what is there now, and how to begin with this one's student."""
    recipe, folder = shlex.quote(str(run.recipe_file)), shlex.quote(f"{run.folder}-2")
    command = f"prgkit distill {recipe} --run {folder}"
    if not run.weights.exists():
        return command
    return f"{command} (and --set student.initial={shlex.quote(str(run.folder))} to begin with this student)"


def packed(keys: Sequence[str]) -> NDArray[np.uint8]:
    """Return content keys as bytes [keys, 16]."""
    return np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, KEY_BYTES)


def digest_of(arrays: Arrays) -> NDArray[np.uint8]:
    """Return 16 bytes that change with any byte of the arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)

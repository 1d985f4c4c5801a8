"""A teacher's pass in shards: each process embeds a part of the images into its own files, a join makes one store.

    targets/<fingerprint>/shards/00002-of-00008/
        manifest.json    what the shard was made from and by, and whether it is finished
        index.bin, view-000.f16, ...  as in the store itself

A join copies no features: it takes the records of the shards' indexes into the store's.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue

from prgkit import __version__
from prgkit.config.recipe import Recipe
from prgkit.config.sections import ImageSpec
from prgkit.config.shard import Shard
from prgkit.data.index import ImageIndex, grey_of_whole, held_out_places, read_image_index
from prgkit.data.sources import ImageSource
from prgkit.errors import PrgkitError, TargetsError, some
from prgkit.progress import Progress
from prgkit.storage.atomic import write_sealed, writing
from prgkit.storage.documents import read_document
from prgkit.storage.locks import locked
from prgkit.storage.run_card import SkippedFile
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import open_targets
from prgkit.teacher.feature_files import INDEX, SHARDS, Block, BlockJournal, KeyTable, digest
from prgkit.teacher.feature_store import FeatureStore, Load, embed, existing_store
from prgkit.teacher.prompt_context import load_context
from prgkit.teacher.weights import check_teacher
from prgkit.workers import available_cores

MANIFEST = "manifest.json"
SCHEMA = "prgkit.shard/1"
MAKERS = ("torch", "open_clip_torch")  # whose versions decide the last bits of a feature


class ShardManifest(BaseModel, frozen=True):
    """What a shard was made from and by: its manifest.json."""

    schema_version: Literal["prgkit.shard/1"] = Field("prgkit.shard/1", alias="schema")
    shard: int
    shards: int
    teacher: dict[str, JsonValue]  # as the store's card has it
    views: dict[str, JsonValue]
    stored_views: int  # of an image that is not held out
    versions: dict[str, str]  # of what computed it
    source: str
    listed: int  # images in the whole source, or tars of them
    listing: str  # changes with the name of any of them
    finished: bool = False
    images: int = 0  # readable and distinct in this part
    duplicates: int = 0  # exact copies within it
    unreadable: tuple[SkippedFile, ...] = ()
    index_digest: str = ""
    seconds: float = 0.0  # of the command that finished it


class JoinedShards(BaseModel, frozen=True):
    """What a join has made."""

    store: str
    shards: int
    images: int  # distinct ones, of all shards
    duplicates: int  # images of which an exact copy is in another shard
    unreadable: int
    seconds: float  # that the shards took together


def embed_shard(
    recipe: Recipe, targets_root: Path, shard: Shard, progress: Progress, load: Load | None = None
) -> list[ShardManifest]:
    """Have each teacher embed one part of the images, and of the evaluation images, into files of its own.

    The same command goes on where it was stopped.

    Raises:
        TargetsError: the part was begun by another teacher or another version.
    """
    started, load = time.monotonic(), load or teacher_loader(progress)
    for config in recipe.teacher:
        check_teacher(config, note=progress.note)
        load_context(config)
    targets = open_targets(recipe, targets_root, load, shard)
    targets.prompts(recipe.classes, recipe.templates, load, progress)  # names are refused before the hours
    images = read_image_index(recipe.data.image_spec, progress, known=targets, shard=shard)
    begun = [begin(store, recipe, images) for store in targets.stores]
    held_out = held_out_places(images.keys) < recipe.data.held_out
    views = np.where(held_out, 1, 1 + recipe.views.count)
    embed_part(targets.stores, images, views, recipe, load, progress)
    if recipe.data.evaluation_spec is not None:
        judged = read_judged(images.source, recipe.data.evaluation_spec, shard, targets, progress)
        embed_part(targets.stores, judged, np.ones(len(judged), int), recipe, load, progress)
    seconds = round(time.monotonic() - started, 1)
    return [finish(store, manifest, images, seconds) for store, manifest in zip(targets.stores, begun, strict=True)]


def join_shards(recipe: Recipe, targets_root: Path, progress: Progress) -> list[JoinedShards]:
    """Check the shards of each teacher's pass and make them a part of its store; no feature is copied.

    Raises:
        TargetsError: a shard is missing, damaged, or from another teacher, precision or version.
    """
    joined = []
    for config in recipe.teacher:
        store = existing_store(config, recipe.views, targets_root)
        found = shard_counts(store.folder) if store is not None else []
        if store is None or not found:
            raise TargetsError(
                f"there are no shards of {config.name} to join",
                where=store.folder if store is not None else targets_root,
                fix="embed them first: prgkit targets RECIPE --shard 0/N, and so on to N-1/N",
            )
        sets = [examine(store, total, 1 + recipe.views.count) for total in found]
        whole = [one for one in sets if not one.problems]
        if not whole:
            raise refusal(store, max(sets, key=lambda one: len(one.manifests)))
        for left in (one for one in sets if one.problems):
            progress.note(f"not joined: {left.total} other shards in {store.folder / SHARDS}: {left.problems[0].what}")
        joined += [join_set(store, one, progress) for one in whole]
    return joined


def read_judged(
    learned: ImageSource, spec: ImageSpec, shard: Shard, known: Container[str], progress: Progress
) -> ImageIndex:
    """Read a part of the evaluation images, deep greys in the range of all that is learned from, not of one part."""
    judged = read_image_index(spec, progress, known=known, grey=learned.grey or "measured", shard=shard)
    if learned.grey is not None or judged.source.grey is None:
        return judged
    return read_image_index(spec, progress, known=known, grey=grey_of_whole(learned), shard=shard)


def embed_part(
    stores: Sequence[FeatureStore],
    images: ImageIndex,
    views: NDArray[np.int64],
    recipe: Recipe,
    load: Load,
    progress: Progress,
) -> None:
    """Embed images, if the part has any, and say what of the part is damaged and embedded again."""
    for store in stores:
        for place in store.damaged:
            progress.note(f"damaged in {store.folder}: {place}; what was in it is embedded again")
    embed(stores, images, views=views, recipe=recipe, teacher=load, progress=progress)


def begin(store: FeatureStore, recipe: Recipe, images: ImageIndex) -> ShardManifest:
    """Write the manifest of a part that is not finished, or go on with one that was begun.

    Raises:
        TargetsError: it was begun by another teacher, or by another version and is not joined.
    """
    listed, listing = images.source.listing()
    manifest = ShardManifest(
        shard=store.shard.number,
        shards=store.shard.total,
        teacher=store.card.teacher,
        views=store.card.views,
        stored_views=1 + recipe.views.count,
        versions={"prgkit": __version__, **{name: version(name) for name in MAKERS}},
        source=recipe.data.images,
        listed=listed,
        listing=listing,
    )
    if (store.own_folder / MANIFEST).exists():
        earlier, expected = read_manifest(store.own_folder), manifest
        if is_joined(FeatureStore(store.folder, store.config), store.shard):
            expected = manifest.model_copy(update={"versions": earlier.versions})
        if difference := difference_between(earlier, expected):
            raise TargetsError(
                f"shard {store.shard} was begun {difference}",
                where=store.own_folder,
                fix="delete this folder, and the same command embeds it anew",
            )
        if earlier.finished and (earlier.listing, earlier.stored_views) == (listing, manifest.stored_views):
            return expected  # what is finished stays so for a join meanwhile
    write_sealed(store.own_folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
    return manifest


def finish(store: FeatureStore, manifest: ShardManifest, images: ImageIndex, seconds: float) -> ShardManifest:
    """Write into a part's manifest that it is finished."""
    finished = manifest.model_copy(
        update={
            "finished": True,
            "images": len(images),
            "duplicates": images.duplicates,
            "unreadable": images.unreadable,
            "index_digest": index_digest(store.own_folder),
            "seconds": seconds,
        }
    )
    write_sealed(store.own_folder / MANIFEST, finished.model_dump(mode="json", by_alias=True))
    return finished


class Problem(NamedTuple):
    """A shard that cannot be joined: why, and whether its folder has to go before it is embedded again."""

    shard: Shard
    what: str
    delete: bool = False


class ShardSet(NamedTuple):
    """All shards of one division of the images."""

    total: int
    manifests: list[ShardManifest]
    problems: list[Problem]
    broken: set[tuple[Shard, int]]  # blocks, by their first rows, whose images were embedded again since


def shard_counts(folder: Path) -> list[int]:
    """Return into how many shards a store's images were divided, once or several times."""
    names = (re.fullmatch(r"\d+-of-(\d+)", path.name) for path in (folder / SHARDS).glob("*"))
    return sorted({int(match[1]) for match in names if match})


def examine(store: FeatureStore, total: int, views: int) -> ShardSet:
    """Check each of ``total`` shards by itself, by the store, and by the others."""
    manifests: list[ShardManifest] = []
    problems: list[Problem] = []
    for shard in (Shard(number, total) for number in range(total)):
        folder = store.files(shard).folder
        if not (folder / MANIFEST).exists():
            problems.append(Problem(shard, "is missing"))
            continue
        try:
            manifest = read_manifest(folder)
        except PrgkitError as error:
            problems.append(Problem(shard, f"is damaged: {error.what}", delete=True))
            continue
        if (manifest.shard, manifest.shards) != shard:
            problems.append(Problem(shard, f"holds shard {manifest.shard}/{manifest.shards}", delete=True))
            continue
        manifests.append(manifest)
        card = {"teacher": store.card.teacher, "views": store.card.views}
        if difference := difference_between(manifest, manifest.model_copy(update=card)):
            problems.append(Problem(shard, f"is {difference}", delete=True))
        elif not manifest.finished:
            problems.append(Problem(shard, "is not finished"))
        elif manifest.stored_views < views:
            problems.append(Problem(shard, f"has {manifest.stored_views} views of an image and not {views}"))
        elif manifest.index_digest != index_digest(folder):
            problems.append(Problem(shard, f"is damaged: {INDEX} is not what was written"))
    problems += strangers(store, manifests)
    sound = [manifest for manifest in manifests if Shard(manifest.shard, total) not in {one.shard for one in problems}]
    broken: set[tuple[Shard, int]] = set()
    with ThreadPoolExecutor(available_cores()) as pool:
        for blocks, lost in pool.map(lambda one: damaged_blocks(store, Shard(one.shard, total)), sound):
            broken |= blocks
            problems += lost
    return ShardSet(total, manifests, sorted(problems), broken)


def difference_between(one: ShardManifest, expected: ShardManifest) -> str:
    """Say in which way a manifest is of another pass than expected; "" where it is not."""
    for key in ("precision", "batch_size"):
        if one.teacher.get(key) != expected.teacher.get(key):
            return f"from another {key.replace('_', ' ')}: {one.teacher.get(key)}, not {expected.teacher.get(key)}"
    if one.teacher != expected.teacher:
        return "from another teacher"
    if one.views != expected.views:
        return "from other views"
    for name, theirs in expected.versions.items():
        if one.versions.get(name) != theirs:
            return f"from another version: {name} {one.versions.get(name)}, not {theirs}"
    return ""


def is_joined(store: FeatureStore, shard: Shard) -> bool:
    """Tell whether the whole store has all that a shard holds, so that its version decides nothing any more."""
    blocks = BlockJournal(store.files(shard).folder / INDEX).new_blocks()
    return all((store.stored_views(block.hex_keys()) >= len(block.digests)).all() for block in blocks)


def strangers(store: FeatureStore, manifests: list[ShardManifest]) -> list[Problem]:
    """Return the shards of another version, or that saw other images, than most; where none saw what most saw, all."""
    problems = []
    new = {one.shard for one in manifests if not is_joined(store, Shard(one.shard, one.shards))}
    versions = Counter(tuple(sorted(one.versions.items())) for one in manifests if one.shard in new).most_common(1)
    listings = Counter((one.source, one.listed, one.listing) for one in manifests).most_common(2)
    most = 2 * listings[0][1] > len(manifests) if listings else True
    for one in manifests:
        shard = Shard(one.shard, one.shards)
        usual = one.model_copy(update={"versions": dict(versions[0][0])}) if one.shard in new else one
        seen = (one.source, one.listed, one.listing)
        if difference := difference_between(one, usual):
            problems.append(Problem(shard, f"is {difference}", delete=True))
        elif seen != listings[0][0] or not most:
            _, listed, _ = listings[seen == listings[0][0]][0]
            counts = f"{one.listed:,}, not {listed:,}" if one.listed != listed else "others by name or size"
            problems.append(Problem(shard, f"saw other images than the others in {one.source}: {counts}"))
    return problems


def damaged_blocks(store: FeatureStore, shard: Shard) -> tuple[set[tuple[Shard, int]], list[Problem]]:
    """Return the blocks of a shard that are not what was written, and the first whose images are in no later one."""
    files, whole = store.files(shard), KeyTable()
    broken: list[tuple[Block, str]] = []
    for block in BlockJournal(files.folder / INDEX).new_blocks():
        if damage := files.damage(block):
            broken.append((block, damage))
        else:
            whole.add(block.keys, np.zeros(len(block.keys), np.int64), len(block.digests))
    lost = [damage for block, damage in broken if (whole.find(block.hex_keys()).views < len(block.digests)).any()]
    return {(shard, block.row) for block, _ in broken}, [Problem(shard, f"is damaged: {one}") for one in lost[:1]]


def refusal(store: FeatureStore, found: ShardSet) -> TargetsError:
    """Build the error for shards that cannot be joined, with every one of them and what to do."""
    told = [f"{problem.shard} {problem.what}" for problem in found.problems]
    again = list(dict.fromkeys(problem.shard for problem in found.problems))
    gone = list(dict.fromkeys(store.files(problem.shard).folder.name for problem in found.problems if problem.delete))
    first = f"delete {some(gone, 8)} there; " if gone else ""
    return TargetsError(
        f"{len(again)} of {found.total} shards cannot be joined: {'; '.join(told[:8])}{'; ...' if told[8:] else ''}",
        where=store.folder / SHARDS,
        fix=f"{first}embed them again with the same recipe, --shard {some([str(shard) for shard in again], 8)}",
    )


def join_set(store: FeatureStore, found: ShardSet, progress: Progress) -> JoinedShards:
    """Take the records of checked shards into the store's index, whole or not at all.

    Raises:
        TargetsError: a shard is no longer what it was when it was checked.
    """
    path, distinct, entries = store.folder / INDEX, KeyTable(), 0
    with locked(store.folder, "target store", wait=progress.note):
        for leftover in store.folder.glob(f".{INDEX}.*.part"):  # of a join that was killed
            leftover.unlink(missing_ok=True)
        known = {(block.shard, block.row) for block in BlockJournal(path).new_blocks()}
        with writing(path) as temporary:
            if path.exists():
                shutil.copyfile(path, temporary)
            with open(temporary, "ab") as file:
                for manifest in found.manifests:
                    shard = Shard(manifest.shard, found.total)
                    if manifest.index_digest != index_digest(store.files(shard).folder):
                        changed = Problem(shard, f"has changed since it was checked: {INDEX}")
                        raise refusal(store, found._replace(problems=[changed]))
                    for block in BlockJournal(store.files(shard).folder / INDEX).new_blocks():
                        if (shard, block.row) in found.broken:
                            continue
                        distinct.add(block.keys, np.zeros(len(block.keys), np.int64), len(block.digests))
                        entries += len(block.keys)
                        if (block.shard, block.row) not in known:
                            file.write(block.packed())
    return JoinedShards(
        store=str(store.folder),
        shards=found.total,
        images=len(distinct),
        duplicates=entries - len(distinct) + sum(manifest.duplicates for manifest in found.manifests),
        unreadable=sum(len(manifest.unreadable) for manifest in found.manifests),
        seconds=round(sum(manifest.seconds for manifest in found.manifests), 1),
    )


def is_finished(store: FeatureStore, shard: Shard, listing: str) -> bool:
    """Tell whether a shard has a manifest that says so, of these images."""
    try:
        manifest = read_manifest(store.files(shard).folder)
        return manifest.finished and manifest.listing == listing
    except PrgkitError:
        return False


def read_manifest(folder: Path) -> ShardManifest:
    """Return the manifest of a shard."""
    return read_document(
        folder / MANIFEST,
        ShardManifest,
        SCHEMA,
        what="a shard's manifest",
        fix="delete the folder, and embed the shard again",
        error=TargetsError,
    )


def index_digest(folder: Path) -> str:
    """Return a digest of a part's index."""
    path = folder / INDEX
    return digest(path.read_bytes() if path.exists() else b"").hex()

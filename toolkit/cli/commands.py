"""What an option makes of a command: --zip, --merge, --list and --prune, --dry-run; and a command of few options."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from prgkit.cli.state import Document, RecipeOptions, Session
from prgkit.errors import BackendError, RunError
from prgkit.progress import duration
from prgkit.storage.atomic import readable_bytes, write_text

if TYPE_CHECKING:
    from prgkit.config.recipe import Recipe
    from prgkit.config.shard import Shard
    from prgkit.export.bundle.manifest import Artifact, Manifest
    from prgkit.training.dataset import DistillationDataset


class PackedBundle(TypedDict):
    """A bundle's archive."""

    zip: str
    zip_bytes: int


def pack_bundle(session: Session, bundle: Path, manifest: Manifest, *, asked: bool) -> PackedBundle | None:
    """Pack a bundle and say what was left out; where it was not asked for, say of an older archive that it is one."""
    from prgkit.export.bundle.archive import archive_of, is_packed_bundle, left_out, pack

    if not asked:
        if is_packed_bundle(archive := archive_of(bundle, manifest)):
            session.terminal.note(f"{archive.name} is still the bundle before this one; --zip packs it again")
        return None
    archive = pack(bundle)
    if others := left_out(bundle):
        session.terminal.note(f"{archive.name}: without {', '.join(others)}, which this machine made or you put there")
    return {"zip": str(archive), "zip_bytes": archive.stat().st_size}


def tell_bundle(session: Session, bundle: Path, manifest: Manifest, *, packs: bool) -> Document:
    """Pack a bundle if that was asked for, and say what is in it."""
    packed = pack_bundle(session, bundle, manifest, asked=packs)
    for artifact in manifest.artifacts:
        size_mib = artifact.bytes / 2**20
        session.terminal.say(f"  {artifact.file:<34} {size_mib:7.1f} MiB  {checked(artifact)}".rstrip())
    if packed:
        session.terminal.say((packed["zip"], "bold"), f" ({readable_bytes(packed['zip_bytes'])}) is ready to travel")
    else:
        session.terminal.say((str(bundle), "bold"), " is ready to travel")
    return {"bundle": str(bundle), **(packed or {}), **manifest.to_json()}


def checked(artifact: Artifact) -> str:
    """Say how an artifact was checked."""
    parity = artifact.parity
    if not parity:
        return artifact.note or ""
    return (
        f"max difference {parity.max_abs_difference:.1e}, same answer on {parity.top1_agreement:.4g} % "
        f"of {parity.images} images"
    )


def relabel_bundle(session: Session, place: Path | None, classes: str) -> Document:
    """Give a bundle other classes, and say what is in it then."""
    from prgkit.config.prompts import load_classes
    from prgkit.export.relabel import relabel, settled_bundle
    from prgkit.storage.find import standing_where_it_started

    names = load_classes(classes, note=session.terminal.note)
    bundle, run = settled_bundle(session.folder or place)
    session.folder = bundle  # what follows works on it, and does not export the run again
    if run is None:
        manifest = relabel(bundle.resolve(), names, run=None, progress=session.terminal)
    else:
        with standing_where_it_started(run) as there:
            manifest = relabel(there.bundle, names, run=there, progress=session.terminal)
    return tell_bundle(session, bundle, manifest, packs=False)


def push_bundle(session: Session, repo: str, place: Path | None, given: dict[str, Any]) -> Document:
    """Publish a bundle, and say where it is."""
    from prgkit.storage.find import find_bundle

    with needs_extra("hub"):
        from prgkit.export.hub import PushOptions, push
    bundle, _ = find_bundle(session.folder or place)
    url = push(bundle, repo, PushOptions(**given))
    if given["license"] == "unknown":
        session.terminal.note("the card says that the licence is unknown; --license apache-2.0 states one")
    session.terminal.say((url, "bold"), " is published")
    return {"url": url}


def pull_bundle(session: Session, repo: str, out: Path, revision: str | None) -> Document:
    """Bring a bundle, and say what is in it."""
    from prgkit.export.bundle.bundle import open_bundle

    with needs_extra("hub"):
        from prgkit.export.hub import pull
    session.folder = pull(repo, out, revision=revision, note=session.terminal.note)
    return tell_bundle(session, out, open_bundle(out, verify=()).manifest, packs=False)


def merge_reports(session: Session, reports: tuple[Path, ...], out: Path) -> Document:
    """Lay the reports of several benches side by side."""
    from prgkit.evaluate.compare.devices import devices_table
    from prgkit.evaluate.compare.merge import merge

    comparison = merge(reports, out=out, command="prgkit " + shlex.join(sys.argv[1:]))
    session.terminal.show(devices_table(comparison))
    session.terminal.say("comparison: ", (str(out / "comparison.html"), "bold"))
    return comparison.model_dump(mode="json")


def list_or_prune_stores(session: Session, root: Path, *, prune: bool, dry_run: bool) -> Document:
    """List the target stores, or free those that nothing uses."""
    from prgkit.teacher import stores

    rows = stores.prune(root, rehearse=dry_run) if prune else stores.list_stores(root)
    if rows:
        session.terminal.listing(stores.describe_stores(rows))
    if prune:
        freed = readable_bytes(sum(row.bytes for row in rows))
        session.terminal.say(f"{freed} would be freed" if dry_run else f"{freed} freed")
    elif not rows:
        session.terminal.say(f"there is no target store in {root}")
    return {"freed" if prune else "stores": [row.model_dump(mode="json") for row in rows]}


def embed_all(session: Session, recipe: Recipe, folder: Path, targets_root: Path, *, gallery: Path | None) -> Document:
    """Have the teacher embed every image, in all processes that torchrun started, and say what is stored."""
    if session.processes > 1:
        from prgkit.training.distributed import join_processes, share_teacher_pass

        share_teacher_pass(recipe, targets_root, join_processes((), folder), session.terminal)
    if not session.is_main_process:  # the store has one writer
        return {}
    from prgkit.teacher.stores import size_of
    from prgkit.training.prepare import prepare

    dataset = prepare(recipe, targets_root, session.terminal)
    if gallery is not None:
        write_gallery(session, dataset, gallery)
    images, folders = len(dataset.image_index), [store.folder for store in dataset.store.stores]
    sizes = [size_of(folder) for folder in folders]
    for store, size in zip(folders, sizes, strict=True):
        session.terminal.say((str(store), "bold"), f": {images:,} images, {size / 2**20:,.1f} MiB")
    stores = [str(folder) for folder in folders]
    return {"targets": stores[0] if len(stores) == 1 else stores, "images": images, "bytes": sum(sizes)}


def embed_one_shard(session: Session, recipe: Recipe, targets_root: Path, shard: Shard) -> Document:
    """Embed one part of the images, and say where it lies."""
    from prgkit.teacher.shards import embed_shard

    manifests = embed_shard(recipe, targets_root, shard, session.terminal)
    first = manifests[0]
    copies = f", {first.duplicates} duplicates" if first.duplicates else ""
    skipped = f", {len(first.unreadable)} unreadable" if first.unreadable else ""
    session.terminal.say(
        (f"shard {shard}", "bold"), f": {first.images:,} images{skipped}{copies}, {duration(first.seconds)}"
    )
    return {"shards": [manifest.model_dump(mode="json", by_alias=True) for manifest in manifests]}


def embed_with_ray(session: Session, recipe: Recipe, targets_root: Path, workers: tuple[int, int]) -> Document:
    """Embed all shards on a Ray cluster, and join them."""
    from prgkit.teacher.ray_engine import WorkerCount, embed_on_ray

    embed_on_ray(recipe, targets_root, WorkerCount(*workers), session.terminal)
    return join_all_shards(session, recipe, targets_root)


def join_all_shards(session: Session, recipe: Recipe, targets_root: Path) -> Document:
    """Join the shards of the teacher's pass, and say what is in them."""
    if not session.is_main_process:
        return {}
    from prgkit.teacher.shards import join_shards

    joined = join_shards(recipe, targets_root, session.terminal)
    for one in joined:
        session.terminal.say(
            (one.store, "bold"),
            f": {one.shards} shards joined, {one.images:,} images, {one.duplicates:,} duplicates, "
            f"{one.unreadable:,} unreadable; {duration(one.seconds)} of work",
        )
    return {"joined": [one.model_dump(mode="json") for one in joined]}


def print_estimate(session: Session, recipe: Recipe, folder: Path, targets_root: Path, shards: int = 0) -> Document:
    """Print what a distillation would take, and how even so many shards are."""
    session.dry_run = True
    if not session.is_main_process:
        return {}
    from prgkit.training.dry_run import estimate

    expected = estimate(recipe, folder, targets_root, session.terminal, shards)
    session.terminal.listing({"run": str(folder), **expected.summary})
    return {"run": str(folder), **expected.model_dump(mode="json")}


def adapt_teacher(session: Session, recipe: Recipe, path: Path, options: RecipeOptions, shots: int) -> Document:
    """Learn a context for the teacher, and let what follows in the chain use it."""
    use = f"teacher.context={json.dumps(str(path), ensure_ascii=False)}"
    so_far = session.recipe_options or options
    session.recipe_options = replace(so_far, overrides=(*so_far.overrides, use))
    if not session.is_main_process:  # the context has one writer
        return {}
    from prgkit.teacher.prompt_tuning import describe_tuning, tune_prompt

    report = tune_prompt(recipe, path, options.targets_root, shots=shots, progress=session.terminal)
    session.terminal.say((str(path), "bold"), f": {describe_tuning(report)}")
    session.terminal.say("to use it: ", (f"--set teacher.context={shlex.quote(str(path))}", "bold"))
    return report.model_dump(mode="json")


def label_images(session: Session, recipe: Recipe, targets_root: Path, out: Path | None) -> Document:
    """Write the teacher's answers to a file, or print them as CSV."""
    if not session.is_main_process:  # the store has one writer
        return {}
    from prgkit.annotation import label

    rows, terminal = label.label_images(recipe, targets_root, session.terminal), session.terminal
    summary, document = label.describe_labels(rows), [row.model_dump(mode="json", by_alias=True) for row in rows]
    if out is None:
        terminal.note(summary)
        terminal.verbatim(label.as_csv(rows))
    else:
        write_text(out, label.as_csv(rows) if out.suffix.lower() == ".csv" else label.as_json_lines(rows))
        terminal.say((str(out), "bold"), f": {summary}")
    return {"out": None if out is None else str(out), "labels": document}


def suggest_images(
    session: Session, recipe: Recipe, targets_root: Path, table: Path, count: int, folder: Path | None
) -> Document:
    """Write down which images to label, by the answers of the teacher or of the student of the run at ``folder``."""
    if not session.is_main_process:  # the sheet has one writer
        return {}
    from prgkit.annotation.suggest import describe_suggestions, suggest_labels
    from prgkit.storage.run import Run

    student = None if folder is None else Run(folder)
    found = suggest_labels(recipe, table, targets_root, count=count, student=student, progress=session.terminal)
    session.terminal.say((found.sheet, "bold"), f": {describe_suggestions(found)}")
    return found.model_dump(mode="json")


def compare_trials(session: Session, recipe: Recipe, out: Path, targets_root: Path, given: dict[str, Any]) -> Document:
    """Train and judge the trials that the options ask for, or rank students without training any."""
    from prgkit.evaluate.compare import aggregate, diswot
    from prgkit.evaluate.compare.trials import Plan, compare, trials_of
    from prgkit.evaluate.report.terminal import table

    if given["rank_students"] and not given["students"]:
        given["students"] = diswot.candidates(recipe.student.model)
    asked = ("objectives", "students", "seeds", "ladder", "sweeps", "base_to_novel", "random_teacher")
    trials = trials_of(recipe, Plan(**{key: given[key] for key in asked}))
    command = "prgkit " + shlex.join(sys.argv[1:])
    whole = recipe if given["base_to_novel"] else None
    if given["rank_students"]:
        ranking = diswot.rank_students(trials, out, targets_root, session.terminal, command=command, whole=whole)
        section = diswot.ranking_section(ranking)
        session.terminal.show(table(section, title=diswot.headline(ranking), notes=section.notes))
        session.terminal.say("ranking: ", (str(out / "rank.json"), "bold"))
        return ranking.model_dump(mode="json")
    comparison = compare(trials, out, targets_root, session.terminal, command=command, whole=whole)
    section = aggregate.objectives(comparison)
    session.terminal.show(table(section, title=aggregate.headline(comparison), notes=[section.about]))
    session.terminal.say("comparison: ", (str(out / "compare.html"), "bold"))
    if comparison.failed:
        what = f"{len(comparison.failed)} of {len(trials)} trials came apart; the others stand"
        session.failure = RunError(what, where=out)
    return comparison.model_dump(mode="json")


def write_gallery(session: Session, dataset: DistillationDataset, path: Path) -> None:
    """Write the teacher's vector of every image's evaluation view, with the image's path."""
    import numpy as np

    from prgkit.evaluate.search import Gallery, save_gallery

    images, rows = dataset.image_index, dataset.rows[: len(dataset.image_index)]
    vectors = dataset.store.features(rows, np.zeros(len(rows), dtype=int)).numpy()
    names = [images.source.path(index) for index in images.indices.tolist()]
    save_gallery(path, Gallery(names, vectors, dataset.store.facts().fingerprint))
    session.terminal.say((str(path), "bold"), f": {len(names):,} images, {readable_bytes(path.stat().st_size)}")


def list_recipes(session: Session, show: str | None, *, objectives: bool) -> Document:
    """List the recipes or the objectives, or print one recipe."""
    from prgkit.config.objectives import objective_lines
    from prgkit.config.recipe import find_recipe, shipped_recipes, summary_line
    from prgkit.config.yaml_io import read_recipe_text

    if show:
        text = read_recipe_text(find_recipe(show))
        session.terminal.verbatim(text)
        return {show: text}
    named = {name: summary_line(path) for name, path in shipped_recipes().items()}
    lines = objective_lines() if objectives else named
    session.terminal.listing(lines)
    return lines


def print_completion(session: Session, whole: click.Group, shell: str) -> Document:
    """Print a shell's script."""
    from click.shell_completion import get_completion_class

    make = get_completion_class(shell)
    assert make is not None  # Click knows these shells
    script = make(whole, {}, "prgkit", "_PRGKIT_COMPLETE").source()
    session.terminal.verbatim(script)
    return {"script": script}


def new_recipe(session: Session, name: str, images: str | None, classes: str | None) -> Document:
    """Write a recipe page for images and classes, and say where it is."""
    from prgkit.cli.new_recipe import write_new_recipe

    if not (images and classes):
        raise click.UsageError("--new writes a page for images: give --images and --classes.")
    path, text = write_new_recipe(name, images, classes, note=session.terminal.note)
    session.terminal.say(
        (str(path), "bold"), f" is written; prgkit distill {shlex.quote(str(path))} --dry-run reads it"
    )
    return {"recipe": str(path), "text": text}


def print_doctor(session: Session) -> Document:
    """Print what can run on this machine."""
    from prgkit.cli.doctor import examine

    state, terminal = examine(), session.terminal
    terminal.say(("versions", "bold"))
    terminal.listing({name: version or "not installed" for name, version in state["versions"].items()})
    terminal.say(("machine", "bold"))
    terminal.listing(state["machine"])
    terminal.say(("backends", "bold"))
    terminal.listing({f"{'yes' if row['runs'] else 'no':<4} {row['name']}": row["detail"] for row in state["backends"]})
    for clash in state["clashes"]:
        terminal.say(("clash: ", "red"), clash)
    return state


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Say which extra brings a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "prgkit":
            raise
        raise BackendError(
            f"this command needs {error.name}, which the base install leaves out", fix=f"pip install 'prgkit[{extra}]'"
        ) from error

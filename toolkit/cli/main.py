"""The command line: its commands, their options, and what each says."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from prgkit import __version__
from prgkit.cli.chain import Chain, Session, builds_engines
from prgkit.cli.commands import adapt_teacher, keep_house, merge_reports, rehearse, relabel_bundle, tell_bundle
from prgkit.cli.options import (
    adapt_options,
    bench_options,
    choose_recipe,
    compare_options,
    export_options,
    json_option,
    recipe_options,
    refuse_in_a_bundle,
    run_option,
)
from prgkit.cli.streams import say_what_it_can
from prgkit.errors import BackendError, DiskFullError, ImagesError, PrgkitError, RunError
from prgkit.storage.atomic import is_disk_full

REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)  # of the file system: nothing that we can mend


@click.group(cls=Chain, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prgkit")
def cli() -> None:
    """Distil CLIP into a small classifier for your device, without a label.

    \b
    Commands chain; each one works on what the one before made:
      prgkit distill demo export --trt bench
      prgkit distill --images photos/ --classes names.txt export bench
    """


@cli.command(short_help="Teach a student from unlabelled images.")
@recipe_options
@click.pass_obj
def distill(session: Session, /, **given: Any) -> dict[str, Any]:
    """Teach a student from unlabelled images: RECIPE is a shipped name or a YAML file.

    Without RECIPE, --images and --classes are enough; with none of them the newest run goes on. The same command
    resumes a run that was stopped.
    """
    with needing("distill"):
        recipe, folder = choose_recipe(session, given)
        if given["dry_run"]:
            return rehearse(session, recipe, folder, given["targets_root"])
        from prgkit.training.distill import distill as work
    run = work(recipe, folder, given["targets_root"], session.terminal)
    session.folder = run.folder
    card = run.card
    best, images = card["best"], card["images"]
    skipped = f", {len(images['unreadable'])} unreadable" if images["unreadable"] else ""
    copies = f", {images['duplicates']} duplicates" if images["duplicates"] else ""
    session.terminal.say(
        (str(run.folder), "bold"),
        f": {card['student']['model']} agrees with its teacher on ",
        (f"{best['agreement']:.1f} %", "bold"),
        f" of the held-out images (epoch {best['epoch']} of {recipe.training.epochs}; "
        f"{images['used']:,} images{skipped}{copies}; {card['images_per_s']:,.0f} img/s)",
    )
    return {"run": str(run.folder), **card}


@cli.command(short_help="Turn the student into ONNX and TensorRT.")
@export_options
@click.pass_obj
def export(session: Session, /, folder: Path | None, as_json: bool, **given: Any) -> dict[str, Any]:
    """Turn the student into ONNX, preprocessing inside, and with --trt into a TensorRT engine.

    In a bundle, on the device, --trt builds the engines from the bundle's ONNX files; that needs no torch.
    """
    place, trt = session.folder or folder, builds_engines(given)
    bundle = place or Path()
    from prgkit.export.formats.options import ExportOptions

    kinds = {key: given[key] for key in ("fp16", "int8", "backend", "batch", "sm", "float_input", "evaluation_images")}
    options = ExportOptions(trt=trt, class_vectors=given["open_vocabulary"], formats=given["formats"], **kinds)
    if (bundle / "manifest.json").is_file():
        refuse_in_a_bundle(given, builds=trt)
        from prgkit.export.bundle.bundle import open_bundle
        from prgkit.export.engines import build_engines

        note = session.terminal.note
        manifest = build_engines(bundle, options, note=note) if trt else open_bundle(bundle).manifest
        session.folder = bundle
    else:
        from prgkit.storage.run import find_run, standing_where_it_started

        run = click.get_current_context().with_resource(standing_where_it_started(find_run(place)))
        with needing("distill"):
            from prgkit.export.from_run import export_run

        manifest = export_run(run, options, progress=session.terminal)
        bundle, session.folder = run.bundle, run.folder
    return tell_bundle(session, bundle, manifest, packs=given["packs"])


@cli.command(short_help="Give an open-vocabulary bundle other classes.")
@click.option("--classes", required=True, metavar="FILE", help="One name a line, or the name of a known list.")
@run_option
@json_option
@click.pass_obj
def relabel(session: Session, classes: str, folder: Path | None, as_json: bool) -> dict[str, Any]:
    """Give a bundle of export --open-vocabulary other classes: the teacher reads their names, in seconds.

    No image is read and nothing is trained. Engines have to be built again.
    """
    with needing("distill"):
        return relabel_bundle(session, folder, classes)


@cli.command(short_help="Measure every artifact on this machine.")
@bench_options
@click.pass_obj
def bench(session: Session, /, folder: Path | None, as_json: bool, **given: Any) -> dict[str, Any]:
    """Measure every artifact on this machine: latency, throughput, accuracy, fidelity, memory; and write a report.

    With --merge nothing is measured: the REPORTs of several devices or benches become one comparison.
    """
    if given["merge"]:
        return merge_reports(session, given["reports"], given["out"] or Path("comparison"))
    from prgkit.evaluate import system
    from prgkit.evaluate.bench.bench import bench as measure
    from prgkit.evaluate.report import regression
    from prgkit.evaluate.report.terminal import baseline_table, report_table
    from prgkit.storage.run import find_bundle

    bundle, run = find_bundle(session.folder or folder)
    out = given["out"] or (run.folder if run else bundle) / "bench" / system.slug(system.describe())
    share = 0.05 if given["tolerance"] is None else given["tolerance"]
    gate = regression.open_gate(given["baseline"], share, out=out) if given["baseline"] else None
    report = measure(
        bundle,
        run_folder=run.folder if run else None,
        out=out,
        **{key: given[key] for key in ("threads", "seconds", "batches", "sweep_threads", "fps", "soak_minutes")},
        command="prgkit " + shlex.join(sys.argv[1:]),
        gate=gate,
        note=session.terminal.note,
    )
    session.terminal.show(report_table(report))
    if gate is not None:
        session.terminal.show(baseline_table(report["baseline"]))
        session.failure = regression.regressions(report["baseline"], path=out / "report.html")
    session.terminal.say("report: ", (str(out / "report.html"), "bold"))
    return report


@cli.command(short_help="Name what is in an image.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True, help="How many answers.")
@click.option("--min-confidence", type=click.FloatRange(0, 1), default=0.0, help="Abstain below this probability.")
@run_option
@json_option
@click.pass_obj
def predict(
    session: Session, images: tuple[Path, ...], top_k: int, min_confidence: float, folder: Path | None, as_json: bool
) -> list[dict[str, Any]]:
    """Name what is in each IMAGE, with probabilities; --min-confidence abstains where the best one is too low.

    A folder, a .zip or a .tar as IMAGE stands for all pictures in it. One that cannot be read is told in its place; the
    others are answered, and the exit code is 1.
    """
    from prgkit.evaluate import system
    from prgkit.evaluate.predict import predict as answer
    from prgkit.storage.run import find_bundle

    bundle, run = find_bundle(session.folder or folder)
    measured = (run.folder if run else bundle) / "bench" / system.slug_here()
    terminal, answers, failed = session.terminal, [], []
    for image in answer(bundle, images, top_k=top_k, min_confidence=min_confidence, bench=measured, note=terminal.note):
        answers.append(image)
        if "error" in image:
            failed.append(ImagesError(**image["error"]))
            if len(images) > 1 or image["image"] != str(images[0]):  # else it is the line's own failure
                terminal.note(str(failed[-1]))
            continue
        scores = ", ".join(f"{name} {100 * score:.1f} %" for name, score in image["top"])
        said = "abstains" if image["abstained"] else image["class"]
        terminal.say(f"{image['image']}: ", (said, "bold"), f"  ({scores})")
    if failed:
        told = f"{len(failed)} of {len(answers)} pictures cannot be read; the others are answered"
        session.failure = failed[0] if len(answers) == 1 else ImagesError(told)
    return answers


@cli.command(short_help="Let the teacher see the images, and no more.")
@recipe_options
@click.option("--list", "listed", is_flag=True, help="List the stores: what they hold, their size and age, their runs.")
@click.option("--prune", is_flag=True, help="Free the stores that no run under runs/ uses; --dry-run only names them.")
@click.pass_obj
def targets(session: Session, /, *, listed: bool, prune: bool, **given: Any) -> dict[str, Any]:
    """Let the teacher see every image of RECIPE, once, and store what it saw; distill then starts at once."""
    if listed or prune:
        return keep_house(session, given["targets_root"], prune=prune, rehearse=given["dry_run"])
    with needing("distill"):
        recipe, folder = choose_recipe(session, given)
        if given["dry_run"]:
            return rehearse(session, recipe, folder, given["targets_root"])
        if not session.leads:  # the store has one writer
            return {}
        from prgkit.training.prepare import prepare
    dataset = prepare(recipe, given["targets_root"], session.terminal)
    folders = [store.folder for store in dataset.targets.stores]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    for store, size in zip(folders, sizes, strict=True):
        session.terminal.say((str(store), "bold"), f": {len(dataset.image_index):,} images, {size / 2**20:,.1f} MiB")
    return {"targets": dataset.targets.facts()["targets"], "images": len(dataset.image_index), "bytes": sum(sizes)}


@cli.command("adapt-teacher", short_help="Fit the teacher to your images by a few labels.")
@adapt_options
@click.pass_obj
def adapt(session: Session, /, out: Path | None, **given: Any) -> dict[str, Any]:
    """Learn a context in front of the class names from a few labelled images of each class, RECIPE's data.labelled.

    The teacher's weights stay as they are. What follows on the line uses the context.
    """
    with needing("distill"):
        recipe, folder = choose_recipe(session, {**given, "folder": None})
        return adapt_teacher(session, recipe, out or Path("adapted") / f"{folder.name}.safetensors", given)


@cli.command(short_help="Tick some of the teacher's answers yourself.")
@recipe_options
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="How many images to tick.  [default: 100, or as many as are on the sheet already]",
)
@click.pass_obj
def audit(session: Session, /, count: int | None, **given: Any) -> dict[str, Any]:
    """Look at accuracy without labels: tick on a sheet whether the teacher is right on 100 images.

    RECIPE is as for distill; without one it is about the newest run, which may be training meanwhile. bench turns the
    ticks into the accuracy of teacher and student.
    """
    with needing("distill"):
        recipe, folder = choose_recipe(session, given)
        if given["dry_run"]:
            return rehearse(session, recipe, folder, given["targets_root"])
        session.folder = folder
        if not session.leads:  # the sheet has one writer
            return {}
        from prgkit.annotation.audit import audit as work
        from prgkit.evaluate.report.formatting import audit_so_far
    found = work(recipe, folder, given["targets_root"], count=count, progress=session.terminal)
    session.terminal.say((found["sheet"], "bold"), f": {audit_so_far(found)}")
    return found


@cli.command(short_help="Set objectives and students against each other.")
@compare_options
@click.pass_obj
def compare(session: Session, /, out: Path | None, as_json: bool, **given: Any) -> dict[str, Any]:
    """Train every objective with every student and seed on the same targets of RECIPE, and set them side by side.

    Each is a run in its own folder under --out; a comparison that was stopped goes on with what is missing.
    With --rank-students nothing is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("compare trains one run after another in one process; start it without torchrun.")
    with needing("distill"):
        recipe, folder = choose_recipe(session, {**given, "folder": None})
        from prgkit.evaluate.compare.ranking import candidates
        from prgkit.evaluate.compare.tables import ranking_table, standings_table
        from prgkit.evaluate.compare.trials import compare as work
        from prgkit.evaluate.compare.trials import trials_of
    if given["rank_students"] and not given["students"]:
        given["students"] = candidates(recipe.student.model)
    asked = ("objectives", "students", "seeds", "ladder", "sweeps", "base_to_novel")
    cells = trials_of(recipe, **{key: given[key] for key in asked})
    out = out or folder.with_name(f"{folder.name}-compared")
    command = "prgkit " + shlex.join(sys.argv[1:])
    whole = recipe if given["base_to_novel"] else None
    if given["rank_students"]:
        from prgkit.evaluate.compare.diswot import rank_students

        ranking = rank_students(cells, out, given["targets_root"], session.terminal, command=command, whole=whole)
        session.terminal.show(ranking_table(ranking))
        session.terminal.say("ranking: ", (str(out / "rank.json"), "bold"))
        return ranking
    found = work(cells, out, given["targets_root"], session.terminal, command=command, whole=whole)
    session.terminal.show(standings_table(found))
    session.terminal.say("comparison: ", (str(out / "compare.html"), "bold"))
    if failed := found["failed"]:
        session.failure = RunError(f"{len(failed)} of {len(cells)} cells came apart; the others stand", where=out)
    return found


@cli.command(short_help="List the recipes.")
@click.option("--show", metavar="NAME", help="Print one, to copy.")
@click.option("--objectives", is_flag=True, help="List what a recipe's objective can be instead.")
@json_option
@click.pass_obj
def recipes(session: Session, show: str | None, objectives: bool, as_json: bool) -> dict[str, Any]:
    """List the recipes that are shipped, or print one to copy."""
    from prgkit.config.objectives import objective_lines
    from prgkit.config.recipe import find_recipe, shipped_recipes, summary_line
    from prgkit.config.yaml_io import read_page

    if show:
        page = read_page(find_recipe(show))
        session.terminal.verbatim(page)
        return {show: page}
    named = {name: summary_line(path) for name, path in shipped_recipes().items()}
    lines = objective_lines() if objectives else named
    session.terminal.listing(lines)
    return lines


@cli.command(short_help="Say what can run on this machine.")
@json_option
@click.pass_obj
def doctor(session: Session, as_json: bool) -> dict[str, Any]:
    """Say which versions, devices and backends are here, what each missing one needs, and what clashes."""
    from prgkit.cli.doctor import examine

    found, terminal = examine(), session.terminal
    terminal.say(("versions", "bold"))
    terminal.listing({name: version or "not installed" for name, version in found["versions"].items()})
    terminal.say(("machine", "bold"))
    terminal.listing(found["machine"])
    terminal.say(("backends", "bold"))
    terminal.listing({f"{'yes' if row['runs'] else 'no':<4} {row['name']}": row["detail"] for row in found["backends"]})
    for clash in found["clashes"]:
        terminal.say(("clash: ", "red"), clash)
    return found


def main() -> None:
    """Run the command line; a user's mistake is told without a traceback (exit 1), a wrong call with usage (exit 2)."""
    say_what_it_can()
    if os.path.expanduser("~") == "~":  # no HOME, and no entry for the user: libraries would fail, or fill a folder "~"
        os.environ["HOME"] = tempfile.gettempdir()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a system that shuts down is told like Ctrl-C
    try:
        cli.main(prog_name="prgkit", standalone_mode=False)
    except click.ClickException as error:
        error.show(sys.stderr)
        sys.exit(error.exit_code)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # nothing here asks a question, so this is a bug
            raise abort.__cause__ from None
        click.echo("Stopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
    except PrgkitError as error:
        sys.exit(told(error))
    except Exception as error:
        place = getattr(error, "filename", None)
        if is_disk_full(error):
            fix = "free some and run the same command again"
            sys.exit(told(DiskFullError("no disk space left", where=place, fix=fix)))
        if not isinstance(error, OSError) or error.errno not in REFUSALS or place is None:
            raise
        fix = "make it accessible, or name another folder (--out, --run)"
        sys.exit(told(PrgkitError(str(error.strerror).lower(), where=place, fix=fix)))
    finally:
        signal.signal(signal.SIGTERM, before)


def told(error: PrgkitError) -> int:
    """Print an error and return the exit code; having been stopped is none, and says so itself."""
    text = str(error)
    click.echo(f"Error: {text}" if error.exit_code == 1 else text[0].upper() + text[1:], file=sys.stderr)
    return error.exit_code


@contextlib.contextmanager
def needing(extra: str) -> Iterator[None]:
    """Say which extra brings a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "prgkit":
            raise
        raise BackendError(
            f"this command needs {error.name}, which the base install leaves out", fix=f"pip install 'prgkit[{extra}]'"
        ) from error

"""The command line: its commands, their options, and what each says."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prgkit import __version__
from prgkit.chain import Chain, Session, builds_engines
from prgkit.errors import BackendError, DiskFullError, PrgkitError
from prgkit.files import is_disk_full

if TYPE_CHECKING:
    from prgkit.recipe import Recipe

FOLDER = click.Path(path_type=Path, file_okay=False)


def run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --run to a command that works on a run or a bundle."""
    help_text = "The run, or the bundle, to work on.  [default: the one this chain made, stood in, or the newest]"
    return click.option("--run", "folder", type=FOLDER, metavar="FOLDER", help=help_text)(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json: one document on stdout in place of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of text.")(command)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what distill and targets share: which recipe, and what is different this time."""
    options: list[Callable[..., Any]] = [
        click.argument("recipe", required=False),
        click.option("--images", metavar="SOURCE", help="Unlabelled images: a folder, a .zip or tar shards."),
        click.option("--classes", metavar="FILE", help="One class name a line, or the name of a known list."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe."),
        click.option("--run", "folder", type=FOLDER, metavar="FOLDER", help="The run's folder.  [default: runs/NAME]"),
        click.option(
            "--targets",
            "targets_root",
            type=FOLDER,
            metavar="FOLDER",
            default="targets",
            show_default=True,
            help="Where the teacher's targets are kept, for all runs.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would run, how much disk and how long; train nothing."),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def batch_sizes(ctx: click.Context, option: click.Parameter, text: str) -> list[int]:
    """Read ``1,8,32``."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise click.BadParameter(f"write batch sizes as 1,8,32, not {text!r}.", ctx, option)
    return batches


def batch_profile(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int, int] | None:
    """Read ``1,1,32``: the least, the usual and the largest batch of an engine."""
    if text is None:
        return None
    try:
        least, usual, most = map(int, text.split(","))
    except ValueError:
        least, usual, most = 0, 0, 0
    if not 1 <= least <= usual <= most:
        raise click.BadParameter(f"write the least, the usual and the largest as 1,1,32, not {text!r}.", ctx, option)
    return least, usual, most


def gpu_generations(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read ``86,89``, or ``8.6,8.9``, as ("SM86", "SM89")."""
    if text is None:
        return None
    numbers = [part.strip().upper().removeprefix("SM").replace(".", "") for part in text.split(",")]
    if not all(number.isdecimal() and len(number) in (2, 3) for number in numbers):
        raise click.BadParameter(f"write compute capabilities as 86,89, not {text!r}.", ctx, option)
    return tuple(f"SM{number}" for number in dict.fromkeys(numbers))


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
        from prgkit.distill import distill as work
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
@click.option("--fp16", is_flag=True, help="Also in 16-bit floats.")
@click.option("--trt", is_flag=True, help="Also as TensorRT engines.")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt_rtx"]),
    metavar="NAME",
    help="Build the engines with this one of tensorrt and tensorrt_rtx; implies --trt.  "
    "[default: tensorrt where it can run, else tensorrt_rtx]",
)
@click.option(
    "--batch",
    metavar="MIN,OPT,MAX",
    callback=batch_profile,
    help="Batch sizes of the engines, e.g. 1,1,32; three equal ones make a static engine; implies --trt.  "
    "[default: the recipe's]",
)
@click.option(
    "--sm",
    metavar="LIST",
    callback=gpu_generations,
    help="GPU generations that tensorrt_rtx builds for, e.g. 86,89; implies --trt.  [default: all from 80 on]",
)
@run_option
@json_option
@click.pass_obj
def export(session: Session, /, folder: Path | None, as_json: bool, **given: Any) -> dict[str, Any]:
    """Turn the student into ONNX, preprocessing inside, and with --trt into a TensorRT engine.

    In a bundle, on the device, --trt builds the engines from the bundle's ONNX files; that needs no torch.
    """
    place, trt = session.folder or folder, builds_engines(given)
    fp16, engines = given["fp16"], {key: given[key] for key in ("backend", "batch", "sm")}
    bundle = place or Path()
    if (bundle / "manifest.json").is_file():
        if not trt:
            raise click.UsageError("A bundle is exported already; export --trt builds its engines.")
        from prgkit.export.engines import build_engines

        manifest = build_engines(bundle, fp16=fp16, **engines, note=session.terminal.note)
        session.folder = bundle
    else:
        from prgkit.run import find_run, standing_where_it_started

        run = click.get_current_context().with_resource(standing_where_it_started(find_run(place)))
        with needing("distill"):
            from prgkit.export.run import export_run

        manifest = export_run(run, fp16=fp16, trt=trt, **engines, watch=session.terminal)
        bundle, session.folder = run.bundle, run.folder
    for artifact in manifest["artifacts"]:
        size_mib = artifact["bytes"] / 2**20
        session.terminal.say(f"  {artifact['file']:<34} {size_mib:7.1f} MiB  {checked(artifact)}".rstrip())
    session.terminal.say((str(bundle), "bold"), " is ready to travel")
    return {"bundle": str(bundle), **manifest}


def checked(artifact: dict[str, Any]) -> str:
    """Say how an artifact was checked."""
    parity = artifact["parity"]
    if not parity:
        return artifact["note"] or ""
    return (
        f"max difference {parity['max_abs_difference']:.1e}, same answer on {parity['top1_agreement']:.4g} % "
        f"of {parity['images']} images"
    )


@cli.command(short_help="Measure every artifact on this machine.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=10, show_default=True, help="For each artifact.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option(
    "--batches",
    default="1,8,32",
    show_default=True,
    metavar="LIST",
    callback=batch_sizes,
    help="Batch sizes for throughput.",
)
@run_option
@json_option
@click.pass_obj
def bench(
    session: Session, seconds: float, threads: int | None, batches: list[int], folder: Path | None, as_json: bool
) -> dict[str, Any]:
    """Measure every artifact on this machine: latency, throughput, accuracy, fidelity, memory; and write a report."""
    from prgkit.evaluate import machine
    from prgkit.evaluate.bench import bench as measure
    from prgkit.evaluate.report import table
    from prgkit.run import find_bundle

    bundle, run = find_bundle(session.folder or folder)
    out = (run.folder if run else bundle) / "bench" / machine.slug(machine.describe())
    report = measure(
        bundle,
        run_folder=run.folder if run else None,
        out=out,
        threads=threads,
        seconds=seconds,
        batches=batches,
        command="prgkit " + shlex.join(sys.argv[1:]),
        note=session.terminal.note,
    )
    session.terminal.show(table(report))
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
    """Name what is in each IMAGE, with probabilities; --min-confidence abstains where the best one is too low."""
    from prgkit.evaluate.predict import predict as answer
    from prgkit.run import find_bundle

    bundle, _ = find_bundle(session.folder or folder)
    answers: list[dict[str, Any]] = answer(bundle, images, top_k=top_k, min_confidence=min_confidence)
    for image in answers:
        scores = ", ".join(f"{name} {100 * score:.1f} %" for name, score in image["top"])
        said = "abstains" if image["abstained"] else image["class"]
        session.terminal.say(f"{image['image']}: ", (said, "bold"), f"  ({scores})")
    return answers


@cli.command(short_help="Let the teacher see the images, and no more.")
@recipe_options
@click.pass_obj
def targets(session: Session, /, **given: Any) -> dict[str, Any]:
    """Let the teacher see every image of RECIPE, once, and store what it saw; distill then starts at once."""
    with needing("distill"):
        recipe, folder = choose_recipe(session, given)
        if given["dry_run"]:
            return rehearse(session, recipe, folder, given["targets_root"])
        session.asked = given
        if not session.leads:  # the store has one writer
            return {}
        from prgkit.lesson import prepare
    lesson = prepare(recipe, given["targets_root"], session.terminal)
    store = lesson.targets.folder
    size = sum(path.stat().st_size for path in store.iterdir())
    session.terminal.say((str(store), "bold"), f": {len(lesson.catalogue):,} images, {size / 2**20:,.1f} MiB")
    return {"targets": str(store), "images": len(lesson.catalogue), "bytes": size}


@cli.command(short_help="List the recipes.")
@click.option("--show", metavar="NAME", help="Print one, to copy.")
@json_option
@click.pass_obj
def recipes(session: Session, show: str | None, as_json: bool) -> dict[str, Any]:
    """List the recipes that are shipped, or print one to copy."""
    from prgkit.recipe import find_recipe, read_page, shipped_recipes, summary_line

    if show:
        page = read_page(find_recipe(show))
        session.terminal.verbatim(page)
        return {show: page}
    lines = {name: summary_line(path) for name, path in shipped_recipes().items()}
    session.terminal.listing(lines)
    return lines


@cli.command(short_help="Say what can run on this machine.")
@json_option
@click.pass_obj
def doctor(session: Session, as_json: bool) -> dict[str, Any]:
    """Say which versions, devices and backends are here, what each missing one needs, and what clashes."""
    from prgkit.doctor import examine

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
    try:
        cli.main(prog_name="prgkit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # nothing here asks a question, so this is a bug
            raise abort.__cause__ from None
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except PrgkitError as error:
        sys.exit(told(error))
    except Exception as error:
        if not is_disk_full(error):
            raise
        place = getattr(error, "filename", None)
        sys.exit(told(DiskFullError("no disk space left", where=place, fix="free some and run the same command again")))


def told(error: PrgkitError) -> int:
    """Print an error and return the exit code; having been stopped is none, and says so itself."""
    text = str(error)
    click.echo(f"Error: {text}" if error.exit_code == 1 else text[0].upper() + text[1:], err=True)
    return error.exit_code


def choose_recipe(session: Session, given: dict[str, Any]) -> tuple[Recipe, Path]:
    """Return the recipe that was meant and the folder of its run."""
    from prgkit.recipe import load_recipe
    from prgkit.run import RUNS, find_run, run_name, standing_where_it_started

    named = ("recipe", "images", "classes")
    if session.asked and not any(given[key] for key in named):
        given = {**given, **{key: session.asked[key] for key in named}}
        given["overrides"] = (*session.asked["overrides"], *given["overrides"])
    name, images, classes = (given[key] for key in named)
    if not (name or images or classes):
        run = click.get_current_context().with_resource(standing_where_it_started(find_run(given["folder"])))
        return load_recipe(str(run.recipe_file), overrides=given["overrides"]), run.folder
    if not name and not (images and classes):
        raise click.UsageError("Name a RECIPE, or give both --images and --classes.", click.get_current_context())
    # JSON is YAML, and keeps a path with a colon or a hash in one piece.
    sources = [
        f"data.{key}={json.dumps(given[key], ensure_ascii=False)}" for key in ("images", "classes") if given[key]
    ]
    recipe = load_recipe(name or "custom", overrides=[*sources, *given["overrides"]])
    return recipe, given["folder"] or RUNS / run_name(name or images)


def rehearse(session: Session, recipe: Recipe, folder: Path, targets_root: Path) -> dict[str, Any]:
    """Print what a distillation would take."""
    session.rehearses = True
    if not session.leads:
        return {}
    from prgkit.estimate import estimate

    expected = estimate(recipe, folder, targets_root, session.terminal)
    session.terminal.listing({"run": str(folder), **expected["told"]})
    return {"run": str(folder), **expected}


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

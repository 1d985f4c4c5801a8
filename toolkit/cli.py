"""The command line: the only file that prints, parses arguments or knows click."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prgkit import __version__
from prgkit.errors import BackendError, DiskFullError, PrgkitError
from prgkit.files import read_json, sha256

if TYPE_CHECKING:
    from prgkit.recipe import Recipe


class Chain(click.Group):
    """A group whose commands chain as people type them: ``distill cifar100 --set a=1 export --trt bench``.

    The arguments are split at command names and every part is parsed by its own command, options in any order, before
    the first one runs. A file that is named like a command is written ``./export``.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the parts for `invoke`; click itself sees the first."""
        head, parts = split_at_commands(args, self.commands)
        ctx.meta["parts"] = parts
        return super().parse_args(ctx, head + (parts[0] if parts else []))

    def invoke(self, ctx: click.Context) -> Any:
        """Parse every part, then run them in order; under --json print one document keyed by command."""
        parts = ctx.meta["parts"]
        if not parts:
            return super().invoke(ctx)
        contexts = []
        for name, *rest in parts:
            part = self.commands[name].make_context(name, list(rest), parent=ctx)
            contexts.append(part)
        chain = Terminal(as_json=any(part.params.get("as_json") for part in contexts))
        results: dict[str, Any] = {}
        with chain:
            for part in contexts:
                part.obj = chain
                with part:
                    results[str(part.info_name)] = part.command.invoke(part)
        if chain.as_json:
            click.echo(json.dumps(results, indent=2, ensure_ascii=False))
        return results


def split_at_commands(args: Sequence[str], commands: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """Split arguments at command names: what comes before the first, and one list for each command."""
    starts = [place for place, word in enumerate(args) if word in commands]
    if not starts:
        return list(args), []
    return list(args[: starts[0]]), [list(args[a:b]) for a, b in pairwise([*starts, len(args)])]


class Terminal:
    """What the commands of one chain share: where they print, and the run they hand on."""

    def __init__(self, *, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.folder: Path | None = None  # the run, or the bundle, that the chain is about
        # A pipe has no width; a file of it should hold whole lines.
        width = None if sys.stdout.isatty() else 120
        self.out = Console(quiet=as_json, highlight=False, soft_wrap=True, width=width)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_stage()

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage: a bar with count, speed and time left, or a line where nobody can see a bar move."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.end_stage()
        if not self.err.is_terminal:
            self.err.print(f"{stage}: {total:,} {unit}")
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[facts]}"),
            console=self.err,
        )
        self.bar.start()
        self.task = self.bar.add_task(stage, total=total, rate="", facts="", unit=unit)

    def advance(self, count: int, facts: str = "") -> None:
        """Move the bar."""
        if self.bar is not None:
            task = self.bar.tasks[0]
            rate = f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else ""
            self.bar.update(self.task, advance=count, rate=rate, facts=facts)

    def note(self, text: str) -> None:
        """Print a line above the bar, on stderr."""
        self.err.print(text, markup=False)

    def end_stage(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --run to a command that works on a run or a bundle."""
    help_text = "The run, or the bundle, to work on.  [default: the one this chain made, stood in, or the newest]"
    return click.option("--run", "folder", type=click.Path(path_type=Path, file_okay=False), help=help_text)(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json: one document on stdout in place of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of text.")(command)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what distill and targets share: which recipe, and what is different this time."""
    options: list[Callable[..., Any]] = [
        click.argument("recipe", required=False),
        click.option("--images", help="Unlabelled images: a folder, a .zip or tar shards."),
        click.option("--classes", help="A file with one class name a line, or a named list."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe."),
        click.option("--run", "folder", type=click.Path(path_type=Path, file_okay=False), help="The run's folder."),
        click.option(
            "--targets",
            "targets_root",
            type=click.Path(path_type=Path, file_okay=False),
            default="targets",
            show_default=True,
            help="Where the teacher's targets are kept, for all runs.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would run, how much disk and how long; do nothing."),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


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
def distill(chain: Terminal, /, **given: Any) -> dict[str, Any]:
    """Teach a student from unlabelled images: RECIPE is a shipped name or a YAML file.

    Without RECIPE, --images and --classes are enough, and with none of them the newest unfinished run goes on. The same
    command resumes a run that was stopped.
    """
    recipe, folder = choose_recipe(given)
    if given["dry_run"]:
        return show_estimate(chain, recipe, folder, given["targets_root"])
    with needing("distill"):
        from prgkit.distill import distill as work
    run = work(recipe, folder, given["targets_root"], chain)
    chain.end_stage()
    chain.folder = run.folder
    card = run.card
    if not chain.as_json:
        best, images = card["best"], card["images"]
        skipped = f", {len(images['unreadable'])} unreadable" if images["unreadable"] else ""
        copies = f", {images['duplicates']} duplicates" if images["duplicates"] else ""
        chain.out.print(
            f"[bold]{run.folder}[/bold]: {card['student']['model']} agrees with its teacher on "
            f"[bold]{best['agreement']:.1f} %[/bold] of the held-out images (epoch {best['epoch']} of "
            f"{recipe.training.epochs}; {images['used']:,} images{skipped}{copies}; {card['images_per_s']:,.0f} img/s)"
        )
    return {"run": str(run.folder), **card}


@cli.command(short_help="Let the teacher see the images, and no more.")
@recipe_options
@click.pass_obj
def targets(chain: Terminal, /, **given: Any) -> dict[str, Any]:
    """Let the teacher see every image of RECIPE, once, and store what it saw; distill then starts at once."""
    recipe, folder = choose_recipe(given)
    if given["dry_run"]:
        return show_estimate(chain, recipe, folder, given["targets_root"])
    with needing("distill"):
        from prgkit.distill import prepare
    lesson = prepare(recipe, given["targets_root"], chain)
    chain.end_stage()
    store = lesson.targets.folder
    size = sum(path.stat().st_size for path in store.iterdir())
    chain.out.print(f"[bold]{store}[/bold]: {len(lesson.catalogue):,} images, {size / 2**20:,.1f} MiB")
    return {"targets": str(store), "images": len(lesson.catalogue), "bytes": size}


@cli.command(short_help="Turn the student into ONNX and TensorRT.")
@click.option("--fp16", is_flag=True, help="Also in 16-bit floats.")
@click.option("--trt", is_flag=True, help="Also as TensorRT engines.")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt_rtx"]),
    help="Which TensorRT builds the engine.  [default: tensorrt where it can run, else tensorrt_rtx]",
)
@run_option
@json_option
@click.pass_obj
def export(
    chain: Terminal, fp16: bool, trt: bool, backend: str | None, folder: Path | None, as_json: bool
) -> dict[str, Any]:
    """Turn the student into ONNX, preprocessing inside, and with --trt into a TensorRT engine.

    In a bundle, on the device, --trt builds the engines from the bundle's ONNX files; that needs no torch.
    """
    bundle = find_bundle(chain, folder)
    if bundle is not None:
        if not trt:
            raise click.UsageError("A bundle is exported already; export --trt builds its engines.")
        from prgkit.export.engines import build_engines
        from prgkit.recipe import validate

        batch = validate(read_json(bundle / "manifest.json")["recipe"], where=bundle).export.batch
        manifest = build_engines(bundle, fp16=fp16, batch=batch, backend=backend, note=chain.note)
        chain.folder = bundle
    else:
        from prgkit.run import find_run

        run = find_run(chain.folder or folder)
        with needing("distill"):
            from prgkit.export.run import export_run

        manifest = export_run(run, fp16=fp16, trt=trt, backend=backend, watch=chain)
        bundle, chain.folder = run.bundle, run.folder
    chain.end_stage()
    for artifact in manifest["artifacts"]:
        parity = artifact["parity"]
        checked = (
            f"max difference {parity['max_abs_difference']:.1e}, same answer on {parity['top1_agreement']:.4g} % "
            f"of {parity['images']} images"
            if parity
            else artifact["note"] or ""
        )
        chain.out.print(f"  {artifact['file']:<34} {artifact['bytes'] / 2**20:7.1f} MiB  {checked}", markup=False)
    chain.out.print(f"[bold]{bundle}[/bold] is ready to travel")
    return {"bundle": str(bundle), **manifest}


@cli.command(short_help="Measure every artifact on this machine.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Time for each artifact."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option("--batches", default="1,8,32", show_default=True, help="Batch sizes for throughput.")
@run_option
@json_option
@click.pass_obj
def bench(
    chain: Terminal, seconds: float, threads: int | None, batches: str, folder: Path | None, as_json: bool
) -> dict[str, Any]:
    """Measure every artifact on this machine: latency, throughput, accuracy, fidelity, memory; and write a report."""
    from prgkit.evaluate import machine
    from prgkit.evaluate.bench import bench as measure
    from prgkit.evaluate.report import table

    bundle, run_folder = require_bundle(chain, folder)
    out = (run_folder or bundle) / "bench" / machine.slug(machine.describe())
    report = measure(
        bundle,
        run_folder=run_folder,
        out=out,
        threads=threads,
        seconds=seconds,
        batches=parse_batches(batches),
        command="prgkit " + shlex.join(sys.argv[1:]),
        note=chain.note,
    )
    chain.out.print(table(report))
    chain.out.print(f"report: [bold]{out / 'report.html'}[/bold]")
    return report


@cli.command(short_help="Name what is in an image.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True, help="How many answers.")
@click.option("--min-confidence", type=click.FloatRange(0, 1), default=0.0, help="Abstain below this probability.")
@run_option
@json_option
@click.pass_obj
def predict(
    chain: Terminal, images: tuple[Path, ...], top_k: int, min_confidence: float, folder: Path | None, as_json: bool
) -> list[dict[str, Any]]:
    """Name what is in each IMAGE, with probabilities; --min-confidence abstains where the best one is too low."""
    from prgkit.evaluate.predict import predict as answer

    bundle, _ = require_bundle(chain, folder)
    answers: list[dict[str, Any]] = answer(bundle, images, top_k=top_k, min_confidence=min_confidence)
    for image in answers:
        scores = ", ".join(f"{name} {100 * score:.1f} %" for name, score in image["top"])
        said = "abstains" if image["abstained"] else image["class"]
        chain.out.print(f"{image['image']}: [bold]{said}[/bold]  ({scores})")
    return answers


@cli.command(short_help="List the recipes.")
@click.option("--show", metavar="NAME", help="Print one, to copy.")
@json_option
@click.pass_obj
def recipes(chain: Terminal, show: str | None, as_json: bool) -> dict[str, Any]:
    """List the recipes that are shipped, or print one to copy."""
    from prgkit.recipe import find_recipe, shipped_recipes, summary_line

    if show:
        text = find_recipe(show).read_text(encoding="utf-8")
        chain.out.print(text, markup=False, end="")
        return {show: text}
    lines = {name: summary_line(path) for name, path in shipped_recipes().items()}
    for name, line in lines.items():
        chain.out.print(f"  [bold]{name:<12}[/bold] {line}")
    return lines


@cli.command(short_help="Say what can run on this machine.")
@json_option
@click.pass_obj
def doctor(chain: Terminal, as_json: bool) -> dict[str, Any]:
    """Say which versions, devices and backends are here, what each missing one needs, and what clashes."""
    from rich.markup import escape

    from prgkit.doctor import examine

    found = examine()
    chain.out.print("[bold]versions[/bold]")
    for name, version in found["versions"].items():
        chain.out.print(f"  {name:<16} {version or '[dim]not installed[/dim]'}")
    chain.out.print("[bold]machine[/bold]")
    for name, fact in found["machine"].items():
        chain.out.print(f"  {name:<16} {fact}", markup=False)
    chain.out.print("[bold]backends[/bold]")
    for backend in found["backends"]:
        mark = "[green]yes[/green]" if backend["runs"] else "[yellow]no [/yellow]"
        chain.out.print(f"  {mark} {backend['name']:<27} {escape(backend['detail'])}")
    for clash in found["clashes"]:
        chain.out.print(f"[red]clash[/red] {escape(clash)}")
    return found


def main() -> None:
    """Run the command line; a user's mistake is told without a traceback (exit 1), a wrong call with usage (exit 2)."""
    try:
        cli.main(prog_name="prgkit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except PrgkitError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(130 if type(error).__name__ == "Interrupted" else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = DiskFullError(
            "no disk space left", where=error.filename, fix="free some space and run the same command again"
        )
        click.echo(f"Error: {full}", err=True)
        sys.exit(1)


def choose_recipe(given: dict[str, Any]) -> tuple[Recipe, Path]:
    """Return the recipe that was meant and the folder of its run."""
    from prgkit.recipe import load_recipe
    from prgkit.run import RUNS, find_run, run_name

    name, images, classes = given["recipe"], given["images"], given["classes"]
    overrides = list(given["overrides"])
    if name is None and not images and not classes:
        run = find_run(given["folder"])
        return load_recipe(str(run.recipe_file), overrides=overrides), run.folder
    if name is None and not (images and classes):
        raise click.UsageError("Name a RECIPE, or give both --images and --classes.")
    # JSON is YAML, and keeps a path with a colon or a hash in one piece.
    overrides[:0] = [
        f"data.{key}={json.dumps(value)}" for key, value in (("images", images), ("classes", classes)) if value
    ]
    recipe = load_recipe(name or "custom", overrides=overrides)
    return recipe, given["folder"] or RUNS / run_name(name or images)


def find_bundle(chain: Terminal, folder: Path | None) -> Path | None:
    """Return the bundle that was named or is stood in; None where a run is meant."""
    for place in (folder,) if folder else (chain.folder,) if chain.folder else (Path(),):
        if place is not None and (place / "manifest.json").is_file():
            return place
    return None


def require_bundle(chain: Terminal, folder: Path | None) -> tuple[Path, Path | None]:
    """Return the bundle to work on and the run it belongs to, if it lies in one."""
    from prgkit.run import find_run

    bundle = find_bundle(chain, folder)
    if bundle is not None:
        parent = bundle.resolve().parent
        return bundle, parent if (parent / "recipe.yaml").is_file() else None
    run = find_run(folder or chain.folder)
    again = f"prgkit export --run {shlex.quote(str(run.folder))}"
    if not (run.bundle / "manifest.json").is_file():
        raise PrgkitError(
            "the run has not been exported yet",
            where=run.folder,
            fix=f"prgkit export --run {shlex.quote(str(run.folder))}",
        )
    exported = read_json(run.bundle / "manifest.json").get("run", {}).get("student_sha256")
    if run.weights.exists() and exported != sha256(run.weights):
        raise PrgkitError("the bundle is stale: it holds another student than the run", where=run.bundle, fix=again)
    return run.bundle, run.folder


def parse_batches(text: str) -> list[int]:
    """Read ``1,8,32``."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise click.BadParameter("write batch sizes as 1,8,32", param_hint="--batches")
    return batches


def show_estimate(chain: Terminal, recipe: Recipe, folder: Path, targets_root: Path) -> dict[str, Any]:
    """Print what a distillation would take."""
    with needing("distill"):
        from prgkit.estimate import estimate

    expected = estimate(recipe, targets_root, chain)
    chain.end_stage()
    for name, value in {"run": str(folder), **expected["told"]}.items():
        chain.out.print(f"  {name:<12} {value}", markup=False)
    return {"run": str(folder), **expected}


@contextmanager
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

"""The options of the commands, and the recipe that they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from prgkit.cli import values
from prgkit.cli.chain import following
from prgkit.cli.state import RecipeOptions, Session

if TYPE_CHECKING:
    from prgkit.config.recipe import Recipe

FOLDER = click.Path(path_type=Path, file_okay=False)
PLACE = click.Path(path_type=Path)  # a folder, or a packed bundle, of which the command says what to do with it


def version_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --version, of prgkit and of what it works with."""

    def show(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            from prgkit.cli.versions import version_lines

            click.echo("\n".join(version_lines()))
            ctx.exit()

    help_text = "Show versions and exit."
    return click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help=help_text)(
        command
    )


def run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --run to a command that works on a run or a bundle."""
    help_text = "The run, or the bundle, to work on.  [default: the one this chain made, stood in, or the newest]"
    return click.option("--run", "folder", type=PLACE, metavar="FOLDER", help=help_text)(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, one document on stdout in place of text: the chain reads it, the command need not know."""

    @functools.wraps(command)
    def without_json(*arguments: Any, as_json: bool, **options: Any) -> Any:
        return command(*arguments, **options)

    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of text.")
    return option(without_json)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what distill and targets share: which recipe, what is different this time, and where its run is."""
    return which_recipe(
        command,
        click.option("--run", "folder", type=FOLDER, metavar="FOLDER", help="The run's folder.  [default: runs/NAME]"),
        click.option("--dry-run", is_flag=True, help="Say what would run, how much disk and how long; train nothing."),
    )


def targets_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what targets takes: which part of the images, or what is to be done with the stores instead."""
    options: list[Callable[..., Any]] = [
        click.option(
            "--list", "listed", is_flag=True, help="List the stores: what they hold, their size and age, their runs."
        ),
        click.option(
            "--prune", is_flag=True, help="Free the stores that no run under runs/ uses; --dry-run only names them."
        ),
        click.option("--gallery", type=PLACE, metavar="FILE.npz", help="Also write what it saw for predict --gallery."),
        click.option(
            "--shard",
            type=values.shard,
            metavar="I/N",
            help="Embed one part of the images, counted from 0. auto: that of this task of a Slurm array, or process "
            "of torchrun.",
        ),
        click.option("--join", "joins", is_flag=True, help="Check the parts, and make them one store."),
        click.option(
            "--engine", type=click.Choice(["ray"]), help="Let a Ray cluster embed all parts, and join them then."
        ),
        click.option(
            "--workers",
            metavar="MIN:MAX",
            type=values.worker_count,
            default="1:8",
            show_default=True,
            help="How many workers --engine ray waits for, and how many it takes.",
        ),
    ]
    return recipe_options(with_options(command, options))


def which_recipe(command: Callable[..., Any], *others: Callable[..., Any]) -> Callable[..., Any]:
    """Add which recipe, what is different this time and where targets are kept; then ``others`` and --json.

    The command is given the first of these as one `RecipeOptions`.
    """

    @functools.wraps(command)
    def with_recipe(*arguments: Any, **options: Any) -> Any:
        named = RecipeOptions(**{key: options.pop(key) for key in RecipeOptions.__dataclass_fields__ if key in options})
        typed = click.get_current_context().get_parameter_source("targets_root") is ParameterSource.COMMANDLINE
        if typed and not named.names_a_recipe:  # the default lies where the run was started
            named = replace(named, targets_root=named.targets_root.absolute())
        return command(*arguments, named, **options)

    options: list[Callable[..., Any]] = [
        click.argument("recipe", required=False, shell_complete=complete_recipe),
        click.option("--images", metavar="SOURCE", help="Unlabelled images: a folder, a .zip or tar shards."),
        click.option("--classes", metavar="FILE", help="One class name a line, or the name of a known list."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            callback=values.each_key_once,
            help="Change one value of the recipe.",
        ),
        click.option(
            "--targets",
            "targets_root",
            type=FOLDER,
            metavar="FOLDER",
            default="targets",
            show_default=True,
            help="Where the teacher's targets are kept, for all runs.",
        ),
        *others,
        json_option,
    ]
    return with_options(with_recipe, options)


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return how a shell goes on with RECIPE: a shipped recipe, a page here, or the command that follows."""
    from prgkit.config.recipe import shipped_recipes

    pages = [str(page) for page in sorted(Path().glob("*.y*ml"))]
    names = [name for name in (*shipped_recipes(), *pages) if name.startswith(incomplete)]
    return [*map(CompletionItem, names), *following(ctx, incomplete)]


def with_options(command: Callable[..., Any], options: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Add options in the order in which the help lists them."""
    for option in reversed(options):
        command = option(command)
    return command


def adapt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what adapt-teacher takes: how many labels, and where the context goes."""
    return which_recipe(
        command,
        click.option(
            "--shots", type=click.IntRange(min=1), default=16, show_default=True, help="Labelled images of each class."
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Where the context goes.  [default: adapted/NAME.safetensors]",
        ),
    )


def suggest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what suggest-labels takes: how many images, by whose answers, and where they are listed."""
    return which_recipe(
        command,
        click.option("--run", "folder", type=FOLDER, metavar="FOLDER", help="The run's folder.  [default: runs/NAME]"),
        click.option(
            "-n", "--count", type=click.IntRange(1, 1000), default=100, show_default=True, help="How many images."
        ),
        click.option(
            "--by",
            type=click.Choice(["teacher", "student"]),
            default="teacher",
            show_default=True,
            help="Whose answers; the student's are those of the run.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE.csv",
            help="Where the table goes, and the sheet beside it.  [default: suggested/NAME.csv]",
        ),
    )


def label_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what label takes: where the table goes."""
    return which_recipe(
        command,
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            callback=values.table_file,
            help="Write a .csv, or JSON lines as .jsonl.  [default: print CSV]",
        ),
    )


def compare_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what compare takes: the rows and columns of the comparison, and where it goes."""
    return which_recipe(
        command,
        click.option(
            "--objectives",
            metavar="LIST",
            default="ce,kd,prg",
            show_default=True,
            type=values.names,
            help="What to learn by; prgkit recipes --objectives says what there is.",
        ),
        click.option(
            "--students",
            metavar="LIST",
            default="",
            type=values.names,
            help="timm models.  [default: the recipe's; for --rank-students also RepViTs and EfficientNets]",
        ),
        click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="How many of each."),
        click.option(
            "--ladder", is_flag=True, help="In place of --objectives: ce, kd, and PRG's nodes, its edges, and both."
        ),
        click.option(
            "--sweep",
            "sweeps",
            multiple=True,
            metavar="KEY=V1,V2,...",
            callback=values.swept_values,
            help="Try these values of an objective's parameter; two sweeps make a heat map of all combinations.",
        ),
        click.option(
            "--base-to-novel",
            is_flag=True,
            help="Teach the first half of the classes alone, then ask for the second half by its names.",
        ),
        click.option(
            "--random-teacher",
            is_flag=True,
            help="Also the last objective with a teacher of random weights, a control: what is learned without one.",
        ),
        click.option(
            "--rank-students",
            is_flag=True,
            help="Train nothing: score students by how like the teacher they see images before training (DisWOT).",
        ),
        click.option(
            "--out", type=FOLDER, metavar="FOLDER", help="Where runs and result go.  [default: runs/NAME-compared]"
        ),
    )


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what bench takes: how to measure, where the report goes, and what to hold it against."""
    options: list[Callable[..., Any]] = [
        click.argument("reports", nargs=-1, metavar="[REPORT...]", type=click.Path(path_type=Path)),
        click.option(
            "--seconds", type=click.FloatRange(min=0.1), default=10, show_default=True, help="For each artifact."
        ),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]"),
        click.option(
            "--sweep-threads",
            metavar="LIST",
            type=values.thread_counts,
            help="Also compare latency at these numbers of CPU threads, e.g. 1,2,4.",
        ),
        click.option(
            "--batches",
            default="1,8,32",
            show_default=True,
            metavar="LIST",
            type=values.batch_sizes,
            help="Batch sizes for throughput.",
        ),
        click.option(
            "--fps",
            type=click.FloatRange(0.1, 10_000),
            metavar="N",
            help="Also give frames at this rate, as a camera does: response times, and how many frames are late.",
        ),
        click.option(
            "--soak",
            "soak_minutes",
            metavar="MINUTES",
            type=values.minutes,
            help="Also run the best artifact so long without a rest: does this device slow down when it is warm?",
        ),
        click.option(
            "--baseline",
            type=click.Path(path_type=Path, exists=True),
            metavar="REPORT",
            help="An older report.json to hold this one against; exits 1 where latency, size, accuracy or fidelity is "
            "worse, or an artifact is missing.",
        ),
        click.option(
            "--tolerance",
            metavar="SHARE",
            type=values.tolerance,
            help="By how much latency and size may grow over the baseline, as 5% or 0.05.  [default: 5%]",
        ),
        click.option(
            "--out",
            type=FOLDER,
            metavar="FOLDER",
            help="Where the report goes.  [default: bench/MACHINE in the run or bundle, where predict looks for "
            "what was chosen; with --merge, comparison]",
        ),
        click.option("--merge", is_flag=True, help="Compare the REPORTs of several benches; measure nothing."),
        run_option,
        json_option,
    ]
    return with_options(command, options)


def choose_recipe(session: Session, options: RecipeOptions) -> tuple[Recipe, Path]:
    """Return the recipe that was meant and the folder of its run."""
    from prgkit.config.recipe import load_recipe
    from prgkit.progress import silent
    from prgkit.storage.find import RUNS, find_run, run_name, standing_where_it_started

    earlier = session.recipe_options
    note = silent if earlier else session.terminal.note  # said once in a chain
    if earlier and not options.names_a_recipe:
        overrides = (*earlier.overrides, *options.overrides)
        options = replace(
            options, recipe=earlier.recipe, images=earlier.images, classes=earlier.classes, overrides=overrides
        )
    session.recipe_options = options
    if not options.names_a_recipe:
        newest = find_run(options.folder or session.folder)
        run = click.get_current_context().with_resource(standing_where_it_started(newest))
        return load_recipe(str(run.recipe_file), overrides=options.overrides, note=note), run.folder
    name, images, classes = options.recipe, options.images, options.classes
    if not name and not (images and classes):
        raise click.UsageError("Name a RECIPE, or give both --images and --classes.", click.get_current_context())
    recipe = load_recipe(name or "custom", images=images, classes=classes, overrides=options.overrides, note=note)
    return recipe, options.folder or session.folder or RUNS / run_name(str(name or images))

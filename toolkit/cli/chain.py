"""Commands that chain on one line, as people type them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from prgkit.cli.state import Document, Session
from prgkit.cli.values import refuse_twice

if TYPE_CHECKING:
    from prgkit.export.formats.options import ExportOptions

ON_A_RUN = ("audit", "distill", "export", "relabel", "bench", "predict", "push", "pull")
OF_ALL_PROCESSES = (
    "adapt-teacher",
    "audit",
    "distill",
    "label",
    "suggest-labels",
    "targets",
)  # each says what all but the first have to do in it
# A command, an option of it, and those that it leaves without a part.
RECIPE = ("recipe", "images", "classes", "overrides", "folder")
LEFT_OUT = (
    ("predict", "gallery", ("min_confidence", "reject_unknown", "runtime", "batch_size", "out", "explain")),
    ("targets", "listed", (*RECIPE, "prune", "shard", "joins", "engine", "gallery", "dry_run")),
    ("targets", "prune", (*RECIPE, "shard", "joins", "engine", "gallery")),
    ("targets", "shard", ("joins", "engine", "gallery")),
    ("targets", "engine", ("gallery",)),
    ("targets", "joins", ("gallery",)),
    ("compare", "ladder", ("objectives",)),
    ("compare", "rank_students", ("random_teacher",)),
    ("recipes", "new", ("show", "objectives")),
    ("recipes", "show", ("objectives",)),
    ("bench", "merge", ("seconds", "threads", "sweep_threads", "batches", "fps", "soak_minutes", "folder")),
)
# A command, an option of it, and the one without which it says nothing.
NEEDS = (
    ("targets", "workers", "engine"),
    ("recipes", "images", "new"),
    ("recipes", "classes", "new"),
    ("bench", "tolerance", "baseline"),
)


class Command(click.Command):
    """A command whose options are given once each, but for flags and those that say that they take several."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that is given twice: of two values one would be passed over in silence."""
        if not ctx.resilient_parsing:
            parser = self.make_parser(ctx)
            options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
            once = [option for option in options if not (option.is_flag or option.multiple or option.count)]
            for option in once:
                parser.add_option(obj=option, opts=option.opts, dest=option.name, action="append", nargs=option.nargs)
            given, _, _ = parser.parse_args(args=list(args))
            for option in once:
                refuse_twice(option.opts[-1], given.get(option.name, []), ctx)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete an option, or the name of the command that follows."""
        return [*super().shell_complete(ctx, incomplete), *following(ctx, incomplete)]


def following(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Return the commands that may follow in a shell's line, by how they begin."""
    whole = ctx.find_root().command
    names = whole.commands if isinstance(whole, click.Group) else {}
    return [
        CompletionItem(name, help=names[name].short_help)
        for name in names
        if incomplete and name.startswith(incomplete)
    ]


class Chain(click.Group):
    """A group whose commands chain as people type them: ``distill cifar100 --set a=1 export --trt bench``.

    The arguments are split at command names and every part is parsed by its own command, options in any order, before
    the first one runs. A file that is named like a command is written ``./export``.
    """

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they are used."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the parts for `invoke`; click itself sees the first."""
        head, parts = split_at_commands(args, self.commands)
        ctx.meta["parts"] = parts
        seen = parts[-1:] if ctx.resilient_parsing else parts[:1]  # a shell completes the last command of a line
        return super().parse_args(ctx, head + (seen[0] if seen else []))

    def invoke(self, ctx: click.Context) -> Any:
        """Parse every part, then run them in order."""
        parts = ctx.meta["parts"]
        if not parts:
            return super().invoke(ctx)
        steps = [self.parse_part(ctx, part, following) for part, following in pairwise([*parts, [""]])]
        check_chain(steps)
        run_chain(steps)
        return None

    def parse_part(self, ctx: click.Context, part: list[str], following: list[str]) -> click.Context:
        """Let a command parse its own arguments."""
        name, *rest = part
        try:
            return self.commands[name].make_context(name, rest, parent=ctx)
        except (click.BadOptionUsage, click.MissingParameter) as error:
            if not following[0]:
                raise
            hint = f"'{following[0]}' is read as a command; a file of that name is written ./{following[0]}"
            raise click.UsageError(f"{error.format_message().rstrip('.')}: {hint}.", error.ctx or ctx) from error


def split_at_commands(args: Sequence[str], commands: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """Split arguments at command names: what comes before the first, and one list for each command."""
    starts = [place for place, word in enumerate(args) if word in commands]
    if not starts:
        return list(args), []
    return list(args[: starts[0]]), [list(args[a:b]) for a, b in pairwise([*starts, len(args)])]


def check_chain(steps: Sequence[click.Context]) -> None:
    """Refuse at once what would otherwise stop a later command, maybe hours from now."""
    whole = steps[0].parent
    names = [str(step.info_name) for step in steps]
    for name in names:
        if names.count(name) > 1:
            hint = f"a file that is named like a command is written ./{name}"
            raise click.UsageError(f"'{name}' stands twice; {hint}.", whole)
    folders = [step.params.get("folder") for step in steps if step.info_name in ON_A_RUN]
    if any(folder not in (None, folders[0]) for folder in folders):
        first = next(name for name in names if name in ON_A_RUN)
        fix = "leave --run out behind pull" if first == "pull" else "give --run to its first command"
        raise click.UsageError(f"A chain works on one run: {fix}.", whole)
    for step in steps:
        check_options(step)
        if step.info_name == "export":
            from prgkit.export.formats import wanted_formats

            wanted_formats(asked_options(step.params))
        if step.info_name == "bench":
            check_bench(step)
        if step.info_name == "predict":
            check_predict(step, as_json=any(one.params["as_json"] for one in steps))


def check_options(step: click.Context) -> None:
    """Refuse options that would be passed over in silence, beside another one or without it."""
    parameters = {str(parameter.name): parameter for parameter in step.command.params}
    given = {name for name in parameters if is_given(step, name)}

    def told(name: str) -> str:
        parameter = parameters[name]
        return parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name

    for command, leading, idle in LEFT_OUT:
        if command == step.info_name and leading in given and (both := [name for name in idle if name in given]):
            raise click.UsageError(f"{told(both[0])} means nothing with {told(leading)}.", step)
    for command, name, needed in NEEDS:
        if command == step.info_name and name in given and needed not in given:
            raise click.UsageError(f"{told(name)} is for {told(needed)}, and there is none.", step)


def is_given(step: click.Context, name: str) -> bool:
    """Tell whether an option stands on the command line, though it be with its default's value."""
    return step.get_parameter_source(name) is ParameterSource.COMMANDLINE


def asked_options(given: Mapping[str, Any]) -> ExportOptions:
    """Return what `export` was asked for."""
    from prgkit.export.formats import FORMATS
    from prgkit.export.formats.options import ExportOptions

    asked = {key: given[key] for key in ExportOptions.__dataclass_fields__ if key in given}
    asked |= {"trt": builds_engines(given), "class_vectors": given["open_vocabulary"]}
    by_option = [one.name for one in FORMATS if one.asked_by is None and given.get(one.name)]
    return ExportOptions(**{**asked, "formats": (*given["formats"], *by_option)})


def check_bench(step: click.Context) -> None:
    """Refuse more threads than cores, reports that nothing compares, and a comparison of one, or with a baseline."""
    from prgkit.evaluate.bench.options import require_cores

    given = step.params
    require_cores(given["threads"], given["sweep_threads"] or ())
    if given["merge"] and len(given["reports"]) < 2:
        raise click.UsageError("--merge compares two reports or more: bench --merge a.json b.json.", step)
    if given["merge"] and given["baseline"]:
        raise click.UsageError("--merge measures nothing that could be held against --baseline.", step)
    if given["reports"] and not given["merge"]:
        raise click.UsageError(
            f"Got unexpected extra argument ({given['reports'][0]}); --merge compares reports.", step
        )


def check_predict(step: click.Context, *, as_json: bool) -> None:
    """Refuse no pictures, what would be passed over, and answers on pictures that would themselves be asked about."""
    from prgkit.evaluate.answers import place_below
    from prgkit.evaluate.live import comes_over_time, is_video

    given, images, watch = step.params, step.params["images"], step.params["watch"]
    if not (images or watch):
        raise click.UsageError("Missing argument 'IMAGE...'.", step)
    if given["fps"] is not None and not any(one == "-" or is_video(one) for one in images):
        raise click.UsageError("--fps is for a video, and there is none.", step)
    if is_given(step, "batch_size") and (watch or any(map(comes_over_time, images))):
        raise click.UsageError(
            "--batch means nothing with pictures that come over time: each is answered at once.", step
        )
    if is_given(step, "top_k") and given["out"] and given["out"].suffix.lower() != ".jsonl" and not as_json:
        room = "a table has two answers" if given["out"].suffix.lower() == ".csv" else "a picture has one answer"
        raise click.UsageError(
            f"--top-k means nothing with --out {given['out']}: {room}, a .jsonl as many as asked.", step
        )
    for name in ("out", "explain"):
        place = given[name]
        if watch and place and (name == "explain" or place.suffix.lower() not in (".csv", ".jsonl")):
            copies = place_below(place, str(watch / "a.jpg")).parent
            if watch.resolve() in (place.resolve(), copies.resolve()):
                raise click.UsageError(
                    f"--{name} {place} puts pictures into {watch}, which --watch looks into; name another folder.", step
                )


def builds_engines(given: Mapping[str, object]) -> bool:
    """Tell whether `export` was asked for engines: what says how to build them asks for them."""
    return bool(given["trt"] or given["backend"] or given["sm"] or given["batch"])


def run_chain(steps: Sequence[click.Context]) -> None:
    """Run the commands in order; under --json, print one document keyed by command."""
    from prgkit.cli.streams import takes_any_letter
    from prgkit.cli.terminal import Terminal

    as_json = any(step.params["as_json"] for step in steps)
    is_main_process = int(os.environ.get("RANK", "0")) == 0  # the others of torchrun's processes train, and no more
    results: dict[str, Document] = {}
    with Terminal(says_results=is_main_process and not as_json, shows_progress=is_main_process) as terminal:
        session = Session(terminal, is_main_process, int(os.environ.get("WORLD_SIZE", "1")), as_json=as_json)
        session.export_options = next(
            (asked_options(step.params) for step in steps if step.info_name == "export"), None
        )
        # A library that prints must not get into the document.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            for step in steps:
                name = str(step.info_name)
                if session.dry_run:
                    terminal.note(f"then {name}")
                elif session.failure is not None:
                    terminal.note(f"not done after that: {name}")
                elif is_main_process or name in OF_ALL_PROCESSES:
                    step.obj = session
                    with step:
                        results[name] = step.command.invoke(step)
    if as_json and is_main_process:
        terminal.document(json.dumps(results, indent=2, ensure_ascii=not takes_any_letter()))
    if session.failure is not None:
        raise session.failure

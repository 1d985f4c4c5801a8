"""The command line: its commands, their options, and what each says."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from prgkit.cli.chain import Chain, asked_options
from prgkit.cli.commands import (
    adapt_teacher,
    compare_trials,
    embed_all,
    embed_one_shard,
    embed_with_ray,
    join_all_shards,
    label_images,
    list_or_prune_stores,
    list_recipes,
    merge_reports,
    needs_extra,
    new_recipe,
    print_completion,
    print_doctor,
    print_estimate,
    pull_bundle,
    push_bundle,
    relabel_bundle,
    suggest_images,
    tell_bundle,
)
from prgkit.cli.exporting import export_options, push_options, refuse_in_a_bundle, refuse_where_one_stands
from prgkit.cli.naming import AskedPictures, name_pictures, predict_options, search_gallery
from prgkit.cli.options import (
    adapt_options,
    bench_options,
    choose_recipe,
    compare_options,
    json_option,
    label_options,
    recipe_options,
    run_option,
    suggest_options,
    targets_options,
    version_option,
)
from prgkit.cli.state import Document, RecipeOptions, Session
from prgkit.cli.streams import run_process


@click.group(cls=Chain, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@version_option
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
def distill(session: Session, options: RecipeOptions) -> Document:
    """Teach a student from unlabelled images: RECIPE is a shipped name or a YAML file.

    Without RECIPE, --images and --classes are enough; with none of them the newest run goes on. The same command
    resumes a run that was stopped.
    """
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        if session.export_options is not None:
            from prgkit.export.from_run import settle_options
            from prgkit.storage.run import Run

            settle_options(recipe, session.export_options)  # what it refuses is refused before the training
            refuse_where_one_stands(session, Run(folder))
        if options.dry_run:
            return print_estimate(session, recipe, folder, options.targets_root)
        from prgkit.training.distill import distill as work
    run = work(recipe, folder, options.targets_root, session.terminal)
    session.folder = run.folder
    card, images = run.card, run.image_facts
    assert card.best is not None
    assert card.images_per_s is not None
    skipped = f", {len(images.unreadable)} unreadable" if images.unreadable else ""
    copies = f", {images.duplicates} duplicates" if images.duplicates else ""
    session.terminal.say(
        (str(run.folder), "bold"),
        f": {run.student_facts.model} agrees with its teacher on ",
        (f"{card.best.agreement:.1f} %", "bold"),
        f" of the held-out images (epoch {card.best.epoch} of {recipe.training.epochs}; "
        f"{images.used:,} images{skipped}{copies}; {card.images_per_s:,.0f} img/s)",
    )
    return {"run": str(run.folder), **card.to_json()}


@cli.command(short_help="Turn the student into ONNX and TensorRT.")
@export_options
@click.pass_obj
def export(session: Session, /, folder: Path | None, **given: Any) -> Document:
    """Turn the student into ONNX, preprocessing inside, and with --trt into a TensorRT engine.

    In a bundle, on the device, --trt builds the engines from the bundle's ONNX files; that needs no torch.
    """
    place, options = session.folder or folder, asked_options(given)
    bundle = place or Path()
    if (bundle / "manifest.json").is_file():
        refuse_in_a_bundle(given, builds=options.trt)
        from prgkit.export.bundle.bundle import open_bundle
        from prgkit.export.engines import build_engines

        note = session.terminal.note
        manifest = build_engines(bundle, options, note=note) if options.trt else open_bundle(bundle).manifest
        session.folder = bundle
    else:
        from prgkit.storage.find import find_run, standing_where_it_started

        run = find_run(place)
        refuse_where_one_stands(session, run)
        run = click.get_current_context().with_resource(standing_where_it_started(run))
        with needs_extra("distill"):
            from prgkit.export.from_run import export_run

        manifest = export_run(run, options, progress=session.terminal)
        bundle, session.folder = run.bundle, run.folder
    return tell_bundle(session, bundle, manifest, packs=given["packs"])


@cli.command(short_help="Give an open-vocabulary bundle other classes.")
@click.option("--classes", required=True, metavar="FILE", help="One name a line, or the name of a known list.")
@run_option
@json_option
@click.pass_obj
def relabel(session: Session, classes: str, folder: Path | None) -> Document:
    """Give a bundle of export --open-vocabulary other classes: the teacher reads their names, in seconds.

    No image is read and nothing is trained. Engines have to be built again.
    """
    with needs_extra("distill"):
        return relabel_bundle(session, folder, classes)


@cli.command(short_help="Measure every artifact on this machine.")
@bench_options
@click.pass_obj
def bench(session: Session, /, folder: Path | None, **given: Any) -> Document:
    """Measure every artifact on this machine: latency, throughput, accuracy, fidelity, memory; and write a report.

    With --merge nothing is measured: the REPORTs of several devices or benches become one comparison.
    """
    if given["merge"]:
        return merge_reports(session, given["reports"], given["out"] or Path("comparison"))
    from prgkit.evaluate import system
    from prgkit.evaluate.bench.bench import bench as measure
    from prgkit.evaluate.bench.options import BenchOptions
    from prgkit.evaluate.report import bench_report, regression
    from prgkit.storage.find import find_bundle

    bundle, run = find_bundle(session.folder or folder)
    out = given["out"] or system.bench_folder(bundle, run)
    share = 0.05 if given["tolerance"] is None else given["tolerance"]
    gate = regression.open_gate(given["baseline"], share, out=out) if given["baseline"] else None
    report = measure(
        bundle,
        BenchOptions(**{key: given[key] for key in BenchOptions.model_fields if given[key] is not None}),
        run_folder=run.folder if run else None,
        out=out,
        command="prgkit " + shlex.join(sys.argv[1:]),
        gate=gate,
        note=session.terminal.note,
    )
    session.terminal.show(bench_report.report_table(report))
    if gate is not None:
        assert report.baseline is not None
        session.terminal.show(regression.baseline_table(report))
        session.failure = regression.regressions(report.baseline, path=out / "report.html")
    session.terminal.say("report: ", (str(out / "report.html"), "bold"))
    return report.model_dump(mode="json")


@cli.command(short_help="Name what is in an image.")
@predict_options
@click.pass_obj
def predict(session: Session, /, images: tuple[str, ...], folder: Path | None, **given: Any) -> Document:
    """Name what is in each IMAGE, with calibrated probabilities; --min-confidence abstains where the best is too low.

    It says how often answers that sure were right on held-out images. --reject-unknown lets 95 % of such images pass.

    IMAGE is a picture, a folder, a .zip or .tar, a pattern in quotes, a video, a camera's number, an rtsp:// address,
    or - for paths on stdin. A picture that cannot be read is told in its place; the others are answered, and the exit
    code is 1.
    """
    asked = AskedPictures(images, given.pop("watch"), given.pop("fps"))
    if (gallery := given.pop("gallery")) is not None:
        return search_gallery(session, asked, folder, gallery, given["top_k"])
    return name_pictures(session, asked, folder, **given)


@cli.command(short_help="Publish a bundle on the Hugging Face Hub.")
@push_options
@click.pass_obj
def push(session: Session, /, repo: str, folder: Path | None, **given: Any) -> Document:
    """Publish a bundle as the model repository OWNER/NAME, with a model card made of its manifest.

    No image, no image's name and no path travel, nor engines, ticks or reports; --with-images adds the golden and the
    evaluation images and their labels.
    """
    return push_bundle(session, repo, folder, given)


@cli.command(short_help="Bring a bundle from the Hugging Face Hub.")
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Where it goes.  [default: NAME]"
)
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit.  [default: main]")
@json_option
@click.pass_obj
def pull(session: Session, repo: str, out: Path | None, revision: str | None) -> Document:
    """Bring the bundle of the model repository OWNER/NAME, and compare every digest with its manifest.

    What follows on the line works on it: prgkit pull OWNER/NAME bench.
    """
    return pull_bundle(session, repo, out or Path(repo.rpartition("/")[2]), revision)


@cli.command(short_help="Let the teacher see the images, and no more.")
@targets_options
@click.pass_obj
def targets(session: Session, /, options: RecipeOptions, **given: Any) -> Document:
    """Let the teacher see every image of RECIPE, once, and store what it saw; distill then starts at once.

    On many machines with a shared folder, each embeds a part (--shard), and one joins them (--join).
    """
    if given["listed"] or given["prune"]:
        return list_or_prune_stores(session, options.targets_root, prune=given["prune"], dry_run=options.dry_run)
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        if options.dry_run:
            shards = given["shard"].total if given["shard"] else 0
            return print_estimate(session, recipe, folder, options.targets_root, shards)
        if given["shard"]:
            return embed_one_shard(session, recipe, options.targets_root, given["shard"])
        if given["engine"] == "ray":
            return embed_with_ray(session, recipe, options.targets_root, given["workers"])
        if given["joins"]:
            return join_all_shards(session, recipe, options.targets_root)
        return embed_all(session, recipe, folder, options.targets_root, gallery=session.place(given["gallery"]))


@cli.command("adapt-teacher", short_help="Fit the teacher to your images by a few labels.")
@adapt_options
@click.pass_obj
def adapt(session: Session, options: RecipeOptions, *, shots: int, out: Path | None) -> Document:
    """Learn a context in front of the class names from a few labelled images of each class, RECIPE's data.labelled.

    The teacher's weights stay as they are. What follows on the line uses the context.
    """
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        path = session.place(out) or Path("adapted") / f"{folder.name}.safetensors"
        return adapt_teacher(session, recipe, path, options, shots)


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
def audit(session: Session, options: RecipeOptions, *, count: int | None) -> Document:
    """Look at accuracy without labels: tick on a sheet whether the teacher is right on 100 images.

    RECIPE is as for distill; without one it is about the newest run, which may be training meanwhile. bench turns the
    ticks into the accuracy of teacher and student.
    """
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        if options.dry_run:
            return print_estimate(session, recipe, folder, options.targets_root)
        session.folder = folder
        if not session.is_main_process:  # the sheet has one writer
            return {}
        from prgkit.annotation.audit import audit as work
        from prgkit.annotation.audit import describe_audit
    report = work(recipe, folder, options.targets_root, count=count, progress=session.terminal)
    session.terminal.say((report.sheet, "bold"), f": {describe_audit(report)}")
    return report.model_dump(mode="json")


@cli.command(short_help="Write down the teacher's answer to each image.")
@label_options
@click.pass_obj
def label(session: Session, options: RecipeOptions, *, out: Path | None) -> Document:
    """Write down what the teacher says of every image of RECIPE, as CSV: class, confidence, second class, margin.

    RECIPE is as for distill. Answers that its targets correct, near copies and images that fit no class are marked.
    Nothing is trained and no run is made; distill goes on with what the teacher saw.
    """
    with needs_extra("distill"):
        recipe, _ = choose_recipe(session, options)
        return label_images(session, recipe, options.targets_root, session.place(out))


@cli.command("suggest-labels", short_help="Say which images to label, if you label a few.")
@suggest_options
@click.pass_obj
def suggest(session: Session, options: RecipeOptions, *, out: Path | None, count: int, by: str) -> Document:
    """Choose images of RECIPE that are worth a label: each time the one whose answer is farthest from those labelled.

    data.labelled counts as labelled, and so does what is ticked in the table, which data.labelled_labels reads. The
    images are as unlike each other as can be: they teach objective dho, and are no sample to judge by.
    """
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        table = session.place(out) or Path("suggested") / f"{folder.name}.csv"
        return suggest_images(session, recipe, options.targets_root, table, count, folder if by == "student" else None)


@cli.command(short_help="Set objectives and students against each other.")
@compare_options
@click.pass_obj
def compare(session: Session, /, options: RecipeOptions, *, out: Path | None, **given: Any) -> Document:
    """Train every objective with every student and seed on the same targets of RECIPE, and set them side by side.

    Each is a run in its own folder under --out; a comparison that was stopped goes on with what is missing.
    With --rank-students nothing is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("compare trains one run after another in one process; start it without torchrun.")
    with needs_extra("distill"):
        recipe, folder = choose_recipe(session, options)
        out = session.place(out) or folder.with_name(f"{folder.name}-compared")
        return compare_trials(session, recipe, out, options.targets_root, given)


@cli.command(short_help="List the recipes.")
@click.option("--show", metavar="NAME", help="Print one, to copy.")
@click.option("--objectives", is_flag=True, help="List what a recipe's objective can be instead.")
@click.option(
    "--new", metavar="NAME", help="Write NAME.yaml for --images and --classes, with a reason for each choice."
)
@click.option("--images", metavar="SOURCE", help="Of --new: the unlabelled images.")
@click.option("--classes", metavar="FILE", help="Of --new: one class name a line, or the name of a known list.")
@json_option
@click.pass_obj
def recipes(session: Session, /, show: str | None, objectives: bool, new: str | None, **given: str | None) -> Document:
    """List the recipes that are shipped, print one to copy, or write one for your images."""
    if new:
        return new_recipe(session, new, **given)
    return list_recipes(session, show, objectives=objectives)


@cli.command(short_help="Print what completes prgkit in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_obj
def completion(session: Session, shell: str) -> Document:
    """Print the script by which a shell completes commands, options, recipes and choices.

    \b
    bash, in ~/.bashrc:  eval "$(prgkit completion bash)"
    zsh, in ~/.zshrc:    eval "$(prgkit completion zsh)"
    fish:                prgkit completion fish | source
    """
    return print_completion(session, cli, shell)


@cli.command(short_help="Say what can run on this machine.")
@json_option
@click.pass_obj
def doctor(session: Session) -> Document:
    """Say which versions, devices and backends are here, what each missing one needs, and what clashes."""
    return print_doctor(session)


def main() -> None:
    """Run the command line; a user's mistake is told without a traceback (exit 1), a wrong call with usage (exit 2)."""
    run_process(cli)

"""The smallest honest look at accuracy where there are no labels: some of the teacher's answers, for you to tick."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from prgkit.annotation.sheet import Card, sheet
from prgkit.config.recipe import Recipe
from prgkit.data.ticks import AuditSample, Tick, carried, read_ticks, set_aside, ticked, write_ticks
from prgkit.device import best_device
from prgkit.errors import PrgkitError, RunError
from prgkit.evaluate.accuracy.ticked import teacher_share
from prgkit.evaluate.heat_map import Explainer
from prgkit.evaluate.report.formatting import interval, percent
from prgkit.evaluate.report.schema import TickedShare
from prgkit.export.bundle.bundle import open_bundle
from prgkit.export.bundle.manifest import EXPLAIN
from prgkit.progress import Progress
from prgkit.storage.atomic import fingerprint, write_sealed, write_text
from prgkit.storage.find import find_bundle
from prgkit.storage.locks import locked
from prgkit.storage.run import Run, differences, require_own_folder, start_run, undoing
from prgkit.training.dataset import DistillationDataset
from prgkit.training.prepare import prepare

IMAGES = 100
NEXT_ANSWERS = 2


class AuditReport(BaseModel, frozen=True):
    """Where an audit's files are, what they hold, and how often the teacher is right so far."""

    run: str
    sheet: str
    ticks: str
    images: int
    drawn_from: int
    held_out: int
    ticked: int
    teacher: TickedShare | None


class TeacherPredictions(NamedTuple):
    """The teacher's likeliest classes of every image, in the order of the image index."""

    classes: NDArray[np.int64]  # [images, 1 + NEXT_ANSWERS], the likeliest first
    confidence: NDArray[np.float64]  # [images, 1 + NEXT_ANSWERS]


def audit(recipe: Recipe, folder: Path, targets_root: Path, *, count: int | None, progress: Progress) -> AuditReport:
    """Write the sheet and the CSV to tick into the run at ``folder``, and return what they hold and what is ticked.

    A sheet that is there already is kept, with what was ticked; ``count`` None keeps its size, too, and a larger one
    adds to it. Where the images or the teacher's answers have changed, or fewer images are asked for, the ticks so far
    are set aside, and those that still hold are on the new sheet. The run may be training meanwhile.

    Raises:
        PrgkitError: for anything the user can mend.
    """
    require_own_folder(folder, recipe)
    run = Run(folder)
    undo = undoing(run)
    # A run that is this recipe's may be training meanwhile.
    own = run.recipe_file.exists() and not differences(run, recipe)
    try:
        with nullcontext() if own else locked(folder, "run"):
            start_run(folder, recipe)
        return draw_audit(run, recipe, targets_root, count=count, progress=progress)
    except Exception:
        with suppress(RunError), locked(folder, "run"):
            undo()
        raise


def describe_audit(report: AuditReport) -> str:
    """Put into words what an audit holds and says so far."""
    if report.teacher is None:
        return (
            f"{report.images:,} of {report.drawn_from:,} images to tick in a browser; put the ticks.csv that it "
            f"saves in the place of {report.ticks}, then: prgkit bench"
        )
    return (
        f"{report.ticked:,} of {report.images:,} ticked; the teacher is right on {percent(report.teacher.top1)} of "
        f"them (95 % interval {interval(report.teacher.top1_interval)} %)"
    )


def draw_audit(run: Run, recipe: Recipe, targets_root: Path, *, count: int | None, progress: Progress) -> AuditReport:
    """Draw the sample, or go on with the one that is there, and write what is to be ticked."""
    with locked(run.ticks_file.parent, "audit"):
        earlier = read_ticks(run.ticks_file, recipe.classes) if run.ticks_file.exists() else []
        before = AuditSample.of(run)
        dataset = prepare(recipe, targets_root, progress, like=run)
        predictions = predict(dataset, progress)
        made_from = fingerprint([dataset.image_index.keys, predictions.classes[:, 0].tolist()])
        count = min(count or (len(before.images) if before else IMAGES), len(dataset.image_index))
        if before is None or (before.made_from, len(before.images)) != (made_from, count):
            kept = before.images if before and before.made_from == made_from else ()
            rows = choose(dataset, predictions, recipe, count, first=[image.key for image in kept])
            ticks = carried(rows, earlier)
            keep_earlier(run, earlier, ticks, same=bool(kept), progress=progress)
            write_ticks(run.ticks_file, ticks)
            sample = AuditSample(made_from=made_from, drawn_from=len(dataset.image_index), images=rows)
            write_sealed(run.sample_file, sample.model_dump(mode="json", by_alias=True))
        else:
            ticks = carried(before.images, earlier)
            if not run.ticks_file.exists():
                write_ticks(run.ticks_file, ticks)
        write_text(run.sheet_file, draw_sheet(run, recipe, dataset, predictions, ticks, progress))
    seen, held_out = ticked(ticks), {dataset.image_index.keys[position] for position in dataset.val_indices}
    return AuditReport(
        run=str(run.folder),
        sheet=str(run.sheet_file),
        ticks=str(run.ticks_file),
        images=len(ticks),
        drawn_from=len(dataset.image_index),
        held_out=len({tick.key for tick in ticks} & held_out),
        ticked=len(seen),
        teacher=teacher_share(seen) if seen else None,
    )


def predict(dataset: DistillationDataset, progress: Progress) -> TeacherPredictions:
    """Return the teacher's first answers to every image's evaluation view."""
    count = len(dataset.image_index)
    dataset = replace(dataset, classifier=dataset.classifier.to(best_device()))
    classes, confidence = [], []
    progress.start("answers", count, "img")
    for output in dataset.evaluation_outputs(np.arange(count)):
        best = torch.topk(output.logits.double().softmax(dim=1), min(1 + NEXT_ANSWERS, output.logits.shape[1]))
        classes.append(best.indices.cpu().numpy())
        confidence.append(best.values.cpu().numpy())
        progress.advance(len(output.labels))
    return TeacherPredictions(np.concatenate(classes), np.concatenate(confidence))


def choose(
    dataset: DistillationDataset, predictions: TeacherPredictions, recipe: Recipe, count: int, *, first: Sequence[str]
) -> tuple[Tick, ...]:
    """Return the images to tick: those with the keys in ``first``, then others, numbered in an order drawn by chance.

    The held-out images go before the rest, since the student is judged on them. Which images are held out is decided
    by a hash of their content, so every image had the same chance of being on the sheet; and as those in ``first``
    were drawn in the same way, so it is when others are added, or when only the first of them are kept. The others'
    order is that of the content keys, hashes again: whoever ticks the first thirty has ticked a fair thirty.
    """
    keys, images = dataset.image_index.keys, dataset.image_index.source
    places = {key: position for position, key in enumerate(keys)}
    chosen = [places[key] for key in first[:count]]
    chance = np.random.default_rng([int(fingerprint(keys), 16), len(chosen)])
    added: list[int] = []
    for part in (dataset.val_indices, np.setdiff1d(np.arange(len(keys)), dataset.val_indices)):
        part = np.setdiff1d(part, chosen)
        wanted = min(count - len(chosen) - len(added), len(part))
        added += part[draw(predictions.classes[part, 0], predictions.confidence[part, 0], wanted, chance)].tolist()
    chosen += sorted(added, key=lambda position: keys[position])
    return tuple(
        Tick(
            number=number,
            file=images.name(int(dataset.image_index.indices[position])),
            key=keys[position],
            teacher=recipe.classes[predictions.classes[position, 0]],
            confidence=in_percent(predictions.confidence[position, 0]),
        )
        for number, position in enumerate(chosen, start=1)
    )


def draw(
    labels: NDArray[np.int64], confidence: NDArray[np.float64], count: int, chance: np.random.Generator
) -> NDArray[np.int64]:
    """Return ``count`` of the n images, stratified by pseudo-class ``labels`` [n] and by ``confidence`` [n] within it.

    The images stand in a row, class by class and in order of confidence (up in one class, down in the next, so that
    neighbours across a border are alike), and ordered pivotal sampling walks along it: two images meet, chance decides
    which one goes on with the probability of both, and each time that adds up to one, an image is taken (Deville and
    Tillé, "Unequal probability sampling without replacement through a splitting method", Biometrika 85, 1998). Of
    the first m images in the row it takes m·count/n, rounded down or up, and each with the probability count/n: the
    sample is self-weighting, and the share of right answers in it unbiased.

    That share never varies more than that of as many independent draws (Chauvet and Ruiz-Gazen, "A comparison of
    pivotal sampling and unequal probability sampling with replacement", Statistics and Probability Letters 121, 2017),
    so an interval for those errs on the wide side: Wilson's, here ("Probable inference, the law of succession, and
    statistical inference", Journal of the American Statistical Association 22, 1927).
    """
    total = len(labels)
    if count in (0, total):
        return np.arange(count)
    _, rank = np.unique(labels, return_inverse=True)  # of each image's class among those that occur
    row = np.lexsort((np.where(rank % 2, -confidence, confidence), labels)).tolist()
    luck = chance.random(total).tolist()
    taken = []
    waiting, weight = row[0], count  # weights are probabilities times ``total``: whole numbers that add up exactly
    for image, throw in zip(row[1:], luck, strict=False):
        both = weight + count
        if both < total:
            waiting, weight = (image if throw * both < count else waiting), both
        else:
            first = throw * (2 * total - both) < total - count
            taken.append(waiting if first else image)
            waiting, weight = (image if first else waiting), both - total
    return np.array(taken)


def keep_earlier(run: Run, earlier: list[Tick], ticks: list[Tick], *, same: bool, progress: Progress) -> None:
    """Where a tick would be lost, keep the ticks so far under another name, and say so."""
    before, after = ({(tick.key, tick.right, tick.named) for tick in ticked(some)} for some in (earlier, ticks))
    if before <= after:
        return
    kept = set_aside(run.ticks_file)
    why = "fewer images were asked for" if same else "the images or the teacher's answers have changed"
    progress.note(
        f"{why}: the {len(before)} ticks so far are kept as {kept.name}, and {len(after)} of them hold on the new sheet"
    )


def draw_sheet(
    run: Run,
    recipe: Recipe,
    dataset: DistillationDataset,
    predictions: TeacherPredictions,
    ticks: list[Tick],
    progress: Progress,
) -> str:
    """Return the sheet, with every picture in it."""
    places = {key: position for position, key in enumerate(dataset.image_index.keys)}
    explainer = heat_maps_of(run, progress)
    progress.start("sheet", len(ticks), "img")
    cards = []
    for tick in ticks:
        position = places[tick.key]
        others = zip(predictions.classes[position, 1:], predictions.confidence[position, 1:], strict=True)
        next_answers = [(recipe.classes[index], in_percent(share)) for index, share in others]
        picture = dataset.image_index.read(position)
        heat_map = None if explainer is None else explainer.of_picture(picture, tick.teacher)
        cards.append(Card(tick, picture, next_answers, heat_map))
        progress.advance(1)
    about = (
        f"{len(ticks):,} of {len(dataset.image_index):,} images, the same share of every class that the teacher named "
        f"and of every confidence. Each shows the answer of {recipe.teacher_name}, and its next ones."
    )
    if explainer is not None:
        explainer.close()
        about += (
            " On the right, the picture as the student sees it, and in red where the student finds that answer: not "
            "the teacher's reason, and no sign that the answer is right."
        )
    return sheet(
        cards,
        title=f"{run.name}: is the teacher right?",
        about=about,
        classes=recipe.classes,
        ticks_file=str(run.ticks_file),
        made_from=fingerprint([tick.key for tick in ticks]),
        base=fingerprint([[tick.key, tick.right, tick.named] for tick in ticks]),
    )


def heat_maps_of(run: Run, progress: Progress) -> Explainer | None:
    """Open the file that says where the run's student finds a class, if its bundle was exported with one."""
    if not (run.bundle / "manifest.json").is_file():  # as before the training
        return None
    try:
        bundle = open_bundle(find_bundle(run.folder)[0], verify=())
        return Explainer(bundle) if any(one.format == EXPLAIN for one in bundle.artifacts) else None
    except PrgkitError as error:
        progress.note(f"the sheet has no heat maps: {error.what}")
        return None


def in_percent(share: float) -> str:
    """Return a probability in percent; what is not certain is never rounded up to it."""
    return f"{min(100 * share, 99.9) if share < 1 else 100:.1f}"

"""The report's sections on quality: teacher and student, class by class, the audit, pseudo-labels and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prgkit.evaluate.report.formatting import NONE, evaluated_on, interval, model_name, percent, row_name
from prgkit.evaluate.report.plots import charts
from prgkit.evaluate.report.schema import ClassShare, Epoch, PerClass, Report, TickedRow, TickedShare
from prgkit.evaluate.report.sections import Cell, Column, Section, TableRow, table_row
from prgkit.training.statistics import correction_cells, summarise

SHOWN_AT_ONCE = 20  # so many classes are shown whole; of more, the worst and a few of the best
WORST, BEST = 12, 4
FEW_IMAGES = 50  # of a class, below which intervals are wider than most differences
# What an epoch's record holds besides the terms of the loss.
NOT_A_TERM = {"epoch", "step", "seconds", "learning_rate", "images_per_s", "loss", "agreement", "held_out_kl"}


def teacher_and_student(report: Report) -> Section | None:
    """Return the teacher beside the student; None without labels, where the artifacts' table has said it all."""
    if not report.evaluation.labelled:
        return None
    teacher, student = report.teacher, report.student
    statistics = report.pseudo_labels
    corrected, raw = (", corrected", ", uncorrected") if statistics and statistics.correction else ("", "")
    rows = [table_row(f"Teacher: {report.run.teacher}{corrected}", percent(teacher.top1), percent(teacher.top5), NONE)]
    if teacher.top1_uniform_prompts is not None:
        name = f"Teacher, prompts weighted equally{raw}"
        rows.append(table_row(name, percent(teacher.top1_uniform_prompts), NONE, NONE))
    shares = map(percent, (student.top1, student.top5, student.agreement))
    rows.append(table_row(f"Student: {model_name(report.run.student)}", *shares))
    labels = ", and it or its teacher from a few labels" if report.run.uses_labels else " alone"
    return Section(
        "Teacher and student",
        f"On {evaluated_on(report.evaluation)}. The student learned from the teacher's answers{labels}.",
        (
            Column("Model", short="", left=True),
            Column("Top-1", short="top-1"),
            Column("Top-5", short="top-5"),
            Column("Same answer", short="agrees with the teacher"),
        ),
        tuple(rows),
    )


def class_by_class(report: Report) -> Section | None:
    """Return the classes that have images as marks with intervals, and every figure of theirs."""
    per_class = report.per_class
    if per_class is None or not (shares := worst_first(per_class)):
        return None
    few = len(shares) <= SHOWN_AT_ONCE
    groups = [shares] if few else [shares[:WORST], shares[-BEST:]]
    judges = ("student", "teacher") if per_class.measure == "recall" else ("same answer",)
    weights: dict[str, float] = report.pseudo_labels.class_weights if report.pseudo_labels else {}
    return Section(
        "Class by class",
        class_about(per_class, shares, weights),
        (
            Column("Class", short="class", left=True),
            Column("Images", short="images"),
            *(Column(name.capitalize(), short=name, small="95 %") for name in judges),
            *((Column("Weight", short="weight"),) if weights else ()),
        ),
        tuple(class_row(share, len(judges), weights) for share in shares),
        ends=None if few else (WORST, BEST),
        folded="Every class in figures",
        plots=(charts.class_shares(groups, left_out=len(shares) - sum(map(len, groups))),),
    )


def worst_first(per_class: PerClass) -> list[ClassShare]:
    """Return the classes that have images, the student's worst first; of equal ones, that with more images."""
    return sorted(
        (share for share in per_class.classes if share.images), key=lambda share: (share.student or 0.0, -share.images)
    )


def class_row(share: ClassShare, judges: int, weights: Mapping[str, float]) -> TableRow:
    """Return a class as a line of the table; nobody but the student is judged where there are no labels."""
    judged = [(share.student, share.student_interval), (share.teacher, share.teacher_interval)][:judges]
    cells = [Cell(percent(value), interval(bounds)) for value, bounds in judged]
    weight = f"{weights[share.name]:.2f}" if share.name in weights else NONE  # relabel brings classes that have none
    return table_row(share.name, f"{share.images:,}", *cells, *((weight,) if weights else ()))


def class_about(per_class: PerClass, shares: Sequence[ClassShare], weights: Mapping[str, float]) -> str:
    """Return what the shares are shares of, how few images they rest on, and which classes counted most in training."""
    if per_class.measure == "recall":
        what = f"The share of each class's images that {per_class.artifact} and the teacher name right (recall)"
    else:
        what = f"Of the images that the teacher gives a class, the share to which {per_class.artifact} gives the same"
    counts = [share.images for share in shares]
    size = " to ".join(dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts))))
    chance = ", so few that much of the order is chance" if sum(counts) < FEW_IMAGES * len(counts) else ""
    empty = len(per_class.classes) - len(shares)
    none = f" {empty:,} of {len(per_class.classes):,} classes have none here." if empty else ""
    weighted = ""
    if weights:
        rarest, most = max(weights, key=weights.__getitem__), min(weights, key=weights.__getitem__)
        weighted = (
            f" In training (training.class_weights) an image of {rarest} counted {weights[rarest]:.2f}, one of {most} "
            f"{weights[most]:.2f}, by the teacher's answer."
        )
    return f"{what}, the worst first. A class has {size} images{chance}.{none}{weighted}"


def mistakes(report: Report) -> Section | None:
    """Return the pairs of classes that are taken for each other most often."""
    per_class = report.per_class
    if per_class is None or not worst_first(per_class):
        return None
    labelled = per_class.measure == "recall"
    names = ("class", "taken for", "images", "teacher too") if labelled else ("teacher", "student", "images")
    rows = [
        table_row(
            pair.name, pair.answer, *[f"{count:,}" for count in (pair.images, pair.teacher_too)][: len(names) - 2]
        )
        for pair in per_class.pairs
    ]
    return Section(
        "Most frequent mistakes" if labelled else "Most frequent differences",
        "" if rows else "No image is answered otherwise.",
        tuple(Column(name.capitalize(), short=name, left=index < 2) for index, name in enumerate(names)),
        tuple(rows),
    )


def audit(report: Report) -> Section | None:
    """Return how right teacher and student are on the images that somebody ticked, where somebody did."""
    ticked = report.audit
    if ticked is None:
        return None
    judged: list[tuple[str, TickedShare | TickedRow]] = [(f"Teacher: {report.run.teacher}", ticked.teacher)]
    judged += [(row_name(artifact), artifact) for artifact in ticked.rows]
    lines = [
        (name, ticked_share(share), interval(share.top1_interval) + " %", f"{share.images:,}") for name, share in judged
    ]
    names = ["the teacher", *(name for name, *_ in lines[1:])]
    shares = (
        f"{name} {right} ({bounds}) of {images}" for name, (_, right, bounds, images) in zip(names, lines, strict=True)
    )
    return Section(
        "Audit",
        f"On {ticked.ticked:,} ticked images of a sample of {ticked.images:,}, in which every unlabelled image had "
        "the same chance to be. Artifacts are judged on those that are also in the evaluation set. Whoever ticks sees "
        "the teacher's answer, and people tend to agree: if anything, the figures are too high.",
        (
            Column("Model", short="", left=True),
            Column("Right", short="right"),
            Column("95 % interval", short="95 %"),
            Column("Images", short="images"),
        ),
        tuple(table_row(*line) for line in lines),
        summary=(f"Audit, right on ticked images (95 % interval): {'; '.join(shares)}.",),
    )


def ticked_share(share: TickedShare | TickedRow) -> str:
    """Return an accuracy on ticked images, as bounds where some of them are open."""
    low, high = share.top1, share.top1_at_most if isinstance(share, TickedRow) else share.top1
    return percent(low) if low == high else f"{percent(low).removesuffix(' %')}–{percent(high)}"


def pseudo_labels(report: Report) -> Section | None:
    """Return how far the teacher's pseudo-labels could be trusted before training, where the run is at hand."""
    if (statistics := report.pseudo_labels) is None:
        return None
    confidence, balance = statistics.confidence.histogram, statistics.balance
    which = f"the {statistics.images:,} unlabelled images"
    if statistics.sampled_from:
        which = f"a sample of {statistics.images:,} of the {statistics.sampled_from:,} unlabelled images"
    return Section(
        "The teacher's answers",
        f"Of {which}, known before the first epoch. No label is involved.",
        plots=(
            charts.histogram(confidence, name="probability of the teacher's answer", title="Confidence"),
            charts.class_sizes(balance.counts, uniform=balance.uniform),
        ),
        facts=tuple(summarise(statistics)),
        page_only=True,
    )


def corrections(report: Report) -> Section | None:
    """Return what each correction of the teacher's answers would have changed, where the run is at hand."""
    rows = report.pseudo_labels.corrections if report.pseudo_labels else []
    if not rows:
        return None
    (_, *headings), *lines = correction_cells(rows)
    return Section(
        "Corrections of its answers",
        f"Fitted to {rows[0].images:,} unlabelled images before the first epoch; targets in the recipe chooses one. "
        "Changed: answers that become others. Two views: images whose evaluation view and a crop get one answer.",
        (Column("Correction", short="", left=True), *(Column(name.capitalize(), short=name) for name in headings)),
        tuple(table_row(*line) for line in lines),
        page_only=True,
    )


def training(report: Report) -> Section | None:
    """Return the loss with its terms and the agreement by epoch, where the run had more than one epoch."""
    first = report.training[0] if report.training else {}
    terms = [key for key in first if key not in NOT_A_TERM]
    losses = {name: curve(report.training, name) for name in (["loss", *terms] if len(terms) > 1 else ["loss"])}
    panels = [
        ("Loss", "Loss by epoch", losses),
        ("Agreement, %", "Agreement by epoch", {"agreement": curve(report.training, "agreement")}),
        ("Divergence, nats", "Divergence by epoch", {"held_out_kl": curve(report.training, "held_out_kl")}),
    ]
    plots = tuple(
        charts.over_time(curves, x_name="epoch", y_name=name, title=title)
        for name, title, curves in panels
        if any(len(points) > 1 for points in curves.values())
    )
    about = (
        "Agreement and divergence, KL(teacher || student), are with the teacher on held-out images; no label is "
        "involved. The epoch is kept at which its moving average is least."
    )
    return Section("Training", about, plots=plots, page_only=True) if plots else None


def curve(training: Sequence[Epoch], key: str) -> list[tuple[float, float]]:
    """Return the (epoch, value) pairs of the records that have a value."""
    pairs = [(epoch["epoch"], epoch.get(key)) for epoch in training]
    return [(float(epoch), float(value)) for epoch, value in pairs if value is not None]

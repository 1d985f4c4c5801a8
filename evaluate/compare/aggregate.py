"""Objectives and students against each other: means over seeds, their spread, paired differences, and the report.

Two trials are compared on the same images and the same seed, so what both find hard cancels out. With several seeds the
interval is Student's t over the seeds' differences, which holds the noise of training; with one seed it is over the
images alone, and says nothing of how another seed would have fared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from prgkit.config.image_size import size_told
from prgkit.config.sections import RANDOM
from prgkit.evaluate.compare.schema import ComparedObjective, Difference, ObjectiveComparison, Of, Spread, TrialResult
from prgkit.evaluate.report.formatting import NONE, counted
from prgkit.evaluate.report.html import page
from prgkit.evaluate.report.markdown import markdown
from prgkit.evaluate.report.plots.charts import heat_map
from prgkit.evaluate.report.sections import Column, Document, Section, lines, table_row
from prgkit.metrics import mean_interval
from prgkit.storage.atomic import write_json, write_text

Value = TypeVar("Value")


def aggregate(trials: Sequence[TrialResult]) -> ObjectiveComparison:
    """Return the comparison of finished trials: a row for each student and objective, seeds together.

    The reference of the differences is PRG where it is among the rows, else the last row that is no control; of each
    student its own.
    """
    groups: dict[tuple[str, str], list[TrialResult]] = {}
    for trial in trials:
        groups.setdefault((trial.student, trial.label), []).append(trial)
    labels = [trial.label for trial in trials if not trial.control] or [trial.label for trial in trials]
    reference = "prg" if "prg" in labels else labels[-1]
    return ObjectiveComparison(
        reference=reference,
        labelled=trials[0].labels is not None,
        novel=trials[0].novel,
        images=distinct([trial.images for trial in trials]),
        epochs=distinct([trial.epochs for trial in trials]),
        image_size=distinct([trial.image_size for trial in trials]),
        evaluation=distinct([trial.evaluation for trial in trials]),
        teacher=distinct([trial.teacher for trial in trials]),
        seeds=sorted({trial.seed for trial in trials}),
        rows=[
            compared_objective(group, groups.get((student, reference)) if label != reference else None)
            for (student, label), group in groups.items()
        ],
    )


def distinct(values: Sequence[Value]) -> list[Value]:
    """Return the values without those that were there before."""
    return [value for place, value in enumerate(values) if value not in values[:place]]


def compared_objective(trials: Sequence[TrialResult], reference: Sequence[TrialResult] | None) -> ComparedObjective:
    """Return a row: mean and standard deviation over seeds, and how far it lies from the reference."""
    first = trials[0]
    return ComparedObjective(
        student=first.student,
        label=first.label,
        control=first.control,
        objective=first.objective,
        seeds=[trial.seed for trial in trials],
        top1=spread([trial.top1 for trial in trials]),
        ratio=spread([trial.ratio for trial in trials]),
        agreement=spread([trial.agreement_teacher for trial in trials]),
        held_out_agreement=spread([trial.selected.agreement for trial in trials]),
        images_per_s=spread([trial.images_per_s for trial in trials]),
        novel=spread([trial.novel.top1 if trial.novel else None for trial in trials]),
        harmonic=spread([trial.harmonic for trial in trials]),
        difference=difference(trials, reference) if reference else None,
    )


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return the mean and the standard deviation of a sample; None where any value is missing."""
    known = [value for value in values if value is not None]
    return spread_of(known) if len(known) == len(values) else None


def spread_of(values: Sequence[float]) -> Spread:
    """Return the mean and the standard deviation of a sample."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean=float(np.mean(values)), deviation=deviation, values=list(values))


def difference(trials: Sequence[TrialResult], reference: Sequence[TrialResult]) -> Difference | None:
    """Return trials minus reference in points of top-1 (of agreement where there are no labels), paired, with 95 %."""
    pairs = [(trial, other) for trial in trials for other in reference if trial.seed == other.seed]
    if not pairs:
        return None
    of: Of = "agreement_teacher" if pairs[0][0].labels is None else "top1"
    by_seed = [getattr(trial, of) - getattr(other, of) for trial, other in pairs]
    mean = float(np.mean(by_seed))
    if len(by_seed) > 1:
        return Difference(of=of, mean=mean, interval=mean_interval(by_seed), over="seeds")
    if of == "agreement_teacher" or len(pairs[0][0].answers) < 2:
        return Difference(of=of, mean=mean, interval=None, over=None)
    trial, other = pairs[0]
    labels = np.array(trial.labels)
    by_image = 100.0 * ((np.array(trial.answers) == labels) * 1.0 - (np.array(other.answers) == labels) * 1.0)
    half = 1.96 * float(np.std(by_image, ddof=1)) / math.sqrt(len(by_image))
    return Difference(of=of, mean=mean, interval=(mean - half, mean + half), over="images")


def write_comparison(folder: Path, comparison: ObjectiveComparison) -> None:
    """Write compare.json, compare.md and compare.html into ``folder``; each appears whole or not at all."""
    document = comparison_document(comparison)
    write_text(folder / "compare.md", markdown(document))
    write_text(folder / "compare.html", page(document))
    write_json(folder / "compare.json", comparison.model_dump(mode="json"))


def comparison_document(comparison: ObjectiveComparison) -> Document:
    """Return the comparison as a report: its table, and a heat map of each student whose objective was swept."""
    heat_maps = [heat_map_of(comparison, student) for student in distinct([row.student for row in comparison.rows])]
    return Document(
        title="Comparison",
        origin="prgkit compare",
        lead=(headline(comparison),),
        sections=lines(
            [objectives(comparison)],
            *([section] for section in heat_maps),
            [Section("Command", commands=(comparison.command,))],
        ),
    )


def headline(comparison: ObjectiveComparison) -> str:
    """Return what was compared in a sentence: sizes first, since no figure means anything without them."""
    sentence = (
        f"{listed(comparison.images, '{:,}')} images, {listed(comparison.epochs, '{:,}')} "
        f"epoch{'' if comparison.epochs == [1] else 's'}, {listed(map(size_told, comparison.image_size))} px, "
        f"{counted(len(comparison.seeds), 'seed')}"
    )
    teachers = [teacher for teacher in comparison.teacher if not teacher.model.endswith(f" {RANDOM}")]
    if comparison.labelled and len(teachers) == 1:
        (teacher,) = teachers
        sentence += (
            f"; {listed([judged.images for judged in comparison.evaluation], '{:,}')} labelled images; the teacher is "
            f"right on {teacher.top1:.1f} % of them, with uniform prompts on {teacher.top1_uniform_prompts:.1f} %"
        )
    return sentence


def listed(values: Iterable[object], form: str = "{}") -> str:
    """Return the value that all trials share, or their several values."""
    return ", ".join(map(form.format, values))


def objectives(comparison: ObjectiveComparison) -> Section:
    """Return the table: a row for each student and objective."""
    figures: list[tuple[Column, Callable[[ComparedObjective], Spread | None]]] = [
        (Column("top-1", "%"), lambda row: row.top1),
        (Column("of its teacher", "%", short="student / teacher"), lambda row: row.ratio),
        (Column("agreement", "%"), lambda row: row.agreement),
        (Column("held-out agreement", "%"), lambda row: row.held_out_agreement),
    ]
    if comparison.novel:
        figures += [
            (Column("top-1 of novel classes", "%", short="novel top-1 %"), lambda row: row.novel),
            (Column("harmonic mean", "%"), lambda row: row.harmonic),
        ]
    return Section(
        "Objectives and students",
        objectives_about(comparison),
        (
            Column("objective", left=True),
            *(column for column, _ in figures),
            Column("difference", "points", short="difference"),
        ),
        tuple(
            table_row(
                compared.label,
                *(spread_text(figure(compared)) for _, figure in figures),
                difference_text(compared.difference),
                group=compared.student,
            )
            for compared in comparison.rows
        ),
        group="student",
    )


def spread_text(value: Spread | None) -> str:
    """Return ``43.4 ± 0.3``, or the mean alone of one seed."""
    if value is None:
        return NONE
    return f"{value.mean:.1f}" + ("" if value.deviation is None else f" ± {value.deviation:.1f}")


def difference_text(value: Difference | None) -> str:
    """Return ``-1.2 [-2.0, -0.4]``."""
    if value is None:
        return NONE
    return f"{value.mean:+.1f}" + (f" [{value.interval[0]:+.1f}, {value.interval[1]:+.1f}]" if value.interval else "")


def objectives_about(comparison: ObjectiveComparison) -> str:
    """Return how to read the table."""
    over = {row.difference.over for row in comparison.rows if row.difference}
    how = {
        "seeds": "paired by seed, with its 95 % interval over seeds",
        "images": "paired by image, with its 95 % interval over images: another seed may differ by more",
    }
    paired = "; ".join(how[pairing] for pairing in how if pairing in over)
    names = {config["name"] for row in comparison.rows for config in row.objective}
    sentences = []
    if len(comparison.seeds) > 1:
        sentences.append("Mean ± standard deviation over seeds.")
    if over or len(comparison.rows) > 1:
        sentences.append(f"The difference is to {comparison.reference}, in points{f', {paired}' if paired else ''}.")
    for failed in comparison.failed:
        sentences.append(f"Left out: {failed.trial} ({failed.reason.splitlines()[0]}).")
    if novel := comparison.novel:
        sentences.append(
            "Students were taught the base classes; the novel ones they know by class vectors alone: "
            f"{novel.classes} classes, {novel.images:,} images, of which the teacher is right on "
            f"{novel.teacher_top1:.1f} %."
        )
    mixing = "; how the heads of dho vote, by a quarter of data.labelled" if "dho" in names else ""
    sentences.append(
        "Checkpoints are chosen by the divergence from the teacher on held-out images, a moving average over epochs, "
        f"never by a label{mixing}."
    )
    return " ".join(sentences)


def heat_map_of(comparison: ObjectiveComparison, student: str) -> Section | None:
    """Return a student's heat map over the two numbers that a sweep of PRG has changed; None without such a sweep."""
    own = [row for row in comparison.rows if row.student == student and not row.control]
    rows = [row for row in own if row.objective[0]["name"] == "prg"]
    configs = [row.objective[0] for row in rows]
    swept = [key for key in (configs[0] if configs else {}) if len({str(config[key]) for config in configs}) > 1]
    if len(swept) != 2:
        return None
    across, down = swept
    values = {
        (str(config[down]), str(config[across])): score.mean
        for config, row in zip(configs, rows, strict=True)
        if (score := row.top1 if comparison.labelled else row.agreement) is not None
    }
    title = f"{student}: {across} × {down}"
    return Section(title, "Means over seeds.", plots=(heat_map(values, across, down),), page_only=True)

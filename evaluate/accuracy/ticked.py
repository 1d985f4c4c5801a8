"""How right teacher and student are on the images that somebody ticked, where no labels exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.data.ticks import Tick, read_ticks, ticked
from prgkit.evaluate.report.schema import Audit, Row, TickedRow, TickedShare
from prgkit.export.bundle.bundle import Bundle, Evaluation
from prgkit.metrics import wilson
from prgkit.storage.run import TICKS, Run

Predictions = NDArray[np.int64]  # [images], class indices


def find_ticks(bundle: Bundle, run_folder: Path | None) -> list[Tick]:
    """Return the ticks of the run, or else those that lie in the bundle; none where nobody has ticked anything.

    None are of a bundle that got other classes: they say what the teacher made of the old ones.

    Raises:
        ImagesError: there is a file of ticks and it cannot be read; names line and value.
    """
    if bundle.manifest.relabelled:
        return []
    places = [Run(run_folder).ticks_file] if run_folder is not None else []
    for path in (*places, bundle.folder / TICKS):
        if path.exists() and ticked(ticks := read_ticks(path, bundle.classes)):
            return ticks
    return []


def audit_section(
    ticks: Sequence[Tick],
    evaluation: Evaluation,
    classes: Sequence[str],
    rows: Iterable[tuple[Row, NDArray[np.float32] | None]],
) -> tuple[Audit | None, list[str]]:
    """Return the report's section on the ticked images, None where there are none, and what a reader must know of it.

    ``rows`` are the report's rows, each with its logits [images, classes] or None. Shares are in percent.
    """
    seen = ticked(ticks)
    if not seen:
        return None, []
    places = {key: place for place, key in enumerate(evaluation.keys)}
    travelling = [tick for tick in seen if tick.key in places]
    positions = [places[tick.key] for tick in travelling]
    scored = [
        student_share(row, travelling, logits[positions].argmax(axis=1), classes)
        for row, logits in rows
        if logits is not None and row.status == "measured" and travelling
    ]
    taught = [classes[index] for index in evaluation.teacher_logits[positions].argmax(axis=1)] if positions else []
    notes = [
        *unticked_notes(ticks),
        *unknown_notes(scored),
        *missing_notes(travelling, evaluation),
        *stranger_notes(travelling, taught),
    ]
    return Audit(images=len(ticks), ticked=len(seen), teacher=teacher_share(seen), rows=scored), notes


def teacher_share(seen: Sequence[Tick]) -> TickedShare:
    """Return on how many of the ticked images the teacher is right, with the 95 % interval of that share.

    The sample is self-weighting, so the plain share is unbiased; see `prgkit.annotation.audit.draw` for why
    Wilson's interval errs on the wide side for it.
    """
    right = sum(bool(tick.right) for tick in seen)
    return TickedShare(
        images=len(seen), right=right, top1=100 * right / len(seen), top1_interval=wilson(right, len(seen))
    )


def student_share(row: Row, seen: Sequence[Tick], answers: Predictions, classes: Sequence[str]) -> TickedRow:
    """Return on how many of the ticked images a row's artifact is right; ``answers`` are its class indices.

    Where the teacher is wrong and nobody said what it is, a student that repeats the teacher is wrong, and one that
    differs may be right. To leave those images out would favour the student, since it is wrong on most of them; so
    the share is given as bounds, ``top1`` without them and ``top1_at_most`` with them, and the interval covers both.
    """
    right = unknown = 0
    for tick, answer in zip(seen, answers, strict=True):
        name = classes[int(answer)]
        if tick.truth is not None:
            right += name == tick.truth
        else:
            unknown += name != tick.teacher
    count = len(seen)
    return TickedRow(
        artifact=row.artifact,
        backend=row.backend,
        device=row.device,
        images=count,
        right=right,
        unknown=unknown,
        top1=100 * right / count,
        top1_at_most=100 * (right + unknown) / count,
        top1_interval=(wilson(right, count)[0], wilson(right + unknown, count)[1]),
    )


def unticked_notes(ticks: Sequence[Tick]) -> list[str]:
    """Say what is not ticked: the sheet's order is drawn by chance, so it matters whether images were passed over."""
    last = max(tick.number for tick in ticked(ticks))
    so_far = [tick for tick in ticks if tick.number <= last]
    seen, skipped = len(ticked(ticks)), sum(tick.right is None for tick in so_far)
    if seen == len(ticks):
        return []
    start = f"Audit: {seen} of {len(ticks)} ticked"
    if not skipped:
        return [f"{start}, in the sheet's order, which is drawn by chance: fair, with a wider interval."]
    right = sum(bool(tick.right) for tick in so_far)
    low, high = (100 * count / len(so_far) for count in (right, right + skipped))
    return [
        f"{start}, and {skipped} passed over among the first {len(so_far)}. Ticking only the easy ones flatters: with "
        f"all of those ticked the teacher would be right on {low:.1f} to {high:.1f} % of them."
    ]


def unknown_notes(rows: Sequence[TickedRow]) -> list[str]:
    """Say how an image counts on which the teacher is wrong and nobody said what it is."""
    most = max((row.unknown for row in rows), default=0)
    if not most:
        return []
    return [
        "Audit: where the teacher is wrong and no right class is given, an artifact that says something else counts as "
        f"wrong in the lower bound and as right in the upper ({most} of its images at most)."
    ]


def missing_notes(travelling: Sequence[Tick], evaluation: Evaluation) -> list[str]:
    """Say why no artifact has a figure."""
    if travelling:
        return []
    if evaluation.labels is not None:
        return ["Audit: the ticked images are not among the labelled ones that the artifacts are evaluated on."]
    return ["Audit: no ticked image is among those that the artifacts are evaluated on, which no student learns from."]


def stranger_notes(travelling: Sequence[Tick], taught: Sequence[str]) -> list[str]:
    """Say where the ticks are of another teacher than the bundle's."""
    differ = sum(tick.teacher != answer for tick, answer in zip(travelling, taught, strict=True))
    if not differ:
        return []
    return [
        f"Audit: on {differ} of {len(travelling)} images the teacher's answer on the sheet is not the bundle's; the "
        "teacher's figure is of the sheet's answers. prgkit audit makes a new sheet and keeps what was ticked."
    ]

"""Whether an INT8 file is as good as FP32, in figures and in words: by the teacher, and by labels where known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from prgkit.data.ticks import Tick
from prgkit.export.bundle.bundle import Evaluation
from prgkit.export.bundle.manifest import NonInferiority, NotBuilt, NotKept, PairedShares, TooFewImages
from prgkit.metrics import Z_ONE_SIDED, Labels, Logits, agreement, divergences, paired_bound

Z_NINE_IN_TEN = 1.281552  # of a normal value, 90 % lie below


def compare_with_fp32(fp32: Logits, file: Logits, teacher: Logits, labels: Labels | None = None) -> NonInferiority:
    """Compare a file's logits with those of the FP32 file, by the teacher's; each is [n, classes], of the same images.

    ``labels`` [n] are class numbers, -1 where none is known. Whether the file may be kept says `NonInferiority.holds`.
    """
    answer = teacher.argmax(axis=1)
    known = np.zeros(len(fp32), bool) if labels is None else labels >= 0
    before, after = divergences(teacher, fp32), divergences(teacher, file)
    increase = after - before
    return NonInferiority(
        images=len(fp32),
        agreement_fp32=agreement(file, fp32),
        teacher=paired_shares(fp32, file, answer),
        labels=None if labels is None or not known.any() else paired_shares(fp32[known], file[known], labels[known]),
        kl_fp32=float(before.mean()),
        kl=float(after.mean()),
        kl_bound=float(increase.mean() + Z_ONE_SIDED * increase.std() / len(increase) ** 0.5),
    )


def paired_shares(fp32: Logits, file: Logits, right: Labels) -> PairedShares:
    """Return on how many images [n] two files' answers are the ``right`` ones, and how far the shares may be apart."""
    ours, theirs = file.argmax(axis=1) == right, fp32.argmax(axis=1) == right
    won, lost, count = int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(right)
    return PairedShares(
        images=count,
        fp32=100 * float(theirs.mean()),
        file=100 * float(ours.mean()),
        won=won,
        lost=lost,
        bounds=(paired_bound(won, lost, count), -paired_bound(lost, won, count)),
    )


def known_classes(evaluation: Evaluation, ticks: Iterable[Tick], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the class of each evaluation image [n], of its label or what a person ticked; -1 where neither says it."""
    if evaluation.labels is not None:
        return evaluation.labels
    places = {name: place for place, name in enumerate(classes)}
    truth = {tick.key: places.get(tick.truth or "", -1) for tick in ticks}
    return np.array([truth.get(key, -1) for key in evaluation.keys], dtype=np.int64)


def too_few(images: int, margin: float) -> TooFewImages | None:
    """Return that so few images cannot show that any file is as good, or None where they can."""
    if paired_bound(0, 0, images) >= -margin:
        return None
    return TooFewImages(kept=False, margin=margin, images=images)


def images_needed(discordant: float, margin: float) -> int:
    """Return on how many images a file that is as good as FP32 is kept nine times in ten.

    ``discordant`` is the share of images on which just one of the two is right; ``margin`` is in percent points.
    """
    share = margin / 100
    by_chance = (Z_ONE_SIDED + Z_NINE_IN_TEN) ** 2 * discordant / share**2
    return math.ceil(max(by_chance, Z_ONE_SIDED**2 * (1 / share - 1)))


def int8_sentence(facts: NotKept) -> str:
    """Say in a sentence what became of an INT8 file, with its figures."""
    if isinstance(facts, NotBuilt):
        return f"INT8 is not kept: {facts.why}"
    if isinstance(facts, TooFewImages):
        return (
            f"INT8 is not kept: {facts.images:,} held-out images cannot show that it is as good as FP32; with the same "
            f"answers it could be {-paired_bound(0, 0, facts.images):.2f} points worse, and {facts.margin:g} are "
            f"allowed; {images_needed(0, facts.margin):,} images or more are needed"
        )
    assert facts.comparison is not None
    kept = "as good as FP32" if facts.kept else "INT8 is not kept: it is not surely as good as FP32"
    return f"{kept}: {comparison_sentence(facts.comparison, facts.margin)}"


def comparison_sentence(found: NonInferiority, margin: float) -> str:
    """Say how a file stands to FP32, and what it would take where a larger number of images might keep it."""
    holds = found.conditions(margin)
    told = [f"{shares_in_words('the same answer as the teacher', found.teacher)}, {margin:g} allowed"]
    if found.labels is not None:
        told.append(shares_in_words("right", found.labels))
    told.append(
        f"KL to the teacher {found.kl:.3f} (FP32 {found.kl_fp32:.3f}), at worst {found.kl_bound:+.3f}, "
        f"{found.kl_allowed:.3f} allowed"
    )
    told.append(f"the same answer as FP32 on {found.agreement_fp32:.2f} %")
    needed = images_needed((found.teacher.won + found.teacher.lost) / found.images, margin)
    if not holds["teacher"] and holds["kl"] and needed > found.images:
        told.append(f"about {needed:,} images would show whether it is as good")
    return "; ".join(told)


def shares_in_words(what: str, shares: PairedShares) -> str:
    """Say on how many images a file is right, FP32 is, and how much worse the file may be."""
    return (
        f"{what} on {shares.file:.2f} % of {shares.images:,} images (FP32 {shares.fp32:.2f} %), at worst "
        f"{shares.bounds[0]:+.2f} points"
    )

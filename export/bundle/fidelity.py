"""The fidelity floor of INT8 in figures and in words: how surely a file gives FP32's answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prgkit.export.bundle.manifest import NonInferiority, NotBuilt, NotKept, PairedShares
from prgkit.metrics import Z_ONE_SIDED, Labels, Logits, agreement, divergences, paired_bound

NAMED = 4  # blocks at the most in a sentence; the manifest has them all
WANTED_IMAGES = 2000  # with fewer, the lower bound lies far below the share itself


def compare_with_fp32(
    fp32: Logits, file: Logits, teacher: Logits, labels: Labels | None = None
) -> NonInferiority:
    """Compare a file's logits with those of the FP32 file, by the teacher's; each is [n, classes], of the same images.

    ``labels`` [n] are class numbers, -1 where none is known. Whether the file may be kept says `NonInferiority.holds`.
    """
    answer = teacher.argmax(axis=1)
    known = np.empty(0, bool) if labels is None else labels >= 0
    before, after = divergences(teacher, fp32), divergences(teacher, file)
    increase = after - before
    return NonInferiority(
        images=len(fp32),
        agreement_fp32=agreement(file, fp32),
        teacher=paired_shares(fp32, file, answer),
        labels=paired_shares(fp32[known], file[known], labels[known]) if labels is not None and known.any() else None,
        kl_fp32=float(before.mean()),
        kl=float(after.mean()),
        kl_bound=float(increase.mean() + Z_ONE_SIDED * increase.std(ddof=1) / len(increase) ** 0.5),
    )


def paired_shares(fp32: Logits, file: Logits, right: Labels) -> PairedShares:
    """Return on how many images [n] two files' answers are the ``right`` ones, and how far the shares may be apart."""
    ours, theirs = file.argmax(axis=1) == right, fp32.argmax(axis=1) == right
    won, lost, count = int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(right)
    return PairedShares(
        images=count,
        fp32=100 * float(theirs.mean()),
        file=100 * float(ours.mean()),
        bounds=(paired_bound(won, lost, count), -paired_bound(lost, won, count)),
    )


def too_few(images: int, floor: float) -> TooFewImages | None:
    """Return that so few images cannot show that any file holds the floor, or None where they can."""
    if fidelity(images, images).holds(floor):
        return None
    return TooFewImages(kept=False, floor=floor, images=images)


def int8_sentence(facts: NotKept) -> str:
    """Say in a sentence what became of an INT8 file, with its figures."""
    if isinstance(facts, NotBuilt):
        return f"INT8 is not kept: {facts.why}"
    floor = f"the floor is {facts.floor:g} %"
    if isinstance(facts, TooFewImages):
        most = fidelity(facts.images, facts.images).interval[0]
        return (
            f"INT8 is not kept: {facts.images:,} held-out images cannot show its fidelity; with every answer the same "
            f"its lower 95 % bound would be {most:.2f} %, and {floor}"
        )
    assert facts.fidelity is not None
    images = facts.fidelity.images
    share = f"the same answer as FP32 on {facts.fidelity.agreement:.2f} % of {images:,} held-out images, lower 95 % "
    share += f"bound {facts.fidelity.interval[0]:.2f} %; {floor}"
    wide = "" if images >= WANTED_IMAGES else f"; {WANTED_IMAGES:,} images would make the bound narrower"
    count = facts.blocks - len(facts.float_blocks)
    if not facts.kept:
        return f"INT8 is not kept: with only {count} of {facts.blocks} blocks in it, {share}{wide}"
    return f"{count} of {facts.blocks} blocks in INT8{in_float(facts.float_blocks)}: {share}{wide}"


def in_float(blocks: Sequence[str]) -> str:
    """Name the blocks in float, the most sensitive ones where they are many; nothing where there is none."""
    rest = len(blocks) - NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f", {', '.join(blocks[:NAMED])}{more} in float" if blocks else ""

"""The fidelity floor of INT8 in figures and in words: how surely a file gives FP32's answers."""

from __future__ import annotations

from collections.abc import Sequence

from prgkit.export.bundle.manifest import Fidelity, NotBuilt, NotKept, TooFewImages
from prgkit.metrics import wilson

NAMED = 4  # blocks at the most in a sentence; the manifest has them all
WANTED_IMAGES = 2000  # with fewer, the lower bound lies far below the share itself


def fidelity(same: int, images: int) -> Fidelity:
    """Return how often a file gives FP32's answer: on ``same`` of ``images``, with the 95 % interval of that share."""
    return Fidelity(images=images, agreement=100 * same / images, interval=wilson(same, images))


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
    if not facts.blocks:  # a runtime's own quantiser, whose files are of one piece
        return f"{'all in INT8' if facts.kept else 'INT8 is not kept: with all in it,'}{':' * facts.kept} {share}{wide}"
    count = facts.blocks - len(facts.float_blocks)
    if not facts.kept:
        return f"INT8 is not kept: with only {count} of {facts.blocks} blocks in it, {share}{wide}"
    return f"{count} of {facts.blocks} blocks in INT8{in_float(facts.float_blocks)}: {share}{wide}"


def in_float(blocks: Sequence[str]) -> str:
    """Name the blocks in float, the most sensitive ones where they are many; nothing where there is none."""
    rest = len(blocks) - NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f", {', '.join(blocks[:NAMED])}{more} in float" if blocks else ""

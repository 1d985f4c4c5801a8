"""The fidelity floor of INT8 in figures and in words: how surely a file gives FP32's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prgkit.evaluate.accuracy import wilson

ENOUGH = 0.8  # of the blocks in INT8: minutes of fine-tuning for the rest would win little
NEAR = 2.0  # times the disagreement that the floor allows is what a fine-tune can hope to mend
NAMED = 4  # blocks at the most in a sentence; the manifest has them all
WANTED_IMAGES = 2000  # with fewer, the lower bound lies far below the share itself

Facts = dict[str, Any]


def too_few(images: int, floor: float) -> Facts | None:
    """Return why so few images cannot show that any file holds the floor, or None where they can."""
    found = fidelity(images, images)
    if found["interval"][0] >= floor:
        return None
    return {"kept": False, "floor": floor, "images": images, "agreement": None, "interval": None, "tried": []}


def fidelity(same: int, images: int) -> Facts:
    """Return how often a file gives FP32's answer, in percent, with the 95 % interval of that share."""
    return {"images": images, "agreement": 100 * same / images, "interval": list(wilson(same, images))}


def blocks_in_int8(found: Facts) -> int:
    """Return how many blocks of a file are in INT8; none where no file was kept."""
    return int(found["blocks"] - len(found["float_blocks"])) if found["kept"] else 0


def within_reach(found: Facts) -> int | None:
    """Return with how few blocks in float a fine-tune may hold the floor: fewer than without it; None where with none.

    It brings answers back, but not from anywhere, and it does so only for the blocks it was made for: put back into
    float they do worse than before. Where few blocks are in float anyway, it is not worth its time.
    """
    if blocks_in_int8(found) >= ENOUGH * found["blocks"]:
        return None
    most = NEAR * (100 - found["floor"])
    fewer = (row["float_blocks"] for row in found["tried"] if 100 - row["agreement"] <= most and missed(row, found))
    return min(fewer, default=None)


def missed(row: Facts, found: Facts) -> bool:
    """Tell whether a file that was tried misses the floor."""
    return bool(row["interval"][0] < found["floor"])


def outcome(found: Facts, count: int) -> Facts:
    """Return what tells one way of making a file from another, with what ``count`` blocks in float gave."""
    facts = {key: found[key] for key in ("kept", "blocks", "float_blocks", "tail", "agreement", "interval")}
    return {**facts, "learned_with": next(row for row in found["tried"] if row["float_blocks"] == count)}


def told(found: Facts) -> str:
    """Say in a sentence what was found, with its figures."""
    if "why" in found:  # of an engine
        return f"INT8 is not kept: {found['why']}"
    floor, images = f"the floor is {found['floor']:g} %", f"{found['images']:,} held-out images"
    if found["agreement"] is None:
        most = wilson(found["images"], found["images"])[0]
        return (
            f"INT8 is not kept: {images} cannot show its fidelity; with every answer the same its lower 95 % bound "
            f"would be {most:.2f} %, and {floor}"
        )
    share = f"the same answer as FP32 on {found['agreement']:.2f} % of {images}, lower 95 % bound "
    share += f"{found['interval'][0]:.2f} %; {floor}"
    wide = "" if found["images"] >= WANTED_IMAGES else f"; {WANTED_IMAGES:,} images would make the bound narrower"
    count, tuned = found["blocks"] - len(found["float_blocks"]), fine_tuned(found)
    if not found["kept"]:
        return f"INT8 is not kept: with only {count} of {found['blocks']} blocks in it, {share}{wide}{tuned}"
    return f"{count} of {found['blocks']} blocks in INT8{apart(found['float_blocks'])}: {share}{wide}{tuned}"


def apart(blocks: Sequence[str]) -> str:
    """Name the blocks in float, the most sensitive ones where they are many; nothing where there is none."""
    rest = len(blocks) - NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f", {', '.join(blocks[:NAMED])}{more} in float" if blocks else ""


def fine_tuned(found: Facts) -> str:
    """Say what a fine-tune has brought; nothing where there was none."""
    if (recovery := found.get("recovery")) is None:
        return ""
    before, after = recovery["before"], recovery["after"]
    shares = [f"{one['learned_with']['agreement']:.2f} %" for one in (before, after)]
    count = before["blocks"] - before["learned_with"]["float_blocks"]
    changed = f"with {count} of {before['blocks']} blocks in INT8 {shares[0]} before, {shares[1]} after"
    if recovery["kept"]:
        return f"; its weights are fine-tuned for INT8, without that {blocks_in_int8(before)} could be ({changed})"
    return f"; a fine-tune for INT8 brought no more blocks into it ({changed})"

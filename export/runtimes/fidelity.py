"""The fidelity floor of INT8 in figures and in words: how surely a file gives FP32's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prgkit.metrics import wilson

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
    count = found["blocks"] - len(found["float_blocks"])
    if not found["kept"]:
        return f"INT8 is not kept: with only {count} of {found['blocks']} blocks in it, {share}{wide}"
    return f"{count} of {found['blocks']} blocks in INT8{apart(found['float_blocks'])}: {share}{wide}"


def apart(blocks: Sequence[str]) -> str:
    """Name the blocks in float, the most sensitive ones where they are many; nothing where there is none."""
    rest = len(blocks) - NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f", {', '.join(blocks[:NAMED])}{more} in float" if blocks else ""

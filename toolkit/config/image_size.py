"""The size of a model's input in pixels: one side of a square, or height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Size: TypeAlias = int | tuple[int, int]  # a square is always the number


def size_of(value: Any) -> Size:
    """Return a size as a configuration has it: a number, or [height, width].

    Raises:
        TypeError, ValueError: it is neither.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return int(value)
    height, width = (int(side) for side in (value if len(value) > 1 else (*value, *value)))
    return height if height == width else (height, width)


def sides(size: Size | Sequence[int]) -> tuple[int, int]:
    """Return height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def size_told(size: Size | Sequence[int]) -> str:
    """Return a size for people: ``224``, or ``128x64`` for a height of 128 and a width of 64."""
    height, width = sides(size)
    return str(height) if height == width else f"{height}x{width}"

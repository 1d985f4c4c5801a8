"""sheet.html: the audit's pictures with the teacher's answers, to be ticked in a browser or beside the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import Required, TypedDict, Unpack

from prgkit.data.ticks import COLUMNS, Tick, csv_row
from prgkit.evaluate.report.examples import PIXELATED_SIDE, data_uri
from prgkit.evaluate.report.html import render

LARGEST_SIDE = 320


@dataclass(frozen=True)
class Card:
    """One picture of the sheet."""

    tick: Tick
    picture: Image.Image
    others: Sequence[tuple[str, str]]  # the next answers, each with its confidence in percent
    heat_map: NDArray[np.uint8] | None = None  # [height, width, 3]: where the student finds the teacher's answer

    @property
    def row(self) -> str:
        """Its line of the CSV, without what is ticked."""
        return csv_row(self.tick)

    @property
    def small(self) -> bool:
        """Whether it is shown pixel by pixel."""
        return max(self.picture.size) <= PIXELATED_SIDE

    @property
    def source(self) -> str:
        """The picture itself, as a data URI."""
        return data_uri(np.asarray(self.picture), largest_side=LARGEST_SIDE)

    @property
    def heat_map_source(self) -> str:
        """The heat map as a data URI, or nothing."""
        return "" if self.heat_map is None else data_uri(self.heat_map, largest_side=LARGEST_SIDE)


class Page(TypedDict, total=False):
    """What a sheet says around its cards.

    Attributes:
        made_from: names the sample: under it the browser remembers what is ticked.
        base: names the ticks that are in the cards: where it has changed since, they go before what is remembered.
        learns_from: the source of the images, where the ticks are to be learned from.
    """

    title: Required[str]
    about: Required[str]
    classes: Required[Sequence[str]]
    ticks_file: Required[str]
    made_from: Required[str]
    base: Required[str]
    learns_from: str


def sheet(cards: Sequence[Card], **page: Unpack[Page]) -> str:
    """Return the whole page; everything that came from outside is escaped, and it needs no network."""
    return render("sheet.html", cards=cards, columns=COLUMNS, **{"learns_from": None, **page})

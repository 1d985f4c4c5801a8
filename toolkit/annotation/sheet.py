"""sheet.html: the audit's pictures with the teacher's answers, to be ticked in a browser or beside the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

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


def sheet(
    cards: Sequence[Card],
    *,
    title: str,
    about: str,
    classes: Sequence[str],
    ticks_file: str,
    made_from: str,
    base: str,
    learns_from: str | None = None,
) -> str:
    """Return the whole page; everything that came from outside is escaped, and it needs no network.

    ``made_from`` names the sample and ``base`` the ticks that are in ``cards``: the browser remembers what is ticked
    under the first, and the page's own ticks go before what it remembers where the second has changed since. Where the
    ticks are to be learned from, ``learns_from`` is the source of the images.
    """
    return render(
        "sheet.html",
        cards=cards,
        title=title,
        about=about,
        classes=classes,
        ticks_file=ticks_file,
        made_from=made_from,
        base=base,
        learns_from=learns_from,
        columns=COLUMNS,
    )

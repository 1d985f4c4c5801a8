"""A report as one self-contained HTML page, drawn without a script and without the network.

templates/ has the pages, their style sheets and scripts. Whatever comes from outside is escaped, all but the plots:
these escape what they quote themselves.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prgkit.evaluate.report.sections import Document, Section

MOST_FIGURES, MOST_LETTERS = 3, 26  # in a row of a table that still fits on a phone


def page(document: Document) -> str:
    """Return a document as a page."""
    return render("document.html", document=document)


def render(name: str, **values: Any) -> str:
    """Return the page that a template makes of ``values``."""
    return environment().get_template(name).render(values)


@cache
def environment() -> Environment:
    """Return what reads our templates."""
    templates = PackageLoader("prgkit.evaluate.report", "templates")
    made = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.globals["asset"] = asset
    made.filters["words"] = words
    made.tests["stacked"] = stacked
    return made


@cache
def asset(name: str) -> Markup:
    """Return a style sheet or a script of ours, to be put into a page as it is."""
    folder = resources.files("prgkit.evaluate.report").joinpath("templates")
    return Markup(folder.joinpath(name).read_text(encoding="utf-8"))


def words(text: str) -> str:
    """Return text in which no line break parts a figure from its unit."""
    return re.sub(r"(?<=\d) (?=(%|ms|MiB|MHz|°C)(?!\w))", "\u00a0", text)


def stacked(section: Section) -> bool:
    """Return whether each row of a table becomes a block on a narrow screen, as it would not fit there."""
    letters = (sum(len(cell.text) for cell in row.cells[1:]) for row in section.rows)
    return len(section.columns) - 1 > MOST_FIGURES or max(letters, default=0) > MOST_LETTERS

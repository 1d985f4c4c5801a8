"""The parts that pages are made of: the document, its sections, and tables of ready-made cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from prgkit.evaluate.report.templating import asset


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of ready-made parts, its style within it."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{asset('report.css')}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def section(title: str, about: str, body: str) -> str:
    """Return a part of the page: its title, a sentence on what is shown, and what is shown."""
    said = f'<p class="about">{words(about)}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def words(text: str) -> str:
    """Return text for the page, in which no line break parts a figure from its unit."""
    return re.sub(r"(?<=\d) (?=(%|ms|MiB|MHz|°C)(?!\w))", "\u00a0", escape(text))


def grid(header: str, lines: Sequence[str], *, kind: str = "") -> str:
    """Return a table of ready-made cells; the style's ``stacked`` makes each row a block on a narrow screen."""
    return f'<table class="{kind}"><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def heading(name: str, unit: str = "") -> str:
    """Return a column's heading, its unit under it."""
    return f'<th scope="col">{escape(name)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>'


def cell(name: str, value: str, under: str) -> str:
    """Return a figure with a smaller one under it."""
    smaller = f"<small>{escape(under)}</small>" if under else ""
    return f'<td data-name="{escape(name)}"><span>{escape(value)}</span>{smaller}</td>'

"""Pages from templates, in which all that comes from outside is escaped; templates/ has them, styles and scripts."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(name: str, **values: Any) -> str:
    """Return the page that a template makes of ``values``."""
    return environment().get_template(name).render(values)


@cache
def asset(name: str) -> str:
    """Return a style sheet or a script of ours, to be put into a page as it is."""
    return Markup(
        resources.files("prgkit.evaluate.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
    )


@cache
def environment() -> Environment:
    """Return what reads our templates."""
    templates = PackageLoader("prgkit.evaluate.report", "templates")
    made = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.globals["asset"] = asset
    return made

"""The site that `make docs` builds: Markdown pages, and the JSON schemas that are made from the code at each build."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import prgkit

sys.path.insert(0, str(Path(__file__).parent))

import generate

project = "prgkit"
version = release = prgkit.__version__
html_title = f"prgkit {release}"
html_theme = "furo"
html_show_copyright = False
html_copy_source = False
extensions = ["myst_parser"]
myst_heading_anchors = 3  # a link to a heading of another page is checked as a link to the page is
exclude_patterns: list[str] = []


def setup(app: Sphinx) -> None:
    """Have every page's source pass by `fill` before it is parsed."""
    app.connect("source-read", fill)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the JSON schemas, which are long, in the place of their mark."""
    if "@file_schemas@" in source[0]:
        source[0] = source[0].replace("@file_schemas@", generate.file_schemas())

"""What a bundle's README says, and the programs in it that need no prgkit: the texts are in templates/."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prgkit.config.image_size import sides
from prgkit.data.decode import LARGEST, NO_DATA
from prgkit.data.preprocessing import LONGEST, Preprocessing
from prgkit.export.bundle.manifest import Manifest


def section(name: str, manifest: Manifest, **values: Any) -> str:
    """Return a template filled in with what a manifest says."""
    scoring = manifest.open_vocabulary
    return render(
        name,
        manifest.preprocessing,
        manifest=manifest,
        classes=len(manifest.classes),
        scoring=scoring,
        takes_vectors=scoring is not None and scoring.class_vectors == "input",
        **values,
    )


def section_on_files(name: str, kind: str, manifest: Manifest) -> str:
    """Return a template that is filled in with the ``files`` of one format, where there are any."""
    files = [artifact for artifact in manifest.artifacts if artifact.format == kind]
    return section(name, manifest, files=files) if files else ""


def render(name: str, facts: Preprocessing, **values: Any) -> str:
    """Return a template filled in with how images are prepared, and with ``values``."""
    height, width = sides(facts.image_size)
    tall, wide = (math.floor(side / facts.crop) for side in (height, width))
    known = {"facts": facts, "height": height, "width": width, "tall": tall, "wide": wide}
    known |= {"largest": LARGEST, "no_data": NO_DATA, "longest": LONGEST}
    return environment().get_template(f"{name}.j2").render(known, **values)


@cache
def environment() -> Environment:
    """Return what reads the templates: plain text, in which nothing is escaped."""
    return Environment(
        loader=PackageLoader("prgkit.export.formats"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )

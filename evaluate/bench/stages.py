"""From where a latency is counted: from pixels (io), from a decoded picture (pipeline), from its file (end-to-end).

A GPU has one more: compute, its own time for the network, without the copies to it and back.
"""

from __future__ import annotations

from typing import Any

from prgkit.data.preprocessing import load_image
from prgkit.errors import PrgkitError
from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import Measured, Pictures
from prgkit.export.bundle.bundle import Bundle


def golden_pictures(bundle: Bundle) -> Pictures | None:
    """Return the bundle's golden pictures as the PNG files that they are; None where there are none to read."""
    paths = sorted(path for path in (bundle.folder / "golden").glob("[0-9]*.png") if path.suffixes == [".png"])
    try:
        files = [path.read_bytes() for path in paths]
        for file in files:
            load_image(file)
    except (OSError, PrgkitError):  # golden images that are damaged have a note already
        return None
    return Pictures(files, bundle.preprocessing.to_dict()) if files else None


def described(pictures: Pictures | None) -> dict[str, Any] | None:
    """Return how many pictures the scopes ran on, and of what sizes in pixels."""
    if pictures is None:
        return None
    sizes = sorted({load_image(file).size for file in pictures.files})
    return {"pictures": len(pictures.files), "smallest": list(sizes[0]), "largest": list(sizes[-1])}


def scope_block(one: Measured) -> dict[str, Any]:
    """Return the latencies of a row by scope, as far as they were measured."""
    return {
        scope: latency.summary(rounds, steady=True, scope=scope) for scope, rounds in one.scopes_ns.items() if rounds
    }

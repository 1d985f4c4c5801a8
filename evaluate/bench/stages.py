"""From where a latency is counted: from pixels (io), from a decoded picture (pipeline), from its file (end-to-end).

A GPU has one more: compute, its own time for the network, without the copies to it and back.
"""

from __future__ import annotations

from typing import Any

from prgkit.data.index import load_image
from prgkit.errors import PrgkitError
from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import Measured, Pictures
from prgkit.evaluate.report import formatting
from prgkit.evaluate.report.formatting import Report, Row
from prgkit.export.bundle.bundle import Bundle

NAMES = {"compute": "compute", "io": "io", "pipeline": "pipeline", "end_to_end": "end-to-end"}


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


def shown(report: Report) -> list[str]:
    """Return the scopes of a table: what only GPUs have is left out where none was measured."""
    gpus = any("compute" in row.get("scopes", {}) for row in formatting.measured(report))
    return [scope for scope in latency.SCOPES if gpus or scope != "compute"]


def scope_header(report: Report) -> list[str]:
    """Return the columns of the scopes' table."""
    return ["p50 ms", *(NAMES[scope] for scope in shown(report))]


def scope_lines(report: Report) -> list[list[str]]:
    """Return each measured row's medians by scope: from pixels, from a decoded picture, from its file."""
    rows: list[Row] = [row for row in formatting.measured(report) if row.get("scopes")]
    return [
        [
            formatting.row_name(row),
            *(formatting.ms((row["scopes"].get(scope) or {}).get("p50_ms")) for scope in shown(report)),
        ]
        for row in rows
    ]


def scope_about(report: Report) -> str:
    """Return what the scopes are, and which pictures they ran on."""
    found = report["scopes"]
    smallest, largest = ("×".join(map(str, found[name])) for name in ("smallest", "largest"))
    size = f"{smallest} px" if smallest == largest else f"{smallest} to {largest} px"
    compute = "compute, the GPU's own time by CUDA events; " if "compute" in shown(report) else ""
    return (
        f"Median latency at batch 1 by where it is counted from: {compute}io, from prepared pixels; pipeline, from "
        "a decoded picture, so with resizing and cropping; end-to-end, from the PNG file in memory, so with "
        f"decoding as well. In turns, in one process, with Pillow, on the bundle's "
        f"{found['pictures']} golden pictures ({size})."
    )

"""From where a latency is counted: from pixels (io), from a decoded image (pipeline), from its file (end-to-end).

A GPU has one more: compute, its own time for the network, without the copies to it and back.
"""

from __future__ import annotations

from prgkit.data.preprocessing import load_image
from prgkit.errors import PrgkitError
from prgkit.evaluate.bench import latency
from prgkit.evaluate.bench.latency import EncodedImages, Measured
from prgkit.evaluate.report.schema import Latency, Stage, StageImages
from prgkit.export.bundle.bundle import Bundle


def golden_images(bundle: Bundle) -> EncodedImages | None:
    """Return the bundle's golden images as the PNG files that they are; None where there are none to read."""
    paths = sorted(path for path in (bundle.folder / "golden").glob("[0-9]*.png") if path.suffixes == [".png"])
    try:
        files = [path.read_bytes() for path in paths]
        for file in files:
            load_image(file)
    except (OSError, PrgkitError):  # golden images that are damaged have a note already
        return None
    return EncodedImages(files, bundle.preprocessing.to_dict()) if files else None


def stage_images(images: EncodedImages | None) -> StageImages | None:
    """Return how many images the stages ran on, and of what sizes in pixels."""
    if images is None:
        return None
    sizes = sorted({load_image(file).size for file in images.files})
    return StageImages(images=len(images.files), smallest=sizes[0], largest=sizes[-1])


def latency_stages(one: Measured) -> dict[Stage, Latency]:
    """Return the latencies of an artifact by stage, as far as they were measured."""
    return {
        stage: latency.summarize(rounds, steady=True, stage=stage) for stage, rounds in one.stages_ns.items() if rounds
    }

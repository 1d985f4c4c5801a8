"""Heat maps: which part of a picture spoke for an answer, drawn over the picture as the student saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.errors import ExportError
from prgkit.evaluate.report.examples import Picture
from prgkit.export.bundle.bundle import Bundle, verify_artifact
from prgkit.export.bundle.manifest import EXPLAIN
from prgkit.export.runtimes.onnxruntime import OnnxRunner

LARGEST_OPACITY = 0.65
SMALLEST_SIDE = 224  # pixels of a drawn map's shorter side
COLOURS = np.array([[0, 0, 130], [0, 130, 255], [90, 220, 160], [255, 210, 0], [220, 0, 0]])  # from none to most


class Explainer:
    """The file of a bundle that says where in a picture each class was found.

    Raises:
        ExportError: the bundle has none, or it is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        artifact = next((one for one in bundle.artifacts if one.format == EXPLAIN), None)
        if artifact is None:
            fix = "export again with heat maps: prgkit export --explain"
            raise ExportError(
                "the bundle holds no file that says where a class was found", where=bundle.folder, fix=fix
            )
        verify_artifact(bundle.folder, artifact)
        self.bundle, self._runner = bundle, OnnxRunner(bundle.folder / artifact.file, spin=False)

    def over(self, pixels: NDArray[np.uint8], label: str) -> NDArray[np.uint8]:
        """Return prepared pixels [S, S, 3] with the evidence for a class over them, and larger where they are small.

        That is its evidence less the mean of all classes': a probability depends on differences alone.
        """
        maps = self._runner.outputs(pixels[None])[1][0]  # [classes, h, w]: how much each place speaks for each
        return overlay(pixels, maps[self.bundle.classes.index(label)] - maps.mean(axis=0))

    def of_picture(self, picture: Image.Image, label: str) -> NDArray[np.uint8]:
        """Return a picture as the student sees it, with the evidence for a class over it."""
        return self.over(self.bundle.preprocessing.prepare(picture), label)

    def close(self) -> None:
        """Release the session."""
        self._runner.close()


def with_heat_maps(pictures: Sequence[Picture], bundle: Bundle) -> Sequence[Picture]:
    """Return a report's pictures, those on which the answers differ with what spoke for the student's, if known."""
    if not any(one.format == EXPLAIN for one in bundle.artifacts):
        return pictures
    explainer = Explainer(bundle)
    try:
        return [
            replace(one, heat_map=explainer.over(one.pixels, one.student)) if one.student != one.teacher else one
            for one in pictures
        ]
    finally:
        explainer.close()


def overlay(pixels: NDArray[np.uint8], evidence: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels [S, S, 3] under a map [h, w]: red is most, and what speaks against the class is left as it is."""
    picture = Image.fromarray(pixels)
    if min(picture.size) < SMALLEST_SIDE:
        factor = -(-SMALLEST_SIDE // min(picture.size))
        picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    positive = np.maximum(evidence, 0)
    share = positive / max(float(positive.max()), 1e-12)  # [h, w], from 0 to 1
    heat = np.asarray(Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    colour = np.stack([np.interp(heat, np.linspace(0, 1, len(COLOURS)), channel) for channel in COLOURS.T], axis=-1)
    opacity = LARGEST_OPACITY * heat[..., None]
    drawn: NDArray[np.uint8] = np.rint((1 - opacity) * np.asarray(picture) + opacity * colour).astype(np.uint8)
    return drawn

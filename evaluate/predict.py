"""Name what is in an image, with a bundle and nothing that a device would not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prgkit.evaluate.accuracy import log_softmax
from prgkit.evaluate.choice import chosen_artifact
from prgkit.export.bundle import open_bundle
from prgkit.export.runners import open_runner
from prgkit.images import load_image


def predict(
    folder: Path, images: Sequence[Path], *, top_k: int, min_confidence: float, bench: Path | None = None
) -> list[dict[str, Any]]:
    """Return for each image its class and the ``top_k`` (name, probability) pairs, best first.

    Below ``min_confidence`` the class is None and ``abstained`` is true; the probabilities are still there.

    ``bench`` is where this machine's measurements of the bundle are: what they chose is run, the FP32 file otherwise.

    Raises:
        PrgkitError: the bundle or the choice is damaged, or an image cannot be read.
    """
    bundle = open_bundle(folder, verify=("onnx",))
    runner = open_runner(folder, chosen_artifact(bundle, bench))
    answers = []
    for image in images:
        pixels = bundle.preprocessing.prepare(load_image(image))[None]  # [1, S, S, 3]
        probabilities = np.exp(log_softmax(runner.run(pixels)))[0]  # [classes]
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        abstained = bool(probabilities[best[0]] < min_confidence)
        answers.append(
            {
                "image": str(image),
                "artifact": runner.name,
                "class": None if abstained else bundle.classes[best[0]],
                "abstained": abstained,
                "top": [(bundle.classes[index], round(float(probabilities[index]), 6)) for index in best],
            }
        )
    runner.close()
    return answers

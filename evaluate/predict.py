"""Name what is in an image, with a bundle and nothing that a device would not have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prgkit.data.archives import is_archive
from prgkit.data.decode import GreyRange
from prgkit.data.preprocessing import load_image
from prgkit.data.sources import open_images
from prgkit.errors import ExportError, PrgkitError
from prgkit.evaluate.selection import selected_artifact
from prgkit.export.bundle.bundle import open_bundle, verify_artifact
from prgkit.export.bundle.confidence import energy, promise, uncalibrated
from prgkit.export.bundle.manifest import Artifact, Manifest
from prgkit.export.runtimes import first_setup
from prgkit.metrics import log_softmax


def predict(
    folder: Path,
    images: Sequence[Path],
    *,
    top_k: int,
    min_confidence: float,
    reject_unknown: bool = False,
    bench: Path | None = None,
    runtime: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Yield for each picture its class and the ``top_k`` (name, probability) pairs, best first.

    A folder or an archive among ``images`` stands for its pictures. Below ``min_confidence`` the class is None and
    ``abstained`` is true; the probabilities are still there, calibrated where the bundle knows their temperature. The
    same where ``reject_unknown`` asks for it and a picture seems to show no class, which is ``rejected``. A picture
    that cannot be read has an ``error`` in place of an answer: what, where, fix.

    ``bench`` is where this machine's measurements of the bundle are: the artifact that its selection.json names
    is run, the FP32 file otherwise. A ``runtime`` that is named runs that one, or else the bundle's first that it can.

    Raises:
        PrgkitError: the bundle or selection.json is damaged, or the bundle does not know what shows no class; there is
            no such runtime, or it runs nothing here.
    """
    bundle = open_bundle(folder, verify=())
    facts = bundle.manifest.confidence
    if reject_unknown and facts is None:
        why = "pictures of none of the classes cannot be told: " + uncalibrated(bundle.manifest)
        raise ExportError(why, where=folder, fix="leave --reject-unknown out")
    artifact = selected_artifact(bundle, bench)
    setup = first_setup(folder, [artifact, *bundle.artifacts] if runtime else [artifact], runtime)
    artifact = setup.artifact
    if min_confidence or bundle.manifest.relabelled:
        note(worth(bundle.manifest, artifact, min_confidence))
    verify_artifact(folder, artifact)
    runner = setup.open()
    try:
        for given in images:
            for name, read in pictures_of(given, bundle.preprocessing.grey_range, note):
                try:
                    pixels = bundle.preprocessing.prepare(read())[None]  # [1, S, S, 3]
                except PrgkitError as error:
                    where = None if error.where is None else str(error.where)
                    yield {"image": name, "error": {"what": error.what, "where": where, "fix": error.fix}}
                    continue
                logits = runner.run(pixels) / bundle.manifest.temperature
                probabilities = np.exp(log_softmax(logits))[0]  # [classes]
                best = np.argsort(-probabilities, kind="stable")[:top_k]
                rejected = bool(reject_unknown and facts and energy(logits)[0] < facts.reject_below)
                abstained = rejected or bool(probabilities[best[0]] < min_confidence)
                yield {
                    "image": name,
                    "artifact": runner.name,
                    "class": None if abstained else bundle.classes[best[0]],
                    "abstained": abstained,
                    "rejected": rejected,
                    "top": [(bundle.classes[index], round(float(probabilities[index]), 6)) for index in best],
                }
    finally:
        runner.close()


def worth(manifest: Manifest, artifact: Artifact, min_confidence: float) -> str:
    """Say what a bundle promises of answers with that confidence, or that it promises nothing."""
    if manifest.confidence is None:
        return uncalibrated(manifest)
    shared = (
        ""
        if artifact.precision == "fp32"
        else f" (measured with the FP32 file, whose temperature {artifact.name} shares)"
    )
    return promise(manifest.confidence, min_confidence) + shared


def pictures_of(
    given: Path, grey: GreyRange | None, note: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Yield name and reader of a picture, or of each picture in a folder or an archive."""
    if not (os.path.isdir(given) or is_archive(given)):
        yield str(given), partial(load_image, given, grey=grey)
        return
    try:
        images = open_images(str(given), note=note).with_grey(grey)
    except PrgkitError as error:
        yield str(given), partial(refuse, error)
        return
    if images.left_out:
        note(f"{given}: {images.left_out}")
    for index in range(len(images)):
        yield images.path(index), partial(images.read, index)


def refuse(error: PrgkitError) -> Image.Image:
    """Say when it is asked for its pictures what is wrong with a folder."""
    raise error

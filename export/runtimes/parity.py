"""Do two runners agree on the same images?"""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prgkit.errors import ParityError
from prgkit.export.bundle.bundle import Bundle
from prgkit.export.bundle.checksums import require_unchanged
from prgkit.export.bundle.manifest import Parity
from prgkit.export.runtimes.base import Runner
from prgkit.metrics import agreement, kl
from prgkit.storage.reproducible import read_array, read_png

# Of max(1, largest reference logit): rounding in another order of summation stays below it.
FP32_RELATIVE_TOLERANCE = 1e-4
# Percent; INT8 files are judged by export.margin, on more images: this tells a broken INT8 engine from a right one.
MIN_TOP1_AGREEMENT = {"fp32": 100.0, "fp16": 99.0, "int8": 85.0}
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}  # of the largest logit: other processors sum in other orders


def require_agreement(
    reference_logits: NDArray[np.float32], logits: NDArray[np.float32], *, precision: str, names: tuple[str, str]
) -> Parity:
    """Return how two runners, called ``names``, agree by their logits [images, classes] of the same images.

    Raises:
        ParityError: they disagree by more than ``precision`` explains; the message holds every figure.
    """
    if reference_logits.shape != logits.shape:
        raise ParityError(
            f"{names[0]} gives logits of shape {reference_logits.shape}, {names[1]} of shape {logits.shape}"
        )
    for name, values in zip(names, (reference_logits, logits), strict=True):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(axis=1).sum())
            raise ParityError(f"{name} gives logits that are not finite on {bad} of {len(values)} images")
    parity = compare(reference_logits, logits, precision=precision)
    wanted = MIN_TOP1_AGREEMENT[precision]
    too_far = parity.tolerance is not None and parity.max_abs_difference > parity.tolerance
    if too_far or parity.top1_agreement < wanted:
        bound = "no bound in this precision" if parity.tolerance is None else f"allowed {parity.tolerance:.3g}"
        raise ParityError(
            f"{names[1]} ({precision}) does not agree with {names[0]} on {parity.images} images: "
            f"max abs difference {parity.max_abs_difference:.3g} ({bound}), "
            f"top-1 agreement {parity.top1_agreement:.2f} % (at least {wanted:g} %), KL {parity.kl:.3g} nats",
            fix="this export must not be deployed; try another opset or backend, and report the figures above",
        )
    return parity


def compare(reference_logits: NDArray[np.float32], logits: NDArray[np.float32], *, precision: str = "fp32") -> Parity:
    """Measure how closely ``logits`` [images, classes] follow ``reference_logits``, judging nothing."""
    reference, other = reference_logits.astype(np.float64), logits.astype(np.float64)
    tolerance = FP32_RELATIVE_TOLERANCE * max(1.0, float(np.abs(reference).max())) if precision == "fp32" else None
    return Parity(
        images=len(reference),
        max_abs_difference=float(np.abs(reference - other).max()),
        tolerance=tolerance,
        top1_agreement=agreement(reference, other),
        kl=kl(reference, other),
    )


def run_batches(runner: Runner, pixels: NDArray[np.uint8], *, batch: int = 32) -> NDArray[np.float32]:
    """Run any number of images [n, S, S, 3] in batches, so that memory does not grow with n; returns [n, classes]."""
    return np.concatenate([runner.run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)])


def run_and_close(runner: Runner, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the logits [n, classes] of images [n, S, S, 3], and release the runner."""
    with closing(runner):
        return run_batches(runner, pixels)


def check_golden(bundle: Bundle, runner: Runner, *, precision: str) -> None:
    """Run the golden images through this machine's preprocessing and ``runner``.

    Raises:
        ExportError: a golden file is missing or damaged.
        ParityError: names the stage that differs, preprocessing or model, and the image.
    """
    require_unchanged(bundle.folder, "golden")
    golden = bundle.folder / "golden"
    expected = read_array(golden / "logits.npy")
    inputs = np.stack([read_png(golden / f"{number:02}.input.png") for number in range(len(expected))])
    for number, pixels in enumerate(inputs):
        with Image.open(golden / f"{number:02}.png") as picture:
            prepared = bundle.preprocessing.prepare(picture.convert("RGB"))
        if not np.array_equal(prepared, pixels):
            furthest = int(np.abs(prepared.astype(int) - pixels.astype(int)).max())
            raise ParityError(
                f"preprocessing differs from where the student was exported: golden image {number:02}, "
                f"by up to {furthest} of 255",
                where=golden,
                fix="install the Pillow version of the export, or report both versions",
            )
    logits = runner.run(inputs)
    scale = max(1.0, float(np.abs(expected).max()))
    tolerance = GOLDEN_TOLERANCE[precision]
    differences = np.abs(logits - expected).max(axis=1)
    if not differences.max() <= tolerance * scale:
        worst = int(np.nan_to_num(differences, nan=np.inf).argmax())
        raise ParityError(
            f"{runner.name} differs from the exported logits on golden image {worst:02}: "
            f"by {differences[worst]:.3g}, allowed {tolerance * scale:.3g}; "
            "its input is identical, so the model stage differs",
            where=golden,
        )

"""Do two runners agree on the same images?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prgkit.errors import ParityError
from prgkit.export.runtimes.base import Runner
from prgkit.metrics import agreement, kl

FP32_RELATIVE_TOLERANCE = (
    1e-4  # of max(1, largest reference logit): rounding in another order of summation stays below it
)
# Percent; INT8 files are judged by export.fidelity, on more images: this tells a broken INT8 engine from a right one.
MIN_TOP1_AGREEMENT = {"fp32": 100.0, "fp16": 99.0, "int8": 85.0}


@dataclass(frozen=True)
class Parity:
    """How closely two sets of logits agree."""

    images: int
    max_abs_difference: float
    tolerance: float | None  # None where the precision is judged by top-1 alone
    top1_agreement: float  # percent
    kl: float  # mean KL(reference || other) of the softmax, in nats

    def to_dict(self) -> dict[str, Any]:
        """Return the parity as the manifest stores it."""
        return asdict(self)


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

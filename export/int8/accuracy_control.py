"""INT8 earns its place at export: what each block costs, and which stay in float until the floor is held."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prgkit.export.bundle.fidelity import fidelity
from prgkit.export.bundle.manifest import Attempt, BlockSensitivity, Fidelity, Quantization
from prgkit.export.int8.calibration import CLIP_QUANTILES, Spread
from prgkit.export.int8.qdq import Block, Quantizable
from prgkit.export.runtimes.onnxruntime import OnnxRunner
from prgkit.export.runtimes.parity import run_and_close
from prgkit.metrics import divergences

ANALYSED_IMAGES = 96

Pixels = NDArray[np.uint8]  # [images, S, S, 3]
Logits = NDArray[np.float32]  # [images, classes]


def choose_clip_quantile(fp32: Path, blocks: Sequence[Block], spreads: Mapping[str, Spread], pixels: Pixels) -> float:
    """Return which of `CLIP_QUANTILES` clips best: with ``blocks`` quantised, the root KL on these images is the least.

    All images are asked: a share of 2 % is two of those that blocks are analysed on, and which would be chance.
    """
    nodes = [node for block in blocks for node in block.nodes]
    logits = logits_of(fp32, pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clipped.onnx"

        def cost(clip_quantile: float) -> float:
            Quantizable(fp32, spreads, clip_quantile, "onnxruntime").write(path, nodes)
            return root_kl(logits, logits_of(path, pixels))

        return min(CLIP_QUANTILES, key=cost)


def analyse_sensitivity(
    fp32: Path, blocks: Sequence[Block], spreads: Mapping[str, Spread], clip_quantile: float, pixels: Pixels
) -> list[BlockSensitivity]:
    """Quantise each block by itself and return what that does to the student's logits, the most sensitive block first.

    That is measured on `ANALYSED_IMAGES` of the images, spread over all of them.
    """
    some = spread_over(pixels)
    logits = logits_of(fp32, some)
    network = Quantizable(fp32, spreads, clip_quantile, "onnxruntime")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        for block in blocks:
            network.write(path, block.nodes)
            quantised = logits_of(path, some)
            agreement = 100 * float((quantised.argmax(axis=1) == logits.argmax(axis=1)).mean())
            rows.append(BlockSensitivity(block=block.name, median_kl=median_kl(logits, quantised), agreement=agreement))
    return sorted(rows, key=lambda row: row.median_kl, reverse=True)


def root_kl(fp32: Logits, quantised: Logits) -> float:
    """Return the mean over images of the square root of KL(FP32 || quantised), for logits [n, classes]; unit root nats.

    An answer changes as often as the error is large beside the margin, and KL grows with the error's square. Its own
    mean can be that of the few images on which a network's activations explode.
    """
    return float(np.sqrt(divergences(fp32, quantised)).mean())


def median_kl(fp32: Logits, quantised: Logits) -> float:
    """Return the median over images of KL(FP32 || quantised), for logits [n, classes]; unit nats.

    It ranks blocks, where no image may outweigh the others.
    """
    return float(np.median(divergences(fp32, quantised)))


@dataclass(frozen=True)
class AccuracyTarget:
    """What the fidelity of INT8 files is measured on, and how much of it they must keep."""

    pixels: Pixels  # [n, S, S, 3] images that nothing was fitted to
    logits: Logits  # [n, classes], of the FP32 file
    floor: float  # percent

    def fidelity_of(self, path: Path) -> Fidelity:
        """Return how often an ONNX file gives the FP32 file's answer."""
        same = int((logits_of(path, self.pixels).argmax(axis=1) == self.logits.argmax(axis=1)).sum())
        return fidelity(same, len(self.pixels))


def control_accuracy(
    network: Quantizable,
    path: Path,
    *,
    blocks: Sequence[Block],
    sensitivity: Sequence[BlockSensitivity],
    target: AccuracyTarget,
    left_in_float: Sequence[str] = (),
    note: Callable[[str], None],
) -> Quantization:
    """Write ``path`` with as many blocks in INT8 as keep the fidelity floor, and return how it was made.

    The lower bound of the fidelity's 95 % interval must reach the floor. Where it does not, the blocks that are most
    sensitive go back to float; how many is found by bisection. Where even a single quantised block misses the floor,
    ``kept`` is false and there is no file. Blocks ``left_in_float`` are counted with the others.
    """
    ranked = [row.block for row in sensitivity]  # the most sensitive first
    total = len(left_in_float) + len(ranked)
    tried: dict[int, Attempt] = {}

    def write(count: int) -> None:
        floating = set(ranked[:count])
        network.write(path, [node for block in blocks if block.name not in floating for node in block.nodes])

    def holds(count: int) -> bool:
        write(count)
        attempt = tried[count] = Attempt(float_blocks=len(left_in_float) + count, fidelity=target.fidelity_of(path))
        share = f"{attempt.fidelity.agreement:.2f} %"
        note(f"{path.name}: with {len(ranked) - count} of {total} blocks in INT8 the same answer as FP32 on {share}")
        return attempt.fidelity.holds(target.floor)

    fewest = find_fewest(len(ranked), holds)
    best = len(ranked) - 1 if fewest is None else fewest
    if fewest is None:
        path.unlink()
    else:
        write(fewest)
    return Quantization(
        kept=fewest is not None,
        layout=network.layout,
        clip_quantile=network.clip_quantile,
        floor=target.floor,
        fidelity=tried[best].fidelity,
        blocks=total,
        float_blocks=(*ranked[:best], *left_in_float),
        sensitivity=tuple(sensitivity),
        tried=tuple(tried[count] for count in sorted(tried)),
    )


def find_fewest(blocks: int, holds: Callable[[int], bool]) -> int | None:
    """Return the least count of blocks in float, below ``blocks``, with which the floor holds; None where none does."""
    if holds(0):
        return 0
    low, high, fewest = 1, blocks - 1, None
    while low <= high:
        middle = (low + high) // 2
        if holds(middle):
            fewest, high = middle, middle - 1
        else:
            low = middle + 1
    return fewest


def spread_over(pixels: Pixels) -> Pixels:
    """Return up to `ANALYSED_IMAGES` images, spread over all of them."""
    places = np.unique(np.linspace(0, len(pixels) - 1, min(ANALYSED_IMAGES, len(pixels))).astype(int))
    some: Pixels = pixels[places]
    return some


def logits_of(path: Path, pixels: Pixels) -> Logits:
    """Return what an ONNX file says of images."""
    return run_and_close(OnnxRunner(path, spin=False), pixels)

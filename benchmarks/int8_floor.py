"""How often INT8's floor errs: a file that is as good as FP32 refused, or one kept that is worse by the whole margin.

    python benchmarks/int8_floor.py > results/int8_floor.json

Each image is one of three: FP32 alone has the teacher's answer, INT8 alone has it, or both do or none. The first two
together are the discordant images; a truly equal file has as many of the one as of the other. No student is needed.
"""

from __future__ import annotations

import json
from functools import cache

import click
import numpy as np

from prgkit.export.bundle.fidelity import images_needed
from prgkit.metrics import paired_bound

IMAGES = (200, 500, 1000, 2000, 5000)
DISCORDANT = (0.01, 0.03, 0.05, 0.09, 0.15)  # shares
MARGINS = (1.0, 1.5, 2.0, 3.0)  # percent points
GRID = np.arange(0.1, 20, 0.1)
bound = cache(paired_bound)


@click.command(context_settings={"show_default": True})
@click.option("--draws", default=20_000, help="Sets of images that are drawn for each case.")
def main(draws: int) -> None:
    """Print one JSON document: how often a file is kept, and the least margin that keeps an equal file in 90 %."""
    cases, least = [], []
    for images in IMAGES:
        for discordant in DISCORDANT:
            equal = bounds(images, discordant, 0.0, draws)
            fits = [round(float(margin), 1) for margin in GRID if (equal >= -margin).mean() >= 0.9]
            needed = {str(margin): images_needed(discordant, margin) for margin in MARGINS}
            least.append(
                {"images": images, "discordant": discordant, "margin": fits[0] if fits else None, "needed": needed}
            )
            for margin in MARGINS:
                worse = margin / 100  # where that is more than all discordant images, there are more of them
                kept = {"equal": equal, "worse": bounds(images, max(discordant, worse), worse, draws)}
                shares = {f"{name}_kept": float((found >= -margin).mean()) for name, found in kept.items()}
                cases.append({"images": images, "discordant": discordant, "margin": margin, **shares})
    click.echo(json.dumps({"draws": draws, "cases": cases, "least_margin": least}, indent=2))


def bounds(images: int, discordant: float, worse: float, draws: int) -> np.ndarray:
    """Return the lower bound [draws] in percent points of files that are worse by a share of the images."""
    won, lost = (discordant - worse) / 2, (discordant + worse) / 2
    drawn = np.random.default_rng(0).multinomial(images, [won, lost, 1 - won - lost], size=draws)
    return np.array([bound(int(better), int(poorer), images) for better, poorer, _ in drawn])


if __name__ == "__main__":
    main()

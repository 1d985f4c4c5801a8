"""By which held-out figure to keep an epoch's student: trains seeds, judges every epoch by labels, prints JSON.

    python benchmarks/checkpoint_choice.py mine.yaml --seeds 3 > results.json

The labels of data.evaluation are read here alone. A run that is finished is not trained again, so the command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from prgkit.config.recipe import load_recipe
from prgkit.data.augment import evaluation_views
from prgkit.data.index import read_image_index, select_labelled
from prgkit.progress import NullProgress
from prgkit.student.model import student_logits
from prgkit.training import distill
from prgkit.training.checkpoint import HeldOutScores
from prgkit.training.distill import Trainer

SMOOTHING = 0.7  # of a moving average over epochs
JUDGED = "judged.jsonl"  # in a run: an epoch's scores and its accuracy


@click.command()
@click.argument("recipe")
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=Path, default=Path("checkpoint_choice"), show_default=True, help="Where the runs are kept.")
@click.option("--targets", "root", type=Path, default=Path("targets"), show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(recipe: str, seeds: int, out: Path, root: Path, overrides: tuple[str, ...]) -> None:
    rows = []
    for seed in range(seeds):
        loaded = load_recipe(recipe, overrides=[*overrides, f"training.seed={seed}"])
        assert loaded.data.evaluation_spec is not None
        images = read_image_index(loaded.data.evaluation_spec, NullProgress())
        index, labels = select_labelled(images, loaded.classes, note=lambda _: None)
        evaluate = distill.evaluate

        def judge(trainer: Trainer, epoch: int) -> HeldOutScores:
            scores = evaluate(trainer, epoch)  # noqa: B023 - used within this turn of the loop
            student = trainer.state.average.module
            views = evaluation_views(index, student.preprocessing, np.arange(len(index)), workers=None)  # noqa: B023
            top1 = 100 * float((student_logits(student, views).argmax(axis=1) == labels).mean())  # noqa: B023
            with open(trainer.run.folder / JUDGED, "a") as file:
                file.write(json.dumps({"epoch": epoch, **scores._asdict(), "top1": round(top1, 2)}) + "\n")
            return scores

        distill.evaluate = judge
        run = distill.distill(loaded, out / f"seed-{seed}", root, NullProgress())
        distill.evaluate = evaluate
        by_epoch = {line["epoch"]: line for line in map(json.loads, (run.folder / JUDGED).read_text().splitlines())}
        rows.append({"seed": seed, **choose(list(by_epoch.values()))})
    click.echo(json.dumps({"recipe": recipe, "set": overrides, "rows": rows}, indent=1))


def choose(epochs: Sequence[dict[str, float]]) -> dict[str, object]:
    """Return the top-1 of the epoch that each selector chooses, of equals the later, and every epoch's figures."""
    agreement = [line["agreement"] for line in epochs]
    divergence = [-line["held_out_kl"] for line in epochs]
    scores = {
        "agreement": agreement,
        "divergence": divergence,
        "agreement, smoothed": smoothed(agreement),
        "divergence, smoothed": smoothed(divergence),
        "last epoch": [float(line["epoch"]) for line in epochs],
        "best by labels": [line["top1"] for line in epochs],
    }
    chosen = {name: max(range(len(epochs)), key=lambda place: (of[place], place)) for name, of in scores.items()}
    return {
        "chosen": {name: {key: epochs[place][key] for key in ("epoch", "top1")} for name, place in chosen.items()},
        "epochs": list(epochs),
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the moving average of values over epochs."""
    averages = [values[0]]
    for value in values[1:]:
        averages.append(SMOOTHING * averages[-1] + (1 - SMOOTHING) * value)
    return averages


if __name__ == "__main__":
    main()

"""What each correction of a teacher's answers is worth, and whether anything tells which one without a label; as JSON.

    python benchmarks/corrections.py demo --images demo:digits/train --targets targets > results.json

The images are labelled, and the labels are read here alone: to draw subsets (even, uneven, with classes missing, some
classes alone), and to count how right each correction is. The teacher's features of the images, of two views or more,
must be in the store: prgkit targets with the same --images and --set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import click
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.recipe import Recipe, load_recipe
from prgkit.config.sections import TargetsConfig, TeacherConfig
from prgkit.data.index import read_image_index, select_labelled
from prgkit.progress import NullProgress
from prgkit.teacher.ensemble import existing_targets
from prgkit.teacher.zero_shot import ZeroShotClassifier, fit_corrections, no_adjustment
from prgkit.training.corrections import NONE, describe_effects

TICKS = 100  # images that a person would look at
DRAWS = 200  # of so many images
Labels = NDArray[np.int64]


class Images(NamedTuple):
    """Labelled images with the teacher's features of two views."""

    labels: Labels  # [N]
    views: tuple[Tensor, Tensor]  # each [N, D]
    prompts: Tensor  # [M, C, D]
    scale: float


@click.command()
@click.argument("recipe")
@click.option("--images", required=True, help="Labelled images.")
@click.option("--classes", help="Class names, where they are not the recipe's.")
@click.option("--targets", "root", type=Path, default=Path("targets"), show_default=True)
@click.option("--narrow", "narrow", multiple=True, metavar="NAME,NAME,...", help="Also these classes alone.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(
    recipe: str, images: str, classes: str | None, root: Path, narrow: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    loaded = load_recipe(recipe, images=images, classes=classes, overrides=overrides)
    known = read(loaded, root)
    rows = []
    for name, positions in subsets(known.labels, len(loaded.classes)).items():
        rows.append({"subset": name, **measure(known, positions, range(len(loaded.classes)), loaded.classes)})
    for names in narrow:
        chosen = [loaded.classes.index(name) for name in names.split(",")]
        positions = np.flatnonzero(np.isin(known.labels, chosen))
        rows.append({"subset": f"{names} alone", **measure(known, positions, chosen, loaded.classes)})
    click.echo(json.dumps({"recipe": recipe, "teacher": loaded.teacher_name, "images": images, "rows": rows}, indent=2))


def read(recipe: Recipe, root: Path) -> Images:
    """Read labels, and the teacher's features of the evaluation view and the first crop, from its store."""
    store = existing_targets(recipe, root)
    if store is None:
        raise click.ClickException(f"no targets of this recipe in {root}: prgkit targets")
    every = read_image_index(recipe.data.image_spec, NullProgress(), known=store)
    index, labels = select_labelled(every, recipe.classes, note=partial(click.echo, err=True))
    rows = store.rows(index.keys, views=2)
    stored = rows >= 0  # of those that would choose a checkpoint one view is stored
    rows = rows[stored]

    def no_teacher(_: TeacherConfig) -> NoReturn:
        raise click.ClickException("the class names are not in the store: prgkit targets")

    first, second = (store.features(rows, np.full(len(rows), view)) for view in (0, 1))
    prompts = store.prompts(recipe.classes, recipe.templates, no_teacher)
    return Images(np.asarray(labels)[stored], (first, second), prompts, store.logit_scale)


def subsets(labels: Labels, classes: int) -> dict[str, Labels]:
    """Return positions of images: all, as many of each class, shares that fall as 1 / rank, and half of the classes."""
    random = np.random.default_rng(0)
    order = random.permutation(classes)
    by_class = [random.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    least = min(map(len, by_class))

    def take(count: Callable[[int], int]) -> Labels:
        return np.sort(np.concatenate([by_class[label][: count(rank)] for rank, label in enumerate(order)]))

    return {
        "all": np.arange(len(labels)),
        "even": take(lambda _: least),
        "uneven": take(lambda rank: max(2, math.ceil(least / (1 + rank)))),
        "half of the classes": take(lambda rank: least if rank < classes // 2 else 0),
    }


def measure(known: Images, positions: Labels, chosen: range | list[int], names: tuple[str, ...]) -> dict[str, object]:
    """Fit every correction to some images, and return its accuracy on them beside what is known without a label."""
    labels = np.array([list(chosen).index(label) for label in known.labels[positions]])
    classes = [names[label] for label in chosen]
    true_shares = {name: float((labels == number).mean()) or 1e-6 for number, name in enumerate(classes)}
    teacher = ZeroShotClassifier(known.prompts[:, list(chosen)], known.scale, "max", no_adjustment(len(classes)))
    first, second = ((view[positions], teacher.logits(view[positions])) for view in known.views)
    configs = {
        NONE: TargetsConfig(),
        "debias": TargetsConfig(debias=1.0),
        "debias, true prior": TargetsConfig(debias=1.0, prior=true_shares),
        "inmap": TargetsConfig(refine="inmap"),
        "inmap, even prior": TargetsConfig(refine="inmap", prior="even"),
        "inmap, true prior": TargetsConfig(refine="inmap", prior=true_shares),
        "stata": TargetsConfig(refine="stata"),
    }
    fitted = {name: fit_corrections(teacher, *first, config, classes) for name, config in configs.items()}
    right = {name: (one.correct(*first).argmax(dim=1).numpy() == labels) for name, one in fitted.items()}
    top1 = {name: round(100 * float(correct.mean()), 2) for name, correct in right.items()}
    effects = {row.name: row for row in describe_effects(fitted, first, second)}
    blind = [name for name in configs if "true" not in name and "even" not in name]  # what a user can choose from
    others = {name: np.mean([effects[name].agreement[other] for other in blind if other != name]) for name in blind}
    steadiest = max(blind, key=lambda name: effects[name].two_views)
    return {
        "images": len(labels),
        "classes": len(classes),
        "top1": top1,
        "effects": {
            name: effects[name].model_dump(include={"changed", "effective_classes", "two_views"}) for name in configs
        },
        "chosen": {
            "two views agree most": {"name": steadiest, "top1": top1[steadiest]},
            "agrees most with the others": (lambda name: {"name": name, "top1": top1[name]})(
                max(others, key=others.__getitem__)
            ),
            "stata where its views agree more": {
                "top1": top1["stata" if effects["stata"].two_views >= effects[NONE].two_views else NONE]
            },
            f"most right on {TICKS} ticks": {"top1": by_ticks(right, blind)},
        },
    }


def by_ticks(right: dict[str, NDArray[np.bool_]], names: list[str]) -> float:
    """Return the mean top-1, in percent, of what is most right on TICKS images drawn by chance; of equals the first."""
    random = np.random.default_rng(0)
    table = np.stack([right[name] for name in names])  # [corrections, N]
    drawn = [random.choice(table.shape[1], min(TICKS, table.shape[1]), replace=False) for _ in range(DRAWS)]
    best = [int(table[:, ticks].sum(axis=1).argmax()) for ticks in drawn]
    return round(100 * float(table.mean(axis=1)[best].mean()), 2)


if __name__ == "__main__":
    main()

"""What choices among the field's methods are worth on stored targets, without training a student: JSON.

    python benchmarks/methods.py suggest clothing.yaml --targets targets > suggest_labels.json
    python benchmarks/methods.py average two-teachers.yaml --targets targets > averages.json
    python benchmarks/methods.py mixed clothing.yaml --targets targets > mixed_views.json

The recipe's evaluation images are labelled, and the teacher has seen them (prgkit targets).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from prgkit.annotation.suggest import farthest_first
from prgkit.config.recipe import Recipe, load_recipe
from prgkit.config.sections import Average
from prgkit.data.augment import MultiViewDataset
from prgkit.data.index import ImageIndex, read_image_index, select_labelled
from prgkit.device import best_device
from prgkit.progress import NullProgress
from prgkit.teacher.clip import load_teacher, teacher_loader
from prgkit.teacher.ensemble import existing_targets
from prgkit.teacher.feature_store import embed
from prgkit.teacher.zero_shot import ZeroShotClassifier, log_shares, no_adjustment

PER_CLASS = (1, 4, 16)
DRAWS = 5  # of the images that can be labelled
PROBE_C = 10.0  # of the logistic regression on unit features
Floats = NDArray[np.float32]


class Judged(NamedTuple):
    """The labelled images, and what the recipe's teachers say of their evaluation view."""

    images: ImageIndex
    labels: NDArray[np.int64]  # [n]
    features: Tensor  # I [n, D]
    classifier: ZeroShotClassifier
    widths: tuple[int, ...]
    names: tuple[str, ...]


@click.group()
def main() -> None:
    """Measure one choice."""


def given(command: Any) -> Any:
    """Add the recipe and its targets."""
    root = click.Path(path_type=Path, exists=True)
    command = click.option("--targets", type=root, default="targets")(command)
    return main.command()(click.argument("recipe")(command))


@given
def suggest(recipe: str, targets: Path) -> None:
    """Hold farthest-first against chance and the least sure images: what a probe learns of so many labels."""
    judged = read(load_recipe(recipe), targets)
    shares = judged.classifier.logits(judged.features).softmax(dim=1).numpy()
    classes, rows = shares.shape[1], []
    for per_class in PER_CLASS:
        for name in ("random", "least confident", "farthest first"):
            found = []
            for seed in range(DRAWS):
                order = np.random.default_rng(seed).permutation(len(shares))
                pool, rest = np.split(order, [2 * len(order) // 3])
                chosen = pool[choose(name, shares[pool], per_class * classes, seed)]
                found.append(learned(judged, shares, chosen, rest))
            means = {key: round(float(np.mean([one[key] for one in found])), 2) for key in found[0]}
            spread = round(float(np.std([one["vote"] for one in found])), 2)
            rows.append({"labels_a_class": per_class, "way": name, **means, "vote_std": spread})
    show(recipe, judged, rows=rows, teacher=top1(shares, judged.labels))


def choose(way: str, pool: Floats, count: int, seed: int) -> NDArray[np.int64]:
    """Return which rows of a pool of probabilities [n, C] are labelled."""
    if way == "random":
        return np.random.default_rng(seed).permutation(len(pool))[:count]
    if way == "least confident":
        return np.argsort(pool.max(axis=1), kind="stable")[:count]
    return np.array(farthest_first(pool, pool[:0], count))


def learned(judged: Judged, shares: Floats, chosen: NDArray[np.int64], rest: NDArray[np.int64]) -> dict[str, float]:
    """Return what a probe on the teacher's features learns of some labels: alone, and voting with the teacher."""
    features, labels = judged.features.numpy(), judged.labels
    probe = LogisticRegression(C=PROBE_C, max_iter=300).fit(features[chosen], labels[chosen])
    own = np.zeros_like(shares[rest])
    own[:, probe.classes_] = probe.predict_proba(features[rest])
    return {
        "labels": len(chosen),
        "classes": len(probe.classes_),
        "teacher_right": top1(shares[chosen], labels[chosen]),
        "probe": top1(own, labels[rest]),
        "vote": top1(own + shares[rest], labels[rest]),
    }


@given
def average(recipe: str, targets: Path) -> None:
    """Hold the averages of several teachers against each other, and against each teacher alone."""
    judged = read(load_recipe(recipe), targets)
    plain = judged.classifier
    each = replace(plain, widths=judged.widths).each_teacher(judged.features)
    alone = {name: top1(one.numpy(), judged.labels) for name, one in zip(judged.names, each, strict=True)}
    ways = {"logits": plain.raw_logits(judged.features)}
    for name in get_args(Average):
        ways[name] = replace(plain, average=name, widths=judged.widths).raw_logits(judged.features)
    mean = log_shares(each, "confidence").exp().mean(dim=1).tolist()
    shares = {name: round(share, 3) for name, share in zip(judged.names, mean, strict=True)}
    truth = torch.from_numpy(judged.labels)
    rows = [
        {"average": name, "top1": top1(one.numpy(), judged.labels), "nll": round(float(F.cross_entropy(one, truth)), 3)}
        for name, one in ways.items()
    ]
    show(recipe, judged, alone=alone, confidence_shares=shares, rows=rows)


@given
@click.option("--images", type=int, default=600, show_default=True)
def mixed(recipe: str, targets: Path, images: int) -> None:
    """Ask the teacher about mixed images, and hold what it says against the mixture of what is stored."""
    loaded = load_recipe(recipe)
    judged, teacher = read(loaded, targets), load_teacher(loaded.teacher[0], best_device())
    random = np.random.default_rng(0)
    one = random.permutation(len(judged.labels))[:images]
    other, share = np.roll(one, 1), random.beta(1, 1, len(one)).astype(np.float32)
    share = np.maximum(share, 1 - share)
    rendered = MultiViewDataset(judged.images, teacher.preprocessing, loaded.views)
    seen = []
    for start in range(0, len(one), 32):
        part = slice(start, start + 32)
        pixels = [rendered.batch([(int(n), [0]) for n in side[part]]).pixels[:, 0].float() for side in (one, other)]
        a = torch.from_numpy(share[part])[:, None, None, None]
        seen.append(teacher.embed_images((a * pixels[0] + (1 - a) * pixels[1]).round().byte()).cpu())
    truth, a = torch.cat(seen), torch.from_numpy(share)[:, None]
    stored = F.normalize(a * judged.features[one] + (1 - a) * judged.features[other], dim=1)
    said, sides = judged.classifier.logits(truth), [judged.classifier.logits(judged.features[n]) for n in (one, other)]
    mixture = (a * sides[0].softmax(dim=1) + (1 - a) * sides[1].softmax(dim=1)).clamp(min=1e-12).log()
    crops = F.cosine_similarity(judged.features[one], crop_of(judged, rendered, teacher, one))
    rows = []
    for low, high in ((0.5, 0.6), (0.6, 0.75), (0.75, 0.9), (0.9, 1.0), (0.5, 1.0)):
        within = torch.from_numpy((share >= low) & (share <= high))
        rows.append({
            "share": [low, high],
            "images": int(within.sum()),
            "cosine_to_mixture": mean_of(F.cosine_similarity(truth, stored)[within]),
            "cosine_to_larger_part": mean_of(F.cosine_similarity(truth, judged.features[one])[within]),
            "agreement_mixed_probabilities": mean_of(100.0 * (said.argmax(1) == mixture.argmax(1))[within]),
            "agreement_mixed_features": mean_of(
                100.0 * (said.argmax(1) == judged.classifier.logits(stored).argmax(1))[within]
            ),
            "agreement_larger_part": mean_of(100.0 * (said.argmax(1) == sides[0].argmax(1))[within]),
            "kl_truth_to_mixture": mean_of(
                F.kl_div(mixture, said.log_softmax(1), reduction="none", log_target=True).sum(1)[within]
            ),
        })  # fmt: skip
    show(recipe, judged, cosine_of_a_crop=mean_of(crops), rows=rows)


def crop_of(judged: Judged, rendered: MultiViewDataset, teacher: Any, places: NDArray[np.int64]) -> Tensor:
    """Return the teacher's features of the first crop of some images, to know how far views are apart anyway."""
    parts = [rendered.batch([(int(n), [1]) for n in places[s : s + 32]]) for s in range(0, len(places), 32)]
    return torch.cat([teacher.embed_images(part.pixels[:, 0]).cpu() for part in parts])


def read(recipe: Recipe, root: Path) -> Judged:
    """Read labels, and the teachers' features of the evaluation view; they see what is not stored yet."""
    store = existing_targets(recipe, root)
    if store is None or recipe.data.evaluation_spec is None:
        raise click.ClickException(f"no labelled images, or no targets of this recipe in {root}: prgkit targets")
    every = read_image_index(recipe.data.evaluation_spec, NullProgress(), known=store)
    index, labels = select_labelled(every, recipe.classes, note=partial(click.echo, err=True))
    load = teacher_loader(NullProgress())
    views = np.ones(len(index), dtype=int)
    embed(store.stores, index, views=views, recipe=recipe, teacher=load, progress=NullProgress())
    features = store.features(store.rows(index.keys, views=1), np.zeros(len(index), dtype=int))
    prompts = store.prompts(recipe.classes, recipe.templates, load)
    classifier = ZeroShotClassifier(
        prompts, store.logit_scale, recipe.prompt_weighting, no_adjustment(len(recipe.classes))
    )
    widths = tuple(one.width for one in store.stores)
    return Judged(index, labels, features, classifier, widths, tuple(one.config.name for one in store.stores))


def top1(scores: Floats, labels: NDArray[np.int64]) -> float:
    """Return in percent how often the largest score [n, C] is the label's."""
    return round(100 * float((scores.argmax(axis=1) == labels).mean()), 2)


def mean_of(values: Tensor) -> float:
    """Return a rounded mean."""
    return round(float(values.mean()), 3)


def show(recipe: str, judged: Judged, **found: Any) -> None:
    """Print what was found."""
    about = {"recipe": Path(recipe).name, "teacher": " + ".join(judged.names), "images": len(judged.labels)}
    click.echo(json.dumps({**about, **found}, indent=2))


if __name__ == "__main__":
    main()

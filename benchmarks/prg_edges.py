"""What makes PRG's edges useful: readings of its edge term side by side, trained alike; one JSON document.

    python benchmarks/prg_edges.py mine.yaml --variants nodes,edges,softmax --seeds 3 > results.json

The recipe has labelled evaluation images, which count how right each student is, and choose nothing. A run that is
finished is not trained again, so the command resumes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prgkit.config.recipe import Recipe, load_recipe
from prgkit.data.augment import evaluation_views
from prgkit.data.index import read_image_index, select_labelled
from prgkit.device import best_device
from prgkit.objectives import prg
from prgkit.objectives.prg import PRG, correlate, nodes
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence
from prgkit.progress import NullProgress
from prgkit.storage.run import Run
from prgkit.student.model import load_student, student_logits
from prgkit.teacher.clip import teacher_loader
from prgkit.teacher.ensemble import open_targets
from prgkit.training.distill import distill

SHARP = 0.1  # the temperature of edges, which lie between -1 and 1
Edges = Callable[[Tensor, Tensor], Tensor]  # the student's and the teacher's [B, C] -> a scalar


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference, as the product has it."""
    return F.mse_loss(student, teacher)


def softmax(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(E^t / 0.1) || softmax(E^s / 0.1))."""
    return kl_divergence(student, teacher, SHARP)


def rank(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over pairs of classes of softplus of how far the student's order is from the teacher's."""
    ahead = (teacher[:, :, None] > teacher[:, None, :]).float()  # [B, C, C]
    lead = (student[:, :, None] - student[:, None, :]) / SHARP
    return (ahead * F.softplus(-lead)).sum() / ahead.sum().clamp(min=1)


def by_row(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the Pearson correlation of an image's edges, in the mean."""
    return (1 - prg.pearson(student, teacher)).mean()


def variant(
    compare: Edges = squared, *, weight: float = 1.0, node: float = 3.0, batch: bool = False, text: bool = False,
    distance: bool = False, fixed: bool = False, warmup: float = 0.0, foreign: bool = False,
) -> type[PRG]:  # fmt: skip
    """Return PRG with another edge term: ``weight * compare(E^s, E^t)``.

    Args:
        compare: how edges are compared.
        weight: of the edge term, and ``node`` of the node term.
        batch: lets the gradient through the batch's own share of the student's proxies.
        text: starts both sides' proxies at the class vectors.
        distance: compares nodes by their squared distance in place of their correlation.
        fixed: takes the student's edges to the teacher's proxies too, which do not move with the student.
        warmup: the share of the training over which the edge term grows to its weight.
        foreign: adds edges to class vectors of other names than the task's, on features alone.
    """

    class Variant(PRG):
        steps: Tensor
        foreign: Tensor

        def __init__(self, config: Any, context: LossContext) -> None:
            super().__init__(config.model_copy(update={"node_weight": node, "edge_weight": 0.0}), context)
            self.register_buffer("steps", torch.zeros(()))
            self.total = max(1.0, warmup * context.epochs * context.steps_per_epoch)
            self.register_buffer("foreign", FOREIGN.clone())
            if text:
                vectors = context.class_vectors
                started = nodes(vectors, context.logit_scale * vectors @ vectors.T, config.block)
                self.teacher_proxies.copy_(started)
                self.student_proxies.copy_(started)
                self.seen.fill_(True)

        def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
            before = self.student_proxies.clone()
            known = self.seen.clone()
            terms = super().forward(student, teacher)
            teacher_nodes = nodes(teacher.features, teacher.logits, self.config.block)
            student_nodes = nodes(student.features, student.logits, self.config.block)
            proxies = self.teacher_proxies if fixed else self.student_proxies
            if batch:
                proxies = self.with_gradient(before, known, student_nodes, teacher.labels)
            student_edges = correlate(student_nodes, proxies[self.seen])
            edge = compare(student_edges, correlate(teacher_nodes, self.teacher_proxies[self.seen]))
            if foreign:
                features = F.normalize(student.features, dim=1)
                edge = edge + compare(correlate(features, self.foreign), correlate(teacher.features, self.foreign))
            if distance:
                terms["node"] = node * (student_nodes - teacher_nodes).square().sum(dim=1).mean()
            grown = min(1.0, float(self.steps) / self.total) if warmup else 1.0
            self.steps += 1
            return {**terms, "edge": weight * grown * edge}

        def with_gradient(self, before: Tensor, known: Tensor, student_nodes: Tensor, labels: Tensor) -> Tensor:
            """Return the proxies after this batch, whose own part carries the gradient."""
            assignment = F.one_hot(labels, len(before)).to(student_nodes.dtype)
            counts = assignment.sum(dim=0)[:, None]
            mean = assignment.T @ student_nodes / counts.clamp(min=1)
            momentum = self.config.proxy_momentum * known.to(mean.dtype)[:, None]
            return torch.where(counts > 0, momentum * before + (1 - momentum) * mean, before)

    return Variant


FOREIGN = torch.empty(0, 1)  # class vectors of names that are not the task's [names, D]
VARIANTS: dict[str, Callable[[], type[PRG]]] = {
    "supervision alone": lambda: variant(weight=0.0, node=0.0),
    "nodes": lambda: variant(weight=0.0),
    "nodes of weight 10": lambda: variant(weight=0.0, node=10.0),
    "edges": lambda: variant(node=0.0),
    "nodes and edges": lambda: variant(),
    "edges of weight 10": lambda: variant(weight=10.0),
    "gradient through the batch": lambda: variant(batch=True, weight=10.0),
    "started at the text": lambda: variant(text=True, weight=10.0),
    "to the teacher's proxies": lambda: variant(fixed=True, weight=10.0),
    "softmax": lambda: variant(softmax),
    "correlation of rows": lambda: variant(by_row),
    "nodes by squared distance": lambda: variant(distance=True),
    "rank": lambda: variant(rank),
    "warmed up": lambda: variant(weight=10.0, warmup=0.3),
    "softmax to the teacher's proxies": lambda: variant(softmax, fixed=True),
    "softmax and gradient through the batch": lambda: variant(softmax, batch=True),
    "foreign classes": lambda: variant(weight=10.0, foreign=True),
    "softmax and foreign classes": lambda: variant(softmax, foreign=True),
}


@click.command()
@click.argument("recipe")
@click.option("--variants", default=",".join(VARIANTS), help="Comma-separated; all of them.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--foreign", type=click.Path(exists=True), help="A file of class names that are not the task's.")
@click.option("--out", type=Path, default=Path("edges"), show_default=True, help="Where the runs are kept.")
@click.option("--targets", "root", type=Path, default=Path("targets"), show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(
    recipe: str, variants: str, seeds: int, foreign: str | None, out: Path, root: Path, overrides: tuple[str, ...]
) -> None:
    rows = []
    for seed in range(seeds):
        loaded = load_recipe(recipe, overrides=[*overrides, f"training.seed={seed}", "objective.name=prg"])
        if foreign:
            embed_foreign(loaded, root, foreign)
        for name in variants.split(","):
            setattr(prg, "PRG", VARIANTS[name]())  # noqa: B010 - the loss is looked up by this name
            folder = out / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
            click.echo(f"{folder}", err=True)
            run = distill(loaded, folder, root, NullProgress())
            assert run.card.best is not None
            rows.append({"variant": name, "seed": seed, "top1": top1(run, loaded), **run.card.best.model_dump()})
    shown = {key: loaded.model_dump(mode="json")[key] for key in ("views", "student", "training")}
    click.echo(json.dumps({"recipe": recipe, "set": overrides, **shown, "rows": rows}, indent=1))


def embed_foreign(recipe: Recipe, root: Path, names: str) -> None:
    """Have the teacher read the names that are not the task's, for every variant made from now on."""
    global FOREIGN
    load = teacher_loader(NullProgress())
    others = [name for name in Path(names).read_text().split("\n") if name and name not in recipe.classes]
    prompts = open_targets(recipe, root, load).prompts(others, recipe.templates, load)
    FOREIGN = F.normalize(prompts.mean(dim=0), dim=1)


def top1(run: Run, recipe: Recipe) -> float:
    """Return the share of the labelled images on which a run's student is right, in percent."""
    assert recipe.data.evaluation_spec is not None
    read = read_image_index(recipe.data.evaluation_spec, NullProgress())
    index, labels = select_labelled(read, recipe.classes, note=lambda _: None)
    student = load_student(run).to(best_device())
    views = evaluation_views(index, student.preprocessing, np.arange(len(index)), workers=recipe.training.workers)
    right = student_logits(student, views).argmax(axis=1) == labels
    return round(100 * float(right.mean()), 2)


if __name__ == "__main__":
    main()

"""`prgkit compare --rank-students`: how alike a student that is not trained yet and its teacher see the same images.

DisWOT (Dong, Li and Wei, CVPR 2023, arXiv 2303.15678) scores a student with random weights by minus two distances to
the teacher on a mini-batch: of the relations between samples (Gram matrices of features with rows of unit length), and
of the class activations (Grad-CAM of the last layer: the gradient of cross-entropy by the head's weights). It had both
networks whole, and both with random weights. Here the teacher is trained, and known by its stored features alone:

- The Gram matrix is that of pooled features, as no maps are stored; it is uncentred, as in the paper.
- The class activations are our reading: the gradient by the weights of a head that has learned nothing, so that every
  class is equally likely, with the teacher's answers for labels. That asks of both sides for no more than features.
  They are compared as relations between classes, since the two sides' features differ in width.
- Both distances are means over rows, and count the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prgkit.config.image_size import sides
from prgkit.config.recipe import Recipe
from prgkit.config.sections import StudentConfig
from prgkit.data.augment import evaluation_views
from prgkit.device import best_device, seed_everything
from prgkit.evaluate.compare.aggregate import spread
from prgkit.evaluate.compare.ranking import correlations
from prgkit.evaluate.compare.trials import EvalSplit, ProgressOnly, Trial, finished
from prgkit.progress import Progress
from prgkit.storage.atomic import write_json
from prgkit.student.model import Student, build_student, reparameterised, student_preprocessing
from prgkit.training.dataset import DistillationDataset
from prgkit.training.prepare import prepare

SCHEMA = "prgkit.ranking/1"
INITIALISATIONS = 4
BATCHES = 3
BATCH_IMAGES = 128  # enough for several images of a class, or several classes


def rank_students(
    cells: Sequence[Trial],
    out: Path,
    targets_root: Path,
    progress: Progress,
    *,
    command: str,
    whole: Recipe | None = None,
) -> dict[str, Any]:
    """Rank the students of a comparison without training any, write ``out``/rank.json and return what is in it.

    Where cells of the comparison are finished, what their students came to stands beside the score, with rank
    correlations. All students see the same images, in their evaluation view. ``whole`` is as for `compare`.

    Raises:
        StudentError: one of them cannot be built.
        PrgkitError: for anything else the user can mend.
    """
    recipe = cells[0].recipe
    # Whatever the recipe starts from: DisWOT's score is about random weights.
    pages = {c.recipe.student.model: c.recipe.student.model_copy(update={"initial": "random"}) for c in cells}
    dataset = prepare(recipe, targets_root, progress)
    dataset = replace(dataset, classifier=dataset.classifier.to(best_device()))
    seeds = range(recipe.training.seed, recipe.training.seed + INITIALISATIONS)
    costs = {name: cost(untrained(page, dataset, seeds[0])) for name, page in pages.items()}
    batches, trained = some_batches(dataset, recipe.training.seed), measured(cells, out, targets_root, progress, whole)
    progress.start("ranking", len(pages) * INITIALISATIONS, "students")
    rows = []
    for name, page in pages.items():
        found = distances(page, dataset, batches, seeds, progress)  # [seeds, batches, 2]
        rows.append(
            {
                "student": name,
                "score": spread((-found.sum(axis=2)).mean(axis=1).tolist()),
                "relations": spread(found[..., 0].mean(axis=1).tolist()),
                "semantics": spread(found[..., 1].mean(axis=1).tolist()),
                "by_batch": (-found.sum(axis=2)).mean(axis=0).tolist(),
                **costs[name],
                "measured": trained["students"].get(name) if trained else None,
            }
        )
    ranking = {
        "schema": SCHEMA,
        "teacher": recipe.teacher_name,
        "image_size": recipe.student.image_size,
        "seeds": list(seeds),
        "batches": [len(batch) for batch in batches],
        "measured": {"row": trained["row"], "of": trained["of"]} if trained else None,
        "rows": sorted(rows, key=lambda row: -row["score"]["mean"]),
        "correlations": correlations(rows) if trained else None,
        "command": command,
    }
    write_json(out / "rank.json", ranking)
    return ranking


def untrained(page: StudentConfig, dataset: DistillationDataset, seed: int) -> Student:
    """Return a student with the random weights of a seed."""
    seed_everything(seed)
    return build_student(page, classes=dataset.classifier.prompts.shape[1], teacher_width=dataset.store.width)


@torch.no_grad()
def cost(student: Student) -> dict[str, int]:
    """Return the parameters and the multiplications of one image, both as they are deployed: with branches fused."""
    model = reparameterised(student.model)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *sides(student.preprocessing.image_size)))
    macs = counter.get_total_flops() // 2  # a multiplication and an addition each
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "macs": macs}


def some_batches(dataset: DistillationDataset, seed: int) -> list[NDArray[np.int64]]:
    """Return the positions of a few batches of the images that are learned from, none twice."""
    chosen = np.random.default_rng(seed).permutation(dataset.train_indices)[: BATCHES * BATCH_IMAGES]
    return np.array_split(chosen, max(1, len(chosen) // BATCH_IMAGES))


@torch.inference_mode()
def distances(
    page: StudentConfig,
    dataset: DistillationDataset,
    batches: Sequence[NDArray[np.int64]],
    seeds: Sequence[int],
    progress: Progress,
) -> NDArray[np.float64]:
    """Return both distances of a student to its teacher for each initialisation and batch: [seeds, batches, 2]."""
    device, classes = best_device(), dataset.classifier.prompts.shape[1]
    shown = student_preprocessing(page)
    pixels = [view.pixels[:, 0] for b in batches for view in evaluation_views(dataset.image_index, shown, b, workers=0)]
    found = np.empty((len(seeds), len(batches), 2))
    for row, seed in enumerate(seeds):
        # Batch norm takes its statistics from the batch: those of a network that has seen nothing yet mean nothing.
        student = untrained(page, dataset, seed).to(device).train()
        for column, (batch, seen) in enumerate(zip(batches, pixels, strict=True)):
            teacher = dataset.teacher_output(batch, np.zeros(len(batch), dtype=np.int64), device)
            maps = student.model.forward_features(student.images(seen.to(device)))  # type: ignore[operator]
            pooled = student.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
            found[row, column] = dissimilarity(pooled, teacher.features, teacher.labels, classes)
        progress.advance(1, page.model)
    return found


def dissimilarity(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """Return how far the relations of samples and of class activations are apart, each between 0 (the same) and 4.

    Args:
        student: pooled features [B, D_s].
        teacher: its features I [B, D].
        labels: its answers y [B].
        classes: C.
    """
    sides = [side.double() for side in (student, teacher)]
    samples = distance(*map(relations, sides))
    activations = distance(*(relations(class_activations(side, labels, classes)) for side in sides))
    return samples, activations


def relations(features: Tensor) -> Tensor:
    """Return the Gram matrix [n, n] of features [n, D], its rows of unit length; one without any length stays 0."""
    return F.normalize(features @ features.T, dim=1, eps=torch.finfo(features.dtype).tiny)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the mean over rows of the squared distance between two relations [n, n]."""
    return float((one - other).square().sum(dim=1).mean())


def class_activations(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return d CE / d V [K, D] for the K classes among ``labels``, where features V^T are logits and V [C, D] is 0."""
    named = labels.bincount().nonzero()[:, 0]  # [K]
    wrong = 1 / classes - (labels[:, None] == named).to(features)  # softmax(0) - y: [B, K]
    gradient: Tensor = wrong.T @ features / len(features)
    return gradient


def measured(
    cells: Sequence[Trial], out: Path, targets_root: Path, progress: Progress, whole: Recipe | None
) -> dict[str, Any] | None:
    """Return what students already came to, in the row that most of them are finished in; None where none is."""
    files = [(cell, out / "cells" / cell.folder_name / "cell.json") for cell in cells]
    if not any(path.exists() for _, path in files):
        return None
    split = EvalSplit.of(
        whole or cells[0].recipe, targets_root, ProgressOnly(progress), base_to_novel=whole is not None
    )
    of = "agreement_teacher" if split.labels is None else "top1"
    rows: dict[str, dict[str, list[float]]] = {}
    for cell, path in files:
        if (result := finished(path, cell, split)) is not None:
            rows.setdefault(cell.row, {}).setdefault(cell.recipe.student.model, []).append(result[of])
    if not rows:
        return None
    row = max(rows, key=lambda name: (len(rows[name]), name == "prg"))
    return {"row": row, "of": of, "students": {name: spread(values) for name, values in rows[row].items()}}

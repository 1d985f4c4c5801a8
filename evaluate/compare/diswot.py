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

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prgkit.config.image_size import sides, size_told
from prgkit.config.recipe import Recipe
from prgkit.config.sections import StudentConfig
from prgkit.data.augment import evaluation_views
from prgkit.device import best_device, seed_everything
from prgkit.evaluate.compare.aggregate import spread_of, spread_text
from prgkit.evaluate.compare.schema import Measured, Of, RankCorrelation, RankedStudent, Ranking, Spread
from prgkit.evaluate.compare.trials import EvalSplit, ProgressOnly, Trial, finished
from prgkit.evaluate.report.formatting import counted
from prgkit.evaluate.report.sections import Column, Section, table_row
from prgkit.progress import Progress
from prgkit.storage.atomic import write_json
from prgkit.student.model import Student, build_student, reparameterised, student_preprocessing
from prgkit.training.dataset import DistillationDataset
from prgkit.training.prepare import prepare

CANDIDATES = (
    *("repvit_m0_9", "repvit_m1_0", "repvit_m1_1", "repvit_m1_5", "repvit_m2_3"),
    *("efficientnet_lite0", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2"),
)
# What could tell beforehand which student will be best: whether more of it is better, and its name.
PREDICTORS = {
    "score": (1, "score"),
    "relations": (-1, "relations alone"),
    "semantics": (-1, "semantics alone"),
    "parameters": (1, "more parameters"),
    "macs": (1, "more MACs"),
}
INITIALISATIONS = 4
BATCHES = 3
BATCH_IMAGES = 128  # enough for several images of a class, or several classes


def candidates(student: str) -> list[str]:
    """Return the students to rank where none is named: the recipe's own, then the two families."""
    return list(dict.fromkeys([student, *CANDIDATES]))


def rank_students(
    trials: Sequence[Trial],
    out: Path,
    targets_root: Path,
    progress: Progress,
    *,
    command: str,
    whole: Recipe | None = None,
) -> Ranking:
    """Rank the students of a comparison without training any, write ``out``/rank.json and return what is in it.

    Where trials of the comparison are finished, what their students came to stands beside the score, with rank
    correlations. All students see the same images, in their evaluation view. ``whole`` is as for `compare`.

    Raises:
        StudentError: one of them cannot be built.
        PrgkitError: for anything else the user can mend.
    """
    recipe = trials[0].recipe
    # Whatever the recipe starts from: DisWOT's score is about random weights.
    students = [trial.recipe.student.model_copy(update={"initial": "random"}) for trial in trials]
    configs = {config.model: config for config in students}
    dataset = prepare(recipe, targets_root, progress)
    dataset = replace(dataset, classifier=dataset.classifier.to(best_device()))
    seeds = range(recipe.training.seed, recipe.training.seed + INITIALISATIONS)
    costs = {name: cost(untrained(config, dataset, seeds[0])) for name, config in configs.items()}
    batches = some_batches(dataset, recipe.training.seed)
    measured, trained = None, dict[str, Spread]()
    if any(trial.file(out).exists() for trial in trials):
        base_to_novel = whole is not None
        split = EvalSplit.of(whole or recipe, targets_root, ProgressOnly(progress), base_to_novel=base_to_novel)
        measured, trained = measured_students(trials, out, split)
    progress.start("ranking", len(configs) * INITIALISATIONS, "students")
    rows = []
    for name, config in configs.items():
        both = distances(config, dataset, batches, seeds, progress)  # [seeds, batches, 2]
        rows.append(ranked_student(name, both, costs[name], trained.get(name)))
    ranking = Ranking(
        teacher=recipe.teacher_name,
        image_size=recipe.student.image_size,
        seeds=list(seeds),
        batches=[len(batch) for batch in batches],
        measured=measured,
        rows=sorted(rows, key=lambda row: -row.score.mean),
        correlations=correlations(rows) if measured else None,
        command=command,
    )
    write_json(out / "rank.json", ranking.model_dump(mode="json"))
    return ranking


def untrained(config: StudentConfig, dataset: DistillationDataset, seed: int) -> Student:
    """Return a student with the random weights of a seed."""
    seed_everything(seed)
    return build_student(config, classes=dataset.classifier.prompts.shape[1], teacher_width=dataset.store.width)


class Cost(NamedTuple):
    """What a deployed student takes."""

    parameters: int
    macs: int  # multiplications of one image


@torch.no_grad()
def cost(student: Student) -> Cost:
    """Return the parameters and the multiplications of one image, both as they are deployed: with branches fused."""
    model = reparameterised(student.model)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *sides(student.preprocessing.image_size)))
    macs = counter.get_total_flops() // 2  # a multiplication and an addition each
    return Cost(sum(parameter.numel() for parameter in model.parameters()), macs)


def some_batches(dataset: DistillationDataset, seed: int) -> list[NDArray[np.int64]]:
    """Return the positions of a few batches of the images that are learned from, none twice."""
    chosen = np.random.default_rng(seed).permutation(dataset.train_indices)[: BATCHES * BATCH_IMAGES]
    return np.array_split(chosen, max(1, len(chosen) // BATCH_IMAGES))


@torch.inference_mode()
def distances(
    config: StudentConfig,
    dataset: DistillationDataset,
    batches: Sequence[NDArray[np.int64]],
    seeds: Sequence[int],
    progress: Progress,
) -> NDArray[np.float64]:
    """Return both distances of a student to its teacher for each initialisation and batch: [seeds, batches, 2]."""
    device, classes = best_device(), dataset.classifier.prompts.shape[1]
    shown = student_preprocessing(config)
    pixels = [view.pixels[:, 0] for b in batches for view in evaluation_views(dataset.image_index, shown, b, workers=0)]
    apart = np.empty((len(seeds), len(batches), 2))
    for place, seed in enumerate(seeds):
        # Batch norm takes its statistics from the batch: those of a network that has seen nothing yet mean nothing.
        student = untrained(config, dataset, seed).to(device).train()
        for column, (batch, seen) in enumerate(zip(batches, pixels, strict=True)):
            teacher = dataset.teacher_output(batch, np.zeros(len(batch), dtype=np.int64), device)
            maps = student.model.forward_features(student.images(seen.to(device)))  # type: ignore[operator]
            pooled = student.model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
            apart[place, column] = dissimilarity(pooled, teacher.features, teacher.labels, classes)
        progress.advance(1, config.model)
    return apart


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


def ranked_student(name: str, distances: NDArray[np.float64], cost: Cost, measured: Spread | None) -> RankedStudent:
    """Return a student's score from its distances [seeds, batches, 2], beside its cost and what it came to."""
    scores, relations, semantics = -distances.sum(axis=2), distances[..., 0], distances[..., 1]
    return RankedStudent(
        student=name,
        score=spread_of(scores.mean(axis=1).tolist()),
        relations=spread_of(relations.mean(axis=1).tolist()),
        semantics=spread_of(semantics.mean(axis=1).tolist()),
        by_batch=scores.mean(axis=0).tolist(),
        parameters=cost.parameters,
        macs=cost.macs,
        measured=measured,
    )


def measured_students(
    trials: Sequence[Trial], out: Path, split: EvalSplit
) -> tuple[Measured | None, dict[str, Spread]]:
    """Return what students already came to, with the objective that most of them are finished with."""
    of: Of = "agreement_teacher" if split.labels is None else "top1"
    by_label: dict[str, dict[str, list[float]]] = {}
    for trial in trials:
        if (result := finished(trial.file(out), trial, split)) is not None:
            by_label.setdefault(trial.label, {}).setdefault(trial.recipe.student.model, []).append(getattr(result, of))
    if not by_label:
        return None, {}
    label = max(by_label, key=lambda name: (len(by_label[name]), name == "prg"))
    return Measured(label=label, of=of), {name: spread_of(values) for name, values in by_label[label].items()}


def correlations(rows: Sequence[RankedStudent]) -> dict[str, RankCorrelation]:
    """Return for each predictor its rank correlation with what the trained students among ``rows`` came to."""
    trained = [(row, row.measured.mean) for row in rows if row.measured]
    reached = [mean for _, mean in trained]
    return {
        name: rank_correlation([sign * predictor(row, name) for row, _ in trained], reached)
        for name, (sign, _) in PREDICTORS.items()
    }


def predictor(row: RankedStudent, name: str) -> float:
    """Return a figure, or the mean of one that has a spread."""
    value = getattr(row, name)
    return float(value.mean if isinstance(value, Spread) else value)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> RankCorrelation:
    """Return Spearman's rho and Kendall's tau-b of n pairs, ties shared; None where one side is all the same."""
    signs = [np.sign(np.subtract.outer(side, side)) for side in (one, other)]  # [n, n]
    if not all(side.any() for side in signs):
        return RankCorrelation(spearman=None, kendall=None)
    # A row's sum is twice the rank among the others, up to a constant; ranks of mean 0 correlate by their products.
    return RankCorrelation(spearman=cosine(*(side.sum(axis=1) for side in signs)), kendall=cosine(*signs))


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the cosine of two arrays of the same shape."""
    return float((one * other).sum() / math.sqrt((one * one).sum() * (other * other).sum()))


def headline(ranking: Ranking) -> str:
    """Return what was ranked in a sentence."""
    sizes = " and ".join(map(str, sorted(set(ranking.batches))))
    return (
        f"{counted(len(ranking.rows), 'untrained student')} at {size_told(ranking.image_size)} px, "
        f"{counted(len(ranking.seeds), 'initialisation')}, {len(ranking.batches)} "
        f"batch{'' if len(ranking.batches) == 1 else 'es'} of {sizes} images; the most like the teacher first"
    )


def ranking_section(ranking: Ranking) -> Section:
    """Return the table of untrained students, the best score first."""
    names = ["score", "relations", "semantics", "parameters M", "MACs M"]
    if ranking.measured:
        names.append("top-1 %" if ranking.measured.of == "top1" else "agreement %")
    return Section(
        "Untrained students",
        columns=(Column("student", left=True), *map(Column, names)),
        rows=tuple(
            table_row(
                student.student,
                f"{student.score.mean:.3f} ± {student.score.deviation:.3f}",
                *(f"{distance.mean:.3f}" for distance in (student.relations, student.semantics)),
                *(f"{count / 1e6:,.1f}" for count in (student.parameters, student.macs)),
                *([spread_text(student.measured)] if ranking.measured else []),
            )
            for student in ranking.rows
        ),
        notes=tuple(ranking_notes(ranking)),
    )


def ranking_notes(ranking: Ranking) -> list[str]:
    """Return how to read the table, and how much of it is proved."""
    score = (
        "Score: minus the two distances to the teacher, of sample relations and of class activations, before training; "
        "mean ± standard deviation over initialisations."
    )
    if ranking.measured is None or ranking.correlations is None:
        return [score, "None of these students is trained here yet: nothing shows that the best score is the best one."]
    what = "top-1" if ranking.measured.of == "top1" else "agreement with the teacher"
    figures = "; ".join(f"{PREDICTORS[key][1]} {signed(both)}" for key, both in ranking.correlations.items())
    count = sum(row.measured is not None for row in ranking.rows)
    correlation = (
        f"Rank correlation with the measured {what} of {ranking.measured.label} (Spearman, Kendall; "
        f"{counted(count, 'student')}): {figures}."
    )
    return [score, correlation, proof(count)]


def signed(both: RankCorrelation) -> str:
    """Return ``+0.60, +0.47``."""
    return ", ".join("–" if value is None else f"{value:+.2f}" for value in (both.spearman, both.kendall))


def proof(students: int) -> str:
    """Say how far a rank correlation of so many students can be chance."""
    beyond = 1.96 / math.sqrt(students - 1) if students > 1 else math.inf  # Spearman's, normally approximated
    if beyond > 1:
        return f"{students} student{' proves' if students == 1 else 's prove'} nothing: chance alone gives any order."
    return f"Of {students} students, chance alone gives a Spearman beyond ±{beyond:.2f} one time in twenty."

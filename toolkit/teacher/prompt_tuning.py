"""Prompt tuning: a context is learned on a few labelled images of each class; the teacher's weights stay as they are.

CoOp (Zhou et al., 2022, arXiv 2109.01134) with one context for all classes: the embeddings of "a photo of a" in front
of each name learn by the cross-entropy of s * I * T^T with the labels, and nothing else of the teacher does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from prgkit import __version__
from prgkit.config.prompts import fill
from prgkit.config.recipe import Recipe
from prgkit.config.sections import TeacherConfig
from prgkit.data.decode import GreyRange
from prgkit.data.index import ImageIndex, index_images, read_image_index, select_labelled
from prgkit.data.sources import open_images
from prgkit.errors import ImagesError, RecipeError, some
from prgkit.progress import Progress
from prgkit.teacher.clip import Teacher, teacher_loader
from prgkit.teacher.feature_store import FeatureStore, embed, open_store
from prgkit.teacher.prompt_context import PromptContext, save_context
from prgkit.teacher.weights import check_teacher
from prgkit.teacher.zero_shot import ZeroShotClassifier, no_adjustment
from prgkit.workers import default_workers

WORDS = "a photo of a"  # what a context starts as, and how many tokens it has
EPOCHS = 20
STEPS_AN_EPOCH = 10  # a step is a pass of the text tower over every class; images, seen already, cost next to nothing
LEARNING_RATE = 0.05  # of the words' own embeddings, root mean square: models differ in how large theirs are
HELD_OUT = 4  # one shot in so many picks the epoch


class Score(BaseModel, frozen=True):
    """How often the likeliest class is the label [percent], and the mean cross-entropy."""

    accuracy: float
    loss: float


class SplitScores(BaseModel, frozen=True):
    """What the plain prompts and the context reach on some labelled images; None where there are no images."""

    images: int
    plain: Score | None
    context: Score | None


class TuningReport(BaseModel, frozen=True):
    """Where a context was written to, how it was learned, and what it is worth."""

    context: str
    prgkit: str
    labelled: str
    classes: list[str]
    shots: int
    seed: int
    epochs: int
    epoch: int
    learned: SplitScores
    held_out: SplitScores


@dataclass(frozen=True)
class Shots:
    """The labelled images that are used: their features are in a store."""

    store: FeatureStore
    rows: NDArray[np.int64]  # [images], -1 for an image that is not used
    labels: NDArray[np.int64]  # [images], among the classes that have any
    views: int  # stored of each training image, the evaluation view among them
    train_indices: NDArray[np.int64]  # positions of the images that the context learns from
    val_indices: NDArray[np.int64]  # positions of those that pick the epoch

    def batch(
        self, positions: NDArray[np.int64], views: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's features I [B, D] of these views, and the labels [B]."""
        features = self.store.features(self.rows[positions], views)
        return features.to(device), torch.from_numpy(self.labels[positions]).to(device)

    def evaluation_views(self, positions: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return features and labels of the images as they are evaluated."""
        return self.batch(positions, np.zeros(len(positions), dtype=np.int64), device)


class BestEpoch(NamedTuple):
    """The epoch whose context is kept, and its scores."""

    epoch: int
    held_out: Score | None
    learned: Score | None


def tune_prompt(recipe: Recipe, path: Path, targets_root: Path, *, shots: int, progress: Progress) -> TuningReport:
    """Learn a context on up to ``shots`` labelled images of each class, and write it to ``path``.

    Raises:
        RecipeError: the recipe names no labelled images, or several teachers.
        ImagesError: a label is no class, or fewer than two classes have a labelled image.
    """
    config = only_teacher(recipe)
    recipe = recipe.model_copy(update={"teacher": (config,)})
    check_teacher(config, note=progress.note)
    load = teacher_loader(progress)
    store = open_store(config, recipe.views, targets_root, load)
    assert recipe.data.labelled_spec is not None
    images = read_image_index(recipe.data.labelled_spec, progress, known=store)
    images, labels = select_labelled(images, recipe.classes, note=progress.note)
    chosen = draw(images, labels, shots, barred=evaluation_keys(recipe, images.source.grey), seed=recipe.training.seed)
    named = report_counts(chosen, labels, recipe.classes, shots, progress)
    held_out = np.concatenate([of_class[len(of_class) - len(of_class) // HELD_OUT :] for of_class in chosen])
    learned = np.setdiff1d(np.concatenate(chosen), held_out)
    views = np.zeros(len(images), dtype=np.int64)
    views[learned], views[held_out] = 1 + recipe.views.count, 1
    embed(store.stores, images, views=views, recipe=recipe, teacher=load, progress=progress)

    rows = np.where(views > 0, store.rows(images.keys, views=1), -1)
    used = Shots(store, rows, np.searchsorted(named, labels), 1 + recipe.views.count, learned, held_out)
    prompts = store.prompts(recipe.classes, recipe.templates, load, progress)[:, named]
    plain = ZeroShotClassifier(prompts, store.logit_scale, recipe.prompt_weighting, no_adjustment(len(named)))
    names = [recipe.classes[label] for label in named]
    context, best = learn(load(store.config), names, used, seed=recipe.training.seed, progress=progress)
    report = TuningReport(
        context=str(path),
        prgkit=__version__,
        labelled=images.source.spec,
        classes=names,
        shots=shots,
        seed=recipe.training.seed,
        epochs=EPOCHS,
        epoch=best.epoch,
        learned=SplitScores(images=len(learned), plain=plain_score(plain, used, learned), context=best.learned),
        held_out=SplitScores(images=len(held_out), plain=plain_score(plain, used, held_out), context=best.held_out),
    )
    save_context(path, context, config, report.model_dump(mode="json", exclude={"context"}))
    return report


def describe_tuning(report: TuningReport) -> str:
    """Put into words what a context is worth."""
    scores, which = (report.held_out, "held-out") if report.held_out.images else (report.learned, "learned")
    context, plain = scores.context, scores.plain
    assert context is not None
    assert plain is not None
    return (
        f"the teacher names {context.accuracy:.1f} % of {scores.images} {which} labelled images "
        f"(loss {context.loss:.3f}), and {plain.accuracy:.1f} % by the plain prompts ({plain.loss:.3f}); "
        f"epoch {report.epoch} of {report.epochs}"
    )


def only_teacher(recipe: Recipe) -> TeacherConfig:
    """Return the recipe's one teacher as it is without a context, or say what the recipe has to name."""
    if recipe.data.labelled is None:
        raise RecipeError(
            "the recipe names no labelled images",
            where="data.labelled",
            fix="--set data.labelled=FOLDER, with a sub-folder for each class; a few images in each will do",
        )
    if len(recipe.teacher) > 1:
        raise RecipeError(
            "a context is learned for one teacher, and the recipe names several",
            where="teacher",
            fix="adapt one at a time: --set 'teacher={model: ..., weights: ...}'",
        )
    return recipe.teacher[0].model_copy(update={"context": None})


def evaluation_keys(recipe: Recipe, grey: GreyRange | None) -> frozenset[str]:
    """Return the keys of the evaluation images: none of them is learned from. Their labels are not asked for."""
    if recipe.data.evaluation is None:
        return frozenset()

    class Anything:
        def __contains__(self, key: object) -> bool:
            return True

    images = open_images(recipe.data.evaluation).with_grey(grey)
    return frozenset(index_images(images, workers=default_workers(), known=Anything()).keys)  # none is decoded


def draw(
    images: ImageIndex, labels: NDArray[np.int64], shots: int, *, barred: frozenset[str], seed: int
) -> list[NDArray[np.int64]]:
    """Return the positions of up to ``shots`` images of each class that has any, by content and seed alone.

    Fewer shots with the same seed are the first of more.

    Raises:
        ImagesError: fewer than two classes have an image that is not ``barred``.
    """
    ranks = [hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest() for key in images.keys]
    drawn: dict[int, list[int]] = {}
    for position in sorted(range(len(ranks)), key=lambda position: ranks[position]):
        if images.keys[position] not in barred:
            drawn.setdefault(int(labels[position]), []).append(position)
    if len(drawn) < 2:
        left = "; those that are evaluation images do not count" if barred else ""
        raise ImagesError(
            f"{('no class has', 'only one class has')[len(drawn)]} labelled images{left}",
            where=images.source.spec,
            fix="give a few of each class, and other ones than data.evaluation",
        )
    return [np.array(drawn[label][:shots]) for label in sorted(drawn)]


def report_counts(
    chosen: Sequence[NDArray[np.int64]],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    shots: int,
    progress: Progress,
) -> NDArray[np.int64]:
    """Say which classes have fewer images than asked for, or none, and return those that have any, in label order."""
    counts = {int(labels[of_class[0]]): len(of_class) for of_class in chosen}
    if few := [f"{classes[label]} ({count})" for label, count in counts.items() if count < shots]:
        progress.note(f"{len(few)} of {len(classes)} classes have fewer than {shots} labelled images: {some(few)}")
    if none := [name for label, name in enumerate(classes) if label not in counts]:
        progress.note(
            f"{len(none)} of {len(classes)} classes have none; the others' context is theirs too: {some(none)}"
        )
    return np.array(list(counts))


def learn(
    teacher: Teacher, names: Sequence[str], shots: Shots, *, seed: int, progress: Progress
) -> tuple[PromptContext, BestEpoch]:
    """Train the context, and return that of the epoch with the least loss on the held-out shots, and what it reaches.

    Without held-out shots that is the last epoch. Epoch 0 is the words as they are.
    """
    device, scale = teacher.device, teacher.logit_scale
    sentences = teacher.sentences(fill([f"{WORDS} {{}}."], names)[0], WORDS)
    vectors = teacher.embed_words(sentences).clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=LEARNING_RATE * float(vectors.detach().square().mean().sqrt()))
    steps = min(STEPS_AN_EPOCH, len(shots.train_indices))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    generator = np.random.default_rng(seed)

    def evaluate(positions: NDArray[np.int64]) -> Score | None:
        features, labels = shots.evaluation_views(positions, device)
        with torch.no_grad():
            return score(scale * features @ teacher.embed_sentences(sentences, vectors).T, labels)

    best, kept, lowest = 0, vectors.detach().clone(), evaluate(shots.val_indices)
    progress.start("context", EPOCHS * steps, "step")
    for epoch in range(1, EPOCHS + 1):
        for batch in np.array_split(generator.permutation(shots.train_indices), steps):
            features, labels = shots.batch(batch, generator.integers(shots.views, size=len(batch)), device)
            loss = F.cross_entropy(scale * features @ teacher.embed_sentences(sentences, vectors).T, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.advance(1, f"loss {loss.item():.3f}")
        now = evaluate(shots.val_indices)
        if now is None or lowest is None or now.loss < lowest.loss:
            best, kept, lowest = epoch, vectors.detach().clone(), now
    with torch.no_grad():
        vectors.copy_(kept)
    return PromptContext(kept.cpu(), WORDS), BestEpoch(best, lowest, evaluate(shots.train_indices))


def plain_score(plain: ZeroShotClassifier, shots: Shots, positions: NDArray[np.int64]) -> Score | None:
    """Return what the teacher's plain prompts reach on these images."""
    features, labels = shots.evaluation_views(positions, torch.device("cpu"))
    return score(plain.logits(features), labels)


def score(logits: Tensor, labels: Tensor) -> Score | None:
    """Return the score of logits [n, C]; None where n is 0."""
    if not len(labels):
        return None
    accuracy = 100 * float((logits.argmax(dim=1) == labels).double().mean())
    return Score(accuracy=accuracy, loss=float(F.cross_entropy(logits, labels)))

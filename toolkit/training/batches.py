"""What each training step learns from: a function of (seed, epoch, step, process), so that a run can resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.recipe import Recipe
from prgkit.config.sections import Training
from prgkit.data.augment import Batch, MultiViewDataset, make_dataloader
from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import RunError
from prgkit.outputs import TeacherOutput
from prgkit.training.dataset import DistillationDataset, Process


class StepPlan(NamedTuple):
    """How many images a step has over all processes, and how many steps a training."""

    batch_size: int
    steps_per_epoch: int  # the last, smaller batch is left out
    steps: int
    warmup_steps: int


class StepBatch(NamedTuple):
    """What one process learns from in one step."""

    unlabelled: Batch
    labelled: tuple[Tensor, TeacherOutput] | None  # labelled images beside them, where an objective reads any


def plan_steps(dataset: DistillationDataset, config: Training, accelerator: Accelerator) -> StepPlan:
    """Divide the images of an epoch into steps.

    Raises:
        RunError: a process would get a single image in a step.
    """
    batch_size = min(config.batch_size, dataset.images_an_epoch)
    fewest = 1 if dataset.labelled is not None else 2  # a batch norm needs two, and a labelled one comes beside them
    if batch_size < fewest * accelerator.num_processes:
        raise RunError(
            f"a batch of {batch_size} images cannot be shared by {accelerator.num_processes} processes: "
            f"each needs {fewest} or more",
            fix="give more images, raise training.batch_size, or start fewer processes",
        )
    steps_per_epoch = dataset.images_an_epoch // batch_size
    steps = steps_per_epoch * config.epochs
    warmup_steps = round(min(config.warmup_epochs * steps_per_epoch, 0.2 * steps))
    return StepPlan(batch_size, steps_per_epoch, steps, warmup_steps)


def load_batches(
    dataset: DistillationDataset,
    preprocessing: Preprocessing,
    recipe: Recipe,
    plan: StepPlan,
    steps: range,
    accelerator: Accelerator,
    stop: Sequence[int],
) -> Iterator[StepBatch]:
    """Yield this process's part of the batch of each of ``steps``; end early once ``stop`` holds a signal."""
    config, process = recipe.training, Process(accelerator.process_index, accelerator.num_processes)
    rendered = MultiViewDataset(dataset.mixed or dataset.image_index, preprocessing, recipe.views)
    items = step_items(dataset, config, recipe.views.count, plan, steps, process)
    loaded = make_dataloader(rendered, items, workers=config.workers, stop=stop)
    if dataset.labelled is None:
        yield from (StepBatch(batch, None) for batch in loaded)
        return
    labelled = dataset.labelled.batches(preprocessing, config, recipe.views, steps, process, stop)
    yield from map(StepBatch, loaded, labelled)


def step_items(
    dataset: DistillationDataset, config: Training, views: int, plan: StepPlan, steps: range, process: Process
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield one process's (position, [view]) of each step: an image at most once an epoch, each epoch its next view.

    After its ``views`` crops come its mixtures, which have positions of their own and one view, the evaluation view.
    """
    images, mixtures = len(dataset.image_index), dataset.mixtures_an_image
    place_of = {int(position): place for place, position in enumerate(dataset.train_indices)}
    first_view = {position: int(dataset.image_index.keys[position][:8], 16) for position in dataset.train_indices}
    order = np.empty(0, dtype=np.int64)

    def item(position: int, epoch: int) -> tuple[int, list[int]]:
        turn = (first_view[position] + epoch) % (views + mixtures)
        if turn < views:
            return position, [1 + turn]
        return images + place_of[position] * mixtures + turn - views, [0]

    for step in steps:
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        if step_in_epoch == 0 or not len(order):
            chosen = epoch_positions(dataset, config, epoch, plan.steps_per_epoch * plan.batch_size)
            order = shuffled(dataset, chosen, np.random.default_rng((config.seed, epoch)))
        batch = order[step_in_epoch * plan.batch_size : (step_in_epoch + 1) * plan.batch_size]
        mine = batch[process.rank :: process.world_size]
        yield [item(int(position), epoch) for position in mine]


def shuffled(
    dataset: DistillationDataset, chosen: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return positions in random order; of tars that do not fit the disk together, those of a few at a time."""
    order = generator.permutation(chosen)
    images = dataset.image_index
    windows = images.source.windows(images.indices[order], generator)
    return order if windows is None else order[np.argsort(windows, kind="stable")]


def epoch_positions(dataset: DistillationDataset, config: Training, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the positions of an epoch: every training image, or ``count`` of them drawn by their weights."""
    if dataset.sample_weights is None:
        return dataset.train_indices
    sample = systematic_sample(dataset.sample_weights, count, epoch=epoch, epochs=config.epochs, seed=config.seed)
    return dataset.train_indices[sample]


def mixup(
    pixels: Tensor, teacher: TeacherOutput, strength: float, *, seed: tuple[int, ...]
) -> tuple[Tensor, TeacherOutput]:
    """Mix each image [B, S, S, 3] with another of its batch, a * one + (1 - a) * other, a ~ Beta(strength, strength).

    This is mixup (Zhang et al., ICLR 2018) on stored features: the teacher's probabilities are mixed as the images are,
    and so are its features, which then get unit length; the pseudo-label is the mixed probabilities' largest.
    """
    generator = np.random.default_rng((*seed, 2))
    share = float(generator.beta(strength, strength))
    share = max(share, 1 - share)  # an image stays the larger part of its mixture, whose number it keeps
    other = torch.from_numpy(generator.permutation(len(pixels))).to(pixels.device, non_blocking=True)
    blended = share * pixels.float() + (1 - share) * pixels[other].float()
    probabilities = teacher.logits.softmax(dim=1)
    logits = (share * probabilities + (1 - share) * probabilities[other]).clamp(min=1e-12).log()
    features = F.normalize(share * teacher.features + (1 - share) * teacher.features[other], dim=1)
    return blended, teacher._replace(features=features, logits=logits, labels=logits.argmax(dim=1))


def systematic_sample(
    shares: NDArray[np.float32], count: int, *, epoch: int, epochs: int, seed: int
) -> NDArray[np.int64]:
    """Return the ``count`` images [count] of an epoch; over all epochs each one comes as often as its share says.

    Systematic sampling (Madow, 1949): the shares [n] lie end to end on a line, and ``count`` points at even distances
    pick the images they fall on. A share is at most one distance, so no image is picked twice. The first point moves on
    from epoch to epoch and visits ``epochs`` even places in a shuffled order: all points of a training are one even
    grid, and an image comes in as many epochs as its share of them is, rounded down or up. Where ``count`` is less
    than the sum of the shares, all of them count for that much less.

    Args:
        shares: of the epochs, each above 0 and at most 1.
        count: images in each epoch, at most the sum of the shares.
        epoch: from 0.
        epochs: of the whole training.
        seed: of the training.
    """
    ends = np.cumsum(shares, dtype=np.float64)
    # A stride near the golden section visits every place once, and never two neighbours in a row.
    stride = next(step for step in range(max(1, round(0.618 * epochs)), 2 * epochs) if math.gcd(step, epochs) == 1)
    within = np.random.default_rng(seed).integers(2**16) / 2**16  # coarse, so that no sum below rounds up to the end
    first = (within + epoch * stride % epochs) / epochs  # in distances
    points = (first + np.arange(count)) * (ends[-1] / count)
    picked: NDArray[np.int64] = np.searchsorted(ends, points, side="right").astype(np.int64)
    return picked

"""The distillation data set: the images, which of them are held out, and what the teacher says of each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.sections import Training, Views
from prgkit.data.augment import MixedIndex, MultiViewDataset, make_dataloader
from prgkit.data.index import ImageIndex
from prgkit.data.preprocessing import Preprocessing
from prgkit.outputs import TeacherOutput
from prgkit.storage.atomic import fingerprint
from prgkit.storage.tensors import digest_of
from prgkit.teacher.ensemble import TeacherFeatures
from prgkit.teacher.zero_shot import ZeroShotClassifier

MOST_OF_A_CLASS = 5000  # images whose features are held in memory at once
PART = 256  # images whose answers are computed at once


class Process(NamedTuple):
    """One of the processes that train one student together."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class DistillationDataset:
    """The images, which of them are learned from, and the teacher's features of their views."""

    image_index: ImageIndex
    store: TeacherFeatures
    rows: NDArray[np.int64]  # [images, then mixtures], in the store; [..., K] in those of K teachers
    val_indices: NDArray[np.int64]  # positions that select the checkpoint
    train_indices: NDArray[np.int64]  # positions that the student learns from
    sample_weights: NDArray[np.float32] | None  # [train], the share of the epochs that each is in; None: all
    classifier: ZeroShotClassifier  # of those features, on the device where they are used
    labelled: LabelledDataset | None = None  # a few more images, where an objective learns from labels
    mixed: MixedIndex | None = None  # the images and, after them, mixtures of those that are learned from
    class_weights: NDArray[np.float32] | None = None  # [C], of training.class_weights; None: all are 1
    words: tuple[Tensor, ...] = ()  # data.words as the teacher reads them, where an objective does: [1 or 2, D] each

    @property
    def images_an_epoch(self) -> int:
        """How many images there are to learn from in an epoch."""
        return len(self.train_indices) if self.sample_weights is None else images_an_epoch(self.sample_weights)

    @property
    def mixtures_an_image(self) -> int:
        """How many mixtures there are of each image that is learned from."""
        return len(self.mixed.pairs) // len(self.train_indices) if self.mixed is not None else 0

    def fingerprint(self) -> str:
        """Return what changes when other images are learned from, or the teacher's logits of them are others."""
        made_from: list[Any] = [self.store.name, [self.image_index.keys[position] for position in self.train_indices]]
        if self.sample_weights is not None:
            made_from.append(self.sample_weights.tolist())
        if self.labelled is not None:
            made_from += [self.labelled.dataset.image_index.keys, self.labelled.labels.tolist()]
        if not self.classifier.adjustment.is_none:
            made_from.append([self.classifier.adjustment.log_prior.tolist(), self.classifier.adjustment.temperature])
        if self.classifier.refinement is not None:
            made_from.append(digest_of(self.classifier.refinement.to(torch.device("cpu")).tensors, {}))
        return fingerprint(made_from)

    def teacher_output(
        self, positions: NDArray[np.int64], views: NDArray[np.int64], device: torch.device
    ) -> TeacherOutput:
        """Return the teacher's output (I, W, y) for these views [B] of the images at ``positions`` [B]."""
        features = self.store.features(self.rows[positions], views).to(device, non_blocking=True)  # I [B, D]
        logits = self.classifier.logits(features)  # W [B, C]
        images = torch.from_numpy(self.image_of(positions)).to(device, non_blocking=True)
        return TeacherOutput(features, logits, logits.argmax(dim=1), images)

    def weighted(self, teacher: TeacherOutput) -> TeacherOutput:
        """Return the teacher's output with what each image counts, by the pseudo-label that it has here."""
        if self.class_weights is None:
            return teacher
        weights = torch.from_numpy(self.class_weights).to(teacher.labels.device, non_blocking=True)
        return teacher._replace(weights=weights[teacher.labels])

    def image_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the images [B] at ``positions`` [B], and for a mixture that which is the larger part of it."""
        images: NDArray[np.int64] = positions.copy()
        if self.mixed is not None and (mixtures := positions >= len(self.image_index)).any():
            images[mixtures] = self.mixed.pairs[positions[mixtures] - len(self.image_index), 0]
        return images

    def class_means(self) -> torch.Tensor:
        """Return the mean of the teacher's features of each pseudo-class: [C, D], zero where there is no image."""
        shape = self.classifier.prompts.shape[1:]
        sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
        for output in self.evaluation_outputs():
            labels = output.labels.cpu()
            sums.index_add_(0, labels, output.features.double().cpu())
            counts += torch.bincount(labels, minlength=len(counts))
        return (sums / counts.clamp(min=1)[:, None]).float()

    def class_features(self) -> Iterator[Tensor]:
        """Yield the teacher's features [n, D] of each pseudo-class, of at most MOST_OF_A_CLASS of its images.

        An index is ordered by content, so the first of a class are as good as any.
        """
        labels = self.pseudo_classes()
        for label in range(self.classifier.prompts.shape[1]):
            positions = self.train_indices[labels == label][:MOST_OF_A_CLASS]
            yield self.store.features(self.rows[positions], np.zeros(len(positions), dtype=np.int64))

    def pseudo_classes(self) -> NDArray[np.int64]:
        """Return the class that the teacher names in the evaluation view of each image that is learned from [train]."""
        labels: NDArray[np.int64] = torch.cat([output.labels.cpu() for output in self.evaluation_outputs()]).numpy()
        return labels

    def evaluation_outputs(self, positions: NDArray[np.int64] | None = None) -> Iterator[TeacherOutput]:
        """Yield the teacher's output for some images' evaluation views, in parts; None: all that are learned from.

        Parts are small, since every template has its own logits on the way.
        """
        for part in in_parts(self.train_indices if positions is None else positions):
            yield self.teacher_output(part, np.zeros(len(part), dtype=np.int64), self.classifier.prompts.device)


@dataclass(frozen=True)
class LabelledDataset:
    """A few labelled images: ``train_indices`` teach the first head, ``val_indices`` choose how the heads are mixed."""

    dataset: DistillationDataset
    labels: NDArray[np.int64]  # [images]
    first: int  # the number of the first one, after those without a label

    def batches(
        self,
        preprocessing: Preprocessing,
        config: Training,
        views: Views,
        steps: range,
        process: Process,
        stop: Sequence[int] = (),
    ) -> Iterator[tuple[Tensor, TeacherOutput]]:
        """Yield pixels [n, S, S, 3] and the teacher's output, with true labels, of one process's part of each step.

        A step has half as many labelled images as training.batch_size, or all there are; which ones is a function of
        the step. With fewer images than processes, some processes share one.
        """
        indices = self.dataset.train_indices
        size = min(max(process.world_size, config.batch_size // 2), len(indices))
        drawn = (np.random.default_rng((config.seed, 1, step)).choice(indices, size, replace=False) for step in steps)
        items = (
            [(int(position), [1 + step % views.count]) for position in batch[process.rank % size :: process.world_size]]
            for step, batch in zip(steps, drawn, strict=True)
        )
        rendered = MultiViewDataset(self.dataset.image_index, preprocessing, views)
        for batch in make_dataloader(rendered, items, workers=config.workers, stop=stop):
            positions = batch.positions.numpy()
            teacher = self.dataset.teacher_output(positions, batch.views[:, 0].numpy(), torch.device("cpu"))
            truth = torch.from_numpy(self.labels[positions])
            yield batch.pixels[:, 0], teacher._replace(images=teacher.images + self.first, truth=truth)


def in_parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divide positions or rows [n, ...] into those whose answers are computed at once."""
    return np.array_split(rows, max(1, -(-len(rows) // PART)))


def images_an_epoch(shares: NDArray[np.float32]) -> int:
    """Return how many images an epoch has, each image [n] being in this share of the epochs."""
    return int(shares.sum(dtype=np.float64))

"""What a loss is given: the context that it is made for, then both outputs of each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed
import torch.nn.functional as F
from torch import Tensor


class LossContext(NamedTuple):
    """What a loss is made for: C classes, teacher features of width D, N images, epochs and the steps of each."""

    classes: int
    width: int
    epochs: int
    steps_per_epoch: int
    images: int
    class_means: Callable[[], Tensor]  # [C, D], of the teacher's features by pseudo-label; zero where there is none
    class_vectors: Tensor  # [C, D], of unit length: by which the teacher scores features, refined where the recipe asks
    logit_scale: float
    stages: Callable[[], tuple[int, ...]]  # the channels that leave each stage of the student
    class_features: Callable[[], Iterator[Tensor]]  # the teacher's features [n, D] of each pseudo-class, on the CPU
    words: tuple[Tensor, ...]  # data.words as the teacher reads them: unit vectors [1, D] each, or [2, D] of a pair


class StudentOutput(NamedTuple):
    """The student's output: features F [B, D] in the teacher's space, and class logits L [B, C]."""

    features: Tensor
    logits: Tensor
    stages: tuple[Tensor, ...] = ()  # maps [B, channels, H, W] that leave its stages, where an objective asks for them
    heads: tuple[Tensor, ...] = ()  # the logits of both heads, where it has two: the one for labels, then the teacher's


class TeacherOutput(NamedTuple):
    """The teacher's output: unit features I [B, D], logits W [B, C] over all prompts, pseudo-labels y [B]."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    images: Tensor  # [B], the number of each image, below N
    truth: Tensor | None = None  # [B], true labels of the few images of data.labelled, -1 for all others
    weights: Tensor | None = None  # [B], of each image's pseudo-class (training.class_weights); None: all are 1


def batch_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the batch mean of each image's weight times its loss: [B], [B] -> scalar."""
    return losses.mean() if weights is None else (weights * losses).mean()


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted batch mean of the cross-entropy with classes [B] or probabilities [B, C] -> scalar."""
    if weights is None:
        return F.cross_entropy(logits, targets)
    return batch_mean(F.cross_entropy(logits, targets, reduction="none"), weights)


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Return the weighted batch mean of KL(softmax(teacher / T) || softmax(student / T)): logits [B, C] -> scalar."""
    divergence = F.kl_div(
        (student_logits / temperature).log_softmax(dim=1),
        (teacher_logits / temperature).log_softmax(dim=1),
        reduction="batchmean" if weights is None else "none",
        log_target=True,
    )
    return divergence if weights is None else batch_mean(divergence.sum(dim=1), weights)


def standardise_logits(logits: Tensor) -> Tensor:
    """Return logits [B, C] with mean zero and unbiased standard deviation one (Sun et al., CVPR 2024, 2403.01427).

    Every image gets the same sharpness: how sure the teacher is of it is lost. Of two classes nothing is left but
    which is larger, (+-0.7071), so that no gradient passes.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return math.sqrt(logits.shape[1] - 1) * F.normalize(centred, dim=1, eps=1e-7)


def several_processes() -> bool:
    """Return whether other processes train the same student."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()

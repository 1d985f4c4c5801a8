"""What a loss is given: the context that it is made for, then both outputs of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the batch mean of KL(softmax(teacher / T) || softmax(student / T)): logits [B, C] -> scalar."""
    return F.kl_div(
        (student_logits / temperature).log_softmax(dim=1),
        (teacher_logits / temperature).log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )

"""The few labelled images, where an objective learns from labels: each step sees some beside the unlabelled ones.

25 % of them are a validation split, on which it is chosen how a student's two heads are mixed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prgkit.config.sections import Training
from prgkit.data.augment import evaluation_views
from prgkit.metrics import log_softmax
from prgkit.outputs import TeacherOutput
from prgkit.student.model import Student
from prgkit.training.dataset import LabelledDataset

VALIDATION_SHARE = 0.25  # of the labelled images
ALPHAS = np.arange(0.05, 0.96, 0.05)  # never 0 or 1, as their logarithms are taken
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)


def append_labelled(
    pixels: Tensor, teacher: TeacherOutput, more: Tensor, labelled: TeacherOutput
) -> tuple[Tensor, TeacherOutput]:
    """Return a batch with the labelled images after it; the true label of all others is -1, which is none."""
    unknown = torch.full_like(teacher.labels, -1)
    pairs = zip(teacher._replace(truth=unknown), labelled, strict=True)
    joined = (
        torch.cat([one, other.to(one.device, non_blocking=True)])
        for one, other in pairs
        if one is not None and other is not None
    )
    return torch.cat([pixels, more.to(pixels.device, non_blocking=True)]), TeacherOutput(*joined)


@torch.inference_mode()
def tune_head_mixing(student: Student, labelled: LabelledDataset, config: Training) -> None:
    """Set alpha and beta of a student's two heads to those by which the validation split's labels are most probable."""
    if student.second is None:
        return
    indices, device = labelled.dataset.val_indices, student.mean.device
    batches = evaluation_views(labelled.dataset.image_index, student.preprocessing, indices, workers=config.workers)
    heads = [[head.float().cpu() for head in student(batch.pixels[:, 0].to(device)).heads] for batch in batches]
    first, second = (torch.cat(parts).numpy() for parts in zip(*heads, strict=True))  # [n, C] each
    alpha, beta = best_mixing(first, second, labelled.labels[indices])
    student.second.alpha.fill_(alpha)
    student.second.beta.fill_(beta)


def best_mixing(
    first: NDArray[np.float32], second: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[float, float]:
    """Return the alpha and beta of which the true labels [n] are most probable, given both heads' logits [n, C]."""

    def log_likelihood(alpha: float, beta: float) -> float:
        mixed = alpha * np.exp(log_softmax(first)) + (1 - alpha) * np.exp(log_softmax(second / beta))
        return float(np.log(mixed[np.arange(len(labels)), labels].clip(min=1e-12)).sum())

    return max(((float(alpha), beta) for alpha in ALPHAS for beta in BETAS), key=lambda pair: log_likelihood(*pair))

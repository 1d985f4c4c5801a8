"""Vocabulary: relations to words that are no classes of the task, after class-relation KD (arXiv 2307.09158)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, kl_divergence


class Vocabulary(nn.Module):
    """loss = kl_weight * KL(softmax(W) || softmax(L)) + word_weight * T^2 * KL of softmax(scores / T).

    The scores are s * I * R^T and s * l2norm(F) * R^T, R [K, D] `data.words` as the teacher reads them. The paper
    relates images of novel classes to known ones (Gu et al., ICCV 2023); CLIP names novel classes itself, so what is
    left of it is the relation.
    """

    uses_features = True
    words: Tensor

    def __init__(self, config: objectives.Vocabulary, context: LossContext) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("words", context.logit_scale * torch.cat(list(context.words)))  # s * R [K, D]

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``kl`` and ``words``, each a scalar."""
        config = self.config
        student_scores = F.normalize(student.features, dim=1) @ self.words.T  # [B, K]
        words = kl_divergence(student_scores, teacher.features @ self.words.T, config.temperature)
        return {
            "kl": config.kl_weight * kl_divergence(student.logits, teacher.logits, weights=teacher.weights),
            "words": config.word_weight * config.temperature**2 * words,
        }

"""How a student answers where the timm model's own head is not all: by class vectors, or by a mix of two heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassVectors(nn.Module):
    """Scores features by class vectors, as CLIP does: L = s * l2norm(F) * V^T, V [C, D] of unit length."""

    vectors: Tensor
    scale: Tensor

    def __init__(self, vectors: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.clone())
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        """Return class logits [B, C] for features [B, D]."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 would round a logit of 40 to quarters
            logits: Tensor = self.scale * nn.functional.normalize(features.float(), dim=1) @ self.vectors.T
        return logits


class OpenVocabulary(nn.Module):
    """A network that ends in features in the teacher's space, scored by class vectors that can be changed."""

    def __init__(self, model: nn.Module, projector: nn.Linear, scorer: ClassVectors) -> None:
        super().__init__()
        self.model, self.projector, self.scorer = model, projector, scorer

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits [B, C] for normalised images [B, 3, S, S]."""
        logits: Tensor = self.scorer(self.projector(pooled(self.model, images)))
        return logits


class DualHead(nn.Module):
    """A second head and how it is mixed with the first (DHO, arXiv 2505.07675).

    The answer is alpha * softmax(first) + (1 - alpha) * softmax(second / beta), as logits: its logarithm.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)
        self.register_buffer("alpha", torch.tensor(0.5))
        self.register_buffer("beta", torch.tensor(1.0))

    def mix(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the logits [B, C] of both heads' answer; finite in float16, too, since no probability is added up."""
        weighted_first = first.log_softmax(dim=1) + self.alpha.log()
        weighted_second = (second / self.beta).log_softmax(dim=1) + (1 - self.alpha).log()
        larger = torch.maximum(weighted_first, weighted_second)
        distance = (weighted_first - weighted_second).abs()
        return larger + (1 + (-distance).exp()).log()


class DualHeadModel(nn.Module):
    """A network whose answer is a mix of two heads."""

    def __init__(self, model: nn.Module, second: DualHead) -> None:
        super().__init__()
        self.model, self.second = model, second

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits [B, C] for normalised images [B, 3, S, S]."""
        maps = self.model.forward_features(images)  # type: ignore[operator]
        first = self.model.forward_head(maps)  # type: ignore[operator]
        return self.second.mix(first, self.second.head(self.model.forward_head(maps, pre_logits=True)))  # type: ignore[operator]


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """Return a timm model's pooled features [B, D_s] for normalised images [B, 3, S, S]."""
    maps = model.forward_features(images)  # type: ignore[operator]
    features: Tensor = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
    return features

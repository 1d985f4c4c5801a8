"""The optimizer, and how the learning rate goes up and down."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from prgkit.config.sections import Training


def build_optimizer(learning: nn.Module, config: Training) -> torch.optim.Optimizer:
    """Build the optimizer; biases and norms, which are vectors, do not decay."""
    groups = param_groups_weight_decay(learning, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Return the learning rate's factor: linear warm-up, then a cosine down to zero.

    timm's CosineLRScheduler reaches the full rate a step later, so it would give other weights.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

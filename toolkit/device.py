"""The device that PyTorch works on here, and its seeds."""

from __future__ import annotations

import numpy as np
import torch


def best_device() -> torch.device:
    """Return the GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed what initialises weights; batches and views have seeds of their own."""
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

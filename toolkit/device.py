"""The device that PyTorch works on here, and its seeds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch


def best_device() -> torch.device:
    """Return the GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def teacher_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return what a teacher computes in unless it is said: bf16 where a GPU has it, not merely emulates it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def seed_everything(seed: int) -> None:
    """Seed what initialises weights; batches and views have seeds of their own."""
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(device: torch.device, *seed: int) -> None:
    """Seed what a training step draws: dropout and stochastic depth.

    It takes some microseconds; `torch.manual_seed` would take tenths of a millisecond to ask for every kind of device.
    """
    drawn = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)

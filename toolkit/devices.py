"""Where the work runs: the device, its precision, and the seeds."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any, Literal

import numpy as np
import torch

from prgkit.student import Student

PROBE_STEPS = 3


def best_device() -> torch.device:
    """Return the GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed what initialises weights; batches and views have seeds of their own."""
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def probe_precision(student: Student, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Time training steps in float32 and bfloat16, interleaved, and return the faster with both figures (ms).

    On a CPU, bf16 can halve a step or double it, depending on the model and the image size, so it is measured. The
    outcome is written down before it is used, and a resumed run reads it instead of measuring again.
    """
    size = student.preprocessing.image_size
    pixels = torch.randint(0, 256, (min(batch_size, 32), size, size, 3), dtype=torch.uint8, device=device)
    trial = copy.deepcopy(student).to(device).train()
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for step in range(PROBE_STEPS + 1):
        for precision, samples in times.items():
            started = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                side = trial(pixels)
            (side.logits.float().square().mean() + side.features.float().square().mean()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step:  # the first of each warms up
                samples.append(1000 * (time.perf_counter() - started))
    medians = {precision: round(statistics.median(samples), 2) for precision, samples in times.items()}
    chosen: Literal["bf16", "fp32"] = "bf16" if medians["bf16"] < 0.95 * medians["fp32"] else "fp32"
    return {"chosen": chosen, "step_ms": medians, "batch_size": len(pixels)}

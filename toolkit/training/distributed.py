"""The processes that train one student together, and the precision that is faster on their device."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    is_tensorboard_available,
    is_wandb_available,
)
from torch import nn

from prgkit.config.image_size import sides
from prgkit.config.recipe import Recipe
from prgkit.config.sections import Training
from prgkit.config.shard import Shard
from prgkit.errors import BackendError, PrgkitError
from prgkit.interrupt import Interrupted
from prgkit.progress import NullProgress, Progress
from prgkit.storage.run import Run
from prgkit.storage.run_card import PrecisionProbe
from prgkit.student.model import Student
from prgkit.teacher.shards import embed_shard, join_shards

PROBE_STEPS = 3
LONGEST_WAIT = timedelta(days=7)
T = TypeVar("T")


def check_trackers(config: Training) -> None:
    """Refuse a tracker that is not installed before any work is done."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for tracker in config.trackers:
        if not available[tracker]():
            raise BackendError(
                f"training.trackers names {tracker}, which is not installed", fix=f"pip install {tracker}"
            )


def join_processes(trackers: Sequence[str], trackers_folder: Path) -> Accelerator:
    """Join the processes of this training: this one, or all that torchrun or ``accelerate launch`` started.

    The recipe says how is trained: what else the launcher sets in the environment has no say in it.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # unasked, accelerate lets the processes of a CPU work each for itself
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # a bare number yields to the environment
        dynamo_backend="no",
        log_with=list(trackers) or None,
        project_dir=str(trackers_folder),
        # The others wait while the first reads every image.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


@contextmanager
def first_goes_on(accelerator: Accelerator) -> Iterator[None]:
    """End every process but the first when the work is done or was stopped: one reports it, and goes on."""
    try:
        yield
    except Interrupted as stopped:
        if accelerator.is_main_process:
            raise
        raise SystemExit(stopped.exit_code) from stopped
    if not accelerator.is_main_process:
        raise SystemExit


def from_first(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Return what the first process makes, in every process."""
    made = [make() if accelerator.is_main_process else None]
    return broadcast_object_list(made)[0]  # type: ignore[no-any-return]


def share_teacher_pass(recipe: Recipe, targets_root: Path, accelerator: Accelerator, progress: Progress) -> None:
    """Have every process embed its part of the images, and the first make the parts one store.

    Machines need a shared folder for that.

    Raises:
        PrgkitError: in the first process, what went wrong in any; the others end.
    """
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    if shard.total == 1:
        return
    mine = progress if accelerator.is_main_process else NullProgress()
    error: PrgkitError | None = None
    try:
        embed_shard(recipe, targets_root, shard, mine)
    except PrgkitError as mistake:
        error = mistake
    if errors := [one for one in gather_object([error]) if one is not None]:
        raise errors[0] if accelerator.is_main_process else SystemExit(errors[0].exit_code)
    if accelerator.is_main_process:
        join_shards(recipe, targets_root, progress)
    accelerator.wait_for_everyone()


def any_process(asks: bool, accelerator: Accelerator) -> bool:
    """Return whether any process asks to stop; they agree on it on the host, for which no GPU is waited for."""
    if accelerator.num_processes == 1:
        return asks
    asked = torch.tensor(int(asks))
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=host_group(torch.distributed.group.WORLD))
    return bool(asked)


@lru_cache(1)
def host_group(_world: object) -> Any:
    """Return the processes of this training as they meet on the host."""
    return torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)


def share_buffers(module: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the first one's batch-norm statistics: each has gathered those of its own images."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            broadcast(buffer)


def decide_precision(run: Run, student: Student, config: Training, accelerator: Accelerator) -> bool:
    """Return whether to train in bfloat16; what a probe decides is written down first, and read again on resume."""
    if config.precision != "auto":
        return config.precision == "bf16"
    with accelerator.main_process_first():
        if run.card.precision is None:
            run.update_card(precision=probe_precision(student, accelerator.device, config.batch_size))
    probe = run.card.precision
    return probe is not None and probe.chosen == "bf16"


def probe_precision(student: Student, device: torch.device, batch_size: int) -> PrecisionProbe:
    """Time training steps in float32 and bfloat16, interleaved, and return the faster with both figures [ms].

    On a CPU, bf16 can halve a step or double it, depending on the model and the image size.
    """
    shape = (min(batch_size, 32), *sides(student.preprocessing.image_size), 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    trial = copy.deepcopy(student).to(device).train()
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for step in range(PROBE_STEPS + 1):
        for precision, samples in times.items():
            started = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                output = trial(pixels)
            (output.logits.float().square().mean() + output.features.float().square().mean()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step:  # the first of each warms up
                samples.append(1000 * (time.perf_counter() - started))
    medians = {precision: round(statistics.median(samples), 2) for precision, samples in times.items()}
    faster: Literal["bf16", "fp32"] = "bf16" if medians["bf16"] < 0.95 * medians["fp32"] else "fp32"
    return PrecisionProbe(chosen=faster, step_ms=medians, batch_size=len(pixels))

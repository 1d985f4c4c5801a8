"""The state of a training run as one file that appears whole or not at all, and comes back bit for bit."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from prgkit.errors import CameApartError, RunError
from prgkit.storage.run import Run
from prgkit.storage.tensors import load_tensors, save_tensors
from prgkit.student.model import Student

STEPS_UNREAD = 50  # of which a GPU keeps the losses to itself
KL_DECAY = 0.7  # of the moving average of the held-out divergence over epochs
STALE = 1.3  # times an epoch's own divergence: an average above it is that of epochs before


@dataclass
class TrainingCounters:
    """How far a run is: steps and epochs done, this epoch's sums of loss terms, and the best epoch so far."""

    step: int = 0
    epoch: int = 0
    steps_in_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_agreement: float = -1.0
    kl_average: float | None = None  # of the epochs' divergences, moving
    best_kl_average: float | None = None
    made_from: str = ""  # the images learned from and the targets, as a fingerprint
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # steps, and terms that are on a GPU still

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count one step and its loss terms; on a GPU, which the host does not wait for, they are read later."""
        self.step += 1
        self.steps_in_epoch += 1
        self._unread.append((self.step, {name: term.detach().double() for name, term in terms.items()}))
        if len(self._unread) >= STEPS_UNREAD or all(term.device.type == "cpu" for term in terms.values()):
            self.read()

    def read(self) -> None:
        """Add up the loss terms that were not read yet.

        Raises:
            CameApartError: one of them is no number.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        rows = torch.stack([torch.stack(list(terms.values())) for _, terms in unread]).tolist()
        for (step, terms), row in zip(unread, rows, strict=True):
            for name, value in zip(terms, row, strict=True):
                if not math.isfinite(value):
                    raise came_apart(f"{name} is {value} in step {step}, epoch {self.epoch + 1}")
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return this epoch's mean of each loss term, over the steps of which they were read."""
        return {name: total / (self.steps_in_epoch - len(self._unread)) for name, total in self.sums.items()}

    def is_best(self, divergence: float) -> bool:
        """Take an epoch's held-out divergence into the moving average; tell whether that is the least so far.

        A training that jumps early leaves an average that is high for many epochs. An epoch that is better than what is
        kept is not held to it: where its average is out of touch with it, the average begins anew.
        """
        before, best = self.kl_average, self.best_kl_average
        average = divergence if before is None else KL_DECAY * before + (1 - KL_DECAY) * divergence
        if best is not None and divergence < best < average and average > STALE * divergence:
            average = divergence
        self.kl_average = average
        return best is None or average <= best

    def end_epoch(self) -> None:
        """Count one epoch and start the next one's sums at zero."""
        self.epoch += 1
        self.steps_in_epoch = 0
        self.sums = {}


def came_apart(what: str) -> CameApartError:
    """Build the error for a training that no longer gives numbers."""
    fix = "lower training.learning_rate, or the objective's weights, in a new run; the targets are kept"
    return CameApartError(f"training came apart: {what}", fix=fix)


def model_ema(student: Student) -> ModelEmaV3:
    """Return the exponential moving average of a student's weights and batch-norm statistics; integers are copied."""
    return ModelEmaV3(student).requires_grad_(False)


@dataclass
class TrainingState:
    """Everything a resumed run needs to go on as if it had never stopped."""

    student: Student
    average: ModelEmaV3  # what is evaluated and kept
    optimizer: torch.optim.Optimizer
    objective: nn.Module
    counters: TrainingCounters

    def save(self, run: Run) -> None:
        """Write the checkpoint; the one before stays until this one is whole."""
        self.counters.read()
        tensors = {
            **_prefixed("student", self.student.state_dict()),
            **_prefixed("average", self.average.module.state_dict()),
            **_prefixed("objective", self.objective.state_dict()),
            **_prefixed("optimizer", _flat(self.optimizer.state_dict()["state"])),
        }
        save_tensors(run.state, tensors, asdict(self.counters))

    def load(self, run: Run) -> None:
        """Go on from the run's checkpoint, if it has one.

        Raises:
            RunError: the checkpoint is damaged, or of other images or another teacher.
            OSError: it cannot be read.
        """
        if not run.state.exists():
            return
        try:
            tensors, facts = load_tensors(run.state)
            self.student.load_state_dict(_part("student", tensors))
            self.average.module.load_state_dict(_part("average", tensors))
            self.objective.load_state_dict(_part("objective", tensors))
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": _nested(_part("optimizer", tensors)), "param_groups": groups})
            counters = TypeAdapter(TrainingCounters).validate_python(facts)
        except torch.OutOfMemoryError:  # a RuntimeError as well
            raise
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"the checkpoint is damaged: {str(error).splitlines()[0]}",
                where=run.state,
                fix="delete it, and the same command trains this run from its start; the targets are kept",
            ) from error
        for parameter, slot in self.optimizer.state.items():
            for name, tensor in slot.items():
                if tensor.shape == parameter.shape:  # back into the parameter's layout, channels-last or not
                    slot[name] = torch.empty_like(parameter).copy_(tensor)
        if counters.made_from != self.counters.made_from:
            another = shlex.quote(f"{run.folder}-2")
            raise RunError(
                "the images, the labels that are learned from, or the teacher have changed since this run was started",
                where=run.folder,
                fix=f"start a new run with --run {another}; what the teacher has seen is not lost",
            )
        self.counters = counters


class Clock:
    """The seconds a run has trained, over all its resumptions, and when the next checkpoint is due."""

    def __init__(self, seconds_before: float) -> None:
        self.started = self.saved = time.monotonic()
        self.seconds_before = seconds_before

    def seconds(self) -> float:
        """Return the seconds trained so far."""
        return self.seconds_before + time.monotonic() - self.started

    def due(self, minutes: float) -> bool:
        """Return whether ``minutes`` have passed since this was last true."""
        if time.monotonic() - self.saved < 60 * minutes:
            return False
        self.saved = time.monotonic()
        return True


def expected_bytes(student: Student, kept_floats: int) -> int:
    """Return what a run takes on the disk: the best student, and two checkpoints while one replaces the other.

    A checkpoint holds the student, its average, the optimizer's two moments and what objectives keep of the images.
    """
    weights = sum(parameter.numel() for parameter in student.parameters())
    return 4 * (weights + 2 * (4 * weights + kept_floats))


def held_bytes(run: Run) -> int:
    """Return what a run holds already of its `expected_bytes`."""
    return sum(file.stat().st_size for file in (run.state, run.weights) if file.exists())


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    return {f"{index}/{name}": torch.as_tensor(value) for index, slot in state.items() for name, value in slot.items()}


def _nested(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    nested: dict[int, dict[str, Tensor]] = {}
    for path, value in flat.items():
        index, name = path.split("/", 1)
        nested.setdefault(int(index), {})[name] = value
    return nested


class HeldOutScores(NamedTuple):
    """How near a student is to its teacher on the held-out images."""

    agreement: float  # percent of them to which both give one answer
    held_out_kl: float  # the mean of KL(teacher || student), in nats

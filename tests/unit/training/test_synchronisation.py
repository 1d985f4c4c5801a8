"""A step reads nothing back to the host, for which a GPU would be waited for: a stand-in counts the reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prgkit.config.objectives import OBJECTIVES
from prgkit.errors import RunError
from prgkit.objectives import build_loss
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput
from prgkit.training.batches import mixup
from prgkit.training.checkpoint import STEPS_UNREAD, TrainingCounters
from prgkit.training.dataset import DistillationDataset
from prgkit.training.few_shot import append_labelled

BATCH, CLASSES, WIDTH = 8, 4, 6


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait: a number read, a shape that depends on values, or a copy that is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = operation._schema.name
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")
        device = (named or {}).get("device") or torch.device("cpu")
        self.count += name == "aten::_to_copy" and device.type != "cpu" and not named.get("non_blocking")
        return operation(*arguments, **(named or {}))


def one_hot(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Do as torch does on a GPU, where it does not look whether the labels are too large."""
    return (labels[:, None] == torch.arange(count)).long()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_loss_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "one_hot", one_hot)
    torch.manual_seed(0)
    space = LossContext(
        classes=CLASSES,
        width=WIDTH,
        epochs=10,
        steps_per_epoch=3,
        images=BATCH,
        class_means=lambda: torch.ones(CLASSES, WIDTH),
        class_vectors=F.normalize(torch.eye(CLASSES, WIDTH) + 0.5, dim=1),
        logit_scale=10.0,
        stages=lambda: (3, 5),
        class_features=lambda: iter(torch.randn(CLASSES, 20, WIDTH)),
        words=(torch.eye(2, WIDTH), torch.eye(1, WIDTH)),
    )
    loss = build_loss(OBJECTIVES[name](name=name), space)  # type: ignore[call-arg]
    logits = torch.randn(BATCH, CLASSES)
    teacher = TeacherOutput(
        F.normalize(torch.randn(BATCH, WIDTH), dim=1), logits, logits.argmax(dim=1), torch.arange(BATCH)
    )
    if name == "dho":
        teacher = teacher._replace(truth=torch.arange(BATCH) % CLASSES)
    student = StudentOutput(
        torch.randn(BATCH, WIDTH, requires_grad=True),
        torch.randn(BATCH, CLASSES, requires_grad=True),
        tuple(torch.randn(BATCH, width, side, side) for width, side in ((3, 4), (5, 2))),
        tuple(torch.randn(BATCH, CLASSES, requires_grad=True) for _ in range(2)),
    )
    loss(student, teacher)  # the first step may measure something
    with HostReads() as reads:
        torch.stack(list(loss(student, teacher).values())).sum().backward()
    assert reads.count == 0


def test_what_a_step_needs_is_sent_without_waiting() -> None:
    there = torch.device("meta")
    dataset = SimpleNamespace(
        store=SimpleNamespace(features=lambda rows, _: torch.ones(len(rows), WIDTH)),
        rows=np.arange(2 * BATCH),
        classifier=SimpleNamespace(logits=lambda features: features @ torch.ones(WIDTH, CLASSES, device=there)),
        image_of=lambda positions: positions,
        class_weights=np.ones(CLASSES, dtype=np.float32),
    )
    labels = torch.zeros(2, dtype=torch.long)
    labelled = TeacherOutput(torch.ones(2, WIDTH), torch.ones(2, CLASSES), labels, labels, labels)
    with HostReads() as reads:
        pixels = torch.zeros(BATCH, 4, 4, 3, device=there)
        teacher = DistillationDataset.teacher_output(dataset, np.arange(BATCH), np.zeros(BATCH, int), there)  # type: ignore[arg-type]
        pixels, teacher = mixup(pixels, teacher, 0.4, seed=(0, 1))
        pixels, teacher = append_labelled(pixels, teacher, torch.zeros(2, 4, 4, 3), labelled)
        teacher = DistillationDataset.weighted(dataset, teacher)  # type: ignore[arg-type]
    assert reads.count == 0
    assert {tensor.device for tensor in (pixels, *teacher)} == {there}
    with HostReads() as reads:
        torch.zeros(3).to(there)
    assert reads.count == 1


class Elsewhere(torch.Tensor):
    """A number that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def double(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.double(self).as_subclass(torch.Tensor)


def test_losses_on_a_gpu_are_read_all_at_once() -> None:
    here, there = TrainingCounters(), TrainingCounters()
    values = torch.rand(2 * STEPS_UNREAD + 3)
    with HostReads() as reads:
        for value in values:
            there.add({"loss": value.as_subclass(Elsewhere)})
    assert reads.count == 0
    assert len(there._unread) == 3
    for value in values:
        here.add({"loss": value})
    there.read()
    assert there.means() == here.means()
    there.add({"loss": torch.tensor(float("nan")).as_subclass(Elsewhere)})
    there.add({"loss": torch.tensor(1.0).as_subclass(Elsewhere)})
    with pytest.raises(RunError, match=f"training came apart: loss is nan in step {len(values) + 1}, epoch 1"):
        there.read()

"""Where the work runs: the precision is measured once and remembered, seeds decide, and no tracker is half there."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from prgkit.config.sections import StudentConfig, Training
from prgkit.device import best_device, seed_everything
from prgkit.errors import BackendError
from prgkit.storage.run import Run
from prgkit.storage.run_card import SCHEMA, PrecisionProbe
from prgkit.student.model import Student, build_student
from prgkit.training import distributed
from prgkit.training.distributed import from_first, join_processes, probe_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student() -> Student:
    return build_student(StudentConfig(model="test_resnet", image_size=32), classes=3, teacher_width=8)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.update_card(schema=SCHEMA, prgkit="0", created="", fingerprint="", origin="../..", finished=False)
    return run


def clock(monkeypatch: pytest.MonkeyPatch, *, fp32_ms: float, bf16_ms: float) -> None:
    """Let each step seem to take as long as its precision says; of the first of each, only the start is read."""
    steps = itertools.cycle([(0.0, fp32_ms / 1000), (0.0, bf16_ms / 1000)])
    ticks = itertools.chain([0.0, 0.0], itertools.chain.from_iterable(steps))
    monkeypatch.setattr(distributed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "chosen"), [(20.0, 10.0, "bf16"), (10.0, 20.0, "fp32"), (10.0, 9.8, "fp32")]
)
def test_the_faster_precision_is_chosen(
    student: Student, monkeypatch: pytest.MonkeyPatch, fp32_ms: float, bf16_ms: float, chosen: str
) -> None:
    clock(monkeypatch, fp32_ms=fp32_ms, bf16_ms=bf16_ms)
    probed = probe_precision(student, CPU, 16)
    assert probed == PrecisionProbe(chosen=chosen, step_ms={"fp32": fp32_ms, "bf16": bf16_ms}, batch_size=16)  # type: ignore[arg-type]


def test_a_probe_leaves_the_student_as_it_was(student: Student) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    probed = probe_precision(student, CPU, 256)
    assert probed.batch_size == 32
    assert min(probed.step_ms.values()) > 0
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_probe_is_written_down_and_read_again(student: Student, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe(_student: Student, device: torch.device, batch_size: int) -> PrecisionProbe:
        asked.append((device, batch_size))
        return PrecisionProbe(chosen="bf16", step_ms={"fp32": 2.0, "bf16": 1.0}, batch_size=32)

    monkeypatch.setattr(distributed, "probe_precision", probe)
    accelerator = Accelerator(cpu=True)
    page = Training(batch_size=48)
    assert distributed.decide_precision(run, student, page, accelerator)
    assert distributed.decide_precision(Run(run.folder), student, page, accelerator)
    assert asked == [(CPU, 48)]
    assert getattr(run.card.precision, "chosen", None) == "bf16"
    run.update_card(precision={"chosen": "fp32", "step_ms": {"fp32": 1.0, "bf16": 2.0}, "batch_size": 32})
    assert not distributed.decide_precision(run, student, page, accelerator)


def test_what_was_asked_for_is_not_probed(student: Student, run: Run) -> None:
    accelerator = Accelerator(cpu=True)
    assert distributed.decide_precision(run, student, Training(precision="bf16"), accelerator)
    assert not distributed.decide_precision(run, student, Training(precision="fp32"), accelerator)
    assert run.card.precision is None


def test_seeds_decide_the_weights() -> None:
    drawn = []
    for seed in (3, 3, 4, 2**40):
        seed_everything(seed)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert len({value for pair in drawn for value in pair}) == 6


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert best_device() == torch.device("cuda", 1)


def test_a_launchers_settings_do_not_overrule_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "EAGER"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    AcceleratorState._reset_state(reset_partial_state=True)  # as a new process has none
    GradientState._reset_state()
    try:
        accelerator = join_processes([], tmp_path)
        wrapped = accelerator.prepare(model := torch.nn.Sequential(torch.nn.Linear(4, 4)))
        seen: list[torch.dtype] = []
        model[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
        accelerator.backward(wrapped(torch.ones(2, 4, device=accelerator.device)).sum())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert seen == [torch.float32]
    assert (model[0].weight.grad == 2).all(), "one for each image, and not a fourth of it"
    assert type(wrapped) is torch.nn.Sequential, "training.compile alone compiles"


def test_one_process_makes_what_all_get() -> None:
    made = {"rows": np.arange(3)}
    assert from_first(Accelerator(cpu=True), lambda: made) is made


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_named_before_any_work(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, f"is_{tracker}_available", lambda: False)
    with pytest.raises(BackendError) as caught:
        distributed.check_trackers(Training(trackers=(tracker,)))
    assert str(caught.value) == (
        f"training.trackers names {tracker}, which is not installed\n  fix: pip install {tracker}"
    )
    monkeypatch.setattr(distributed, f"is_{tracker}_available", lambda: True)
    distributed.check_trackers(Training(trackers=(tracker,)))

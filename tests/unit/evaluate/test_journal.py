"""A bench that was killed goes on where it stopped, says so, and never mixes in what was measured under other conditions."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prgkit.data.preprocessing import Preprocessing
from prgkit.errors import BenchError, RunError
from prgkit.evaluate.bench import journal, latency, workers
from prgkit.evaluate.bench.fixed_rate import measure_fixed_rate
from prgkit.evaluate.bench.journal import (
    BatchRecord,
    BenchJournal,
    FailureRecord,
    RoundRecord,
    conditions,
    open_journal,
    read_lines,
)
from prgkit.evaluate.bench.latency import EncodedImages, LatencyPlan, sweep_threads
from prgkit.evaluate.bench.worker import Spec, WorkerFailedError
from prgkit.evaluate.bench.workers import BenchContext
from prgkit.evaluate.report.samples import FixedRateSamples, ThreadSweepSamples, WarmUp
from prgkit.evaluate.report.schema import Machine
from prgkit.storage.locks import locked

SPECS = [Spec(name, "onnxruntime", "cpu") for name in ("a", "b")]
SQUARE = Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
PIXELS = np.zeros((4, 2, 2, 3), dtype=np.uint8)


class Told:
    """Stands for the workers' processes: hands out numbers that count up, and is killed at a given answer."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.answers = 0
        self.killed_at = killed_at
        self.opened: list[str] = []
        self.predicted = 0

    def answer(self) -> int:
        if self.answers == self.killed_at:
            raise KeyboardInterrupt
        self.answers += 1
        return self.answers

    def worker(self, spec: dict[str, Any], images: Any, *, patience_s: float) -> Any:
        told = self
        told.opened.append(spec.artifact)

        class Worker:
            load_ms = 1.0

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def warm_up(self, **_: Any) -> WarmUp:
                return WarmUp(steady=True, runs=1, seconds=0.0)

            def peak_memory_mib(self) -> float:
                return 1.0

            def switches(self) -> dict[str, str]:
                return {}

            def measure(self, **_: Any) -> list[int]:
                return [told.answer()]

            def take_images(self, *_: Any) -> list[str]:
                return ["io", "pipeline", "end_to_end"]

            def measure_stage(self, stage: str, **_: Any) -> list[int]:
                return [told.answer()]

            def fixed_rate(self, **_: Any) -> tuple[list[int], list[int]]:
                return [told.answer()], [1]

            def predict(self, pixels: Any) -> Any:
                told.predicted += 1
                return np.full((len(pixels), 3), told.answer(), dtype=np.float32)

        return Worker()


def measure(told: Told, kept: BenchJournal, monkeypatch: pytest.MonkeyPatch) -> latency.Session:
    monkeypatch.setattr(workers, "Worker", told.worker)
    plan = LatencyPlan(rounds=3, batches=[1, 8], predict=[PIXELS[:2], PIXELS[2:]])
    return latency.measure(SPECS, plan, BenchContext(PIXELS, seconds=60, journal=kept))


# Three rounds of two answers, two batch sizes of two, and two of each artifact's predictions: 14 in all.
@pytest.mark.parametrize(
    ("killed_at", "lost"),
    [(1, 1), (2, 0), (5, 1), (6, 0), (7, 0), (9, 0), (10, 0), (11, 1), (12, 0), (13, 1)],
)
def test_what_was_finished_is_kept_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, lost: int
) -> None:
    told = Told(killed_at)
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {"a": 1}, lambda text: None) as kept:
        measure(told, kept, monkeypatch)
    again, notes = Told(), list[str]()
    again.answers = 100
    with open_journal(tmp_path, {"a": 1}, notes.append) as kept:
        session = measure(again, kept, monkeypatch)
        said = list(kept.notes)
    assert again.answers - 100 == 14 - (killed_at - lost)
    assert again.opened == ["a", "b"]  # opened and warmed up again, even where little is left
    assert session.order == [[0, 1], [1, 0], [0, 1]]
    for one in session.measured:
        assert [len(samples) for samples in one.rounds_ns] == [1, 1, 1]
        assert set(one.batches_ns) == {1, 8}
        assert one.logits is not None
        assert one.logits.shape == (4, 3)
    kept_rounds = min(3, killed_at // 2)
    expected = "Measured in 2 sittings: the one before was stopped after "
    assert [note.startswith(expected + f"{kept_rounds} rounds") for note in said] == ([True] if killed_at > 1 else [])
    assert said == notes
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def all_of_it(
    told: Told, kept: BenchJournal, monkeypatch: pytest.MonkeyPatch, *, fps: float = 30
) -> tuple[latency.Session, list[ThreadSweepSamples], list[FixedRateSamples]]:
    """Measure rounds (6 answers), latency stages (5 rounds of 6), a thread sweep (10 rounds of 4) and frames (5 rounds of 2)."""
    monkeypatch.setattr(workers, "Worker", told.worker)
    context = BenchContext(PIXELS, seconds=60, journal=kept)
    session = latency.measure(SPECS, LatencyPlan(rounds=3, encoded=EncodedImages([b"picture"], SQUARE)), context)
    specs = [replace(spec, takes_threads=True) for spec in SPECS]
    _, by_threads = sweep_threads(specs, [1, 2], context)
    _, frames = measure_fixed_rate(specs, fps, context)
    return session, by_threads, frames


@pytest.mark.parametrize(("killed_at", "died_at"), [(9, 4), (3, 0)])
def test_what_failed_before_the_kill_has_failed_after_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, died_at: int
) -> None:
    class Dying(Told):
        def answer(self) -> int:
            if self.answers == died_at:
                self.answers += 1
                raise WorkerFailedError("it died", alive=False)
            return super().answer()

    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {}, lambda text: None) as kept:
        measure(Dying(killed_at), kept, monkeypatch)
    again = Told()
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        dead, alive = measure(again, kept, monkeypatch).measured
    assert (dead.failed, alive.failed, again.opened) == ("it died", None, ["b"])
    assert len(alive.rounds_ns) == 3


def test_what_failed_before_anything_was_measured_is_tried_again(tmp_path: Path) -> None:
    died = FailureRecord(artifact=0, reason="no memory")
    BenchJournal(tmp_path / "unfinished", {}).part("threads 1,2").add(died)
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        assert (kept.part("threads 1,2").of(FailureRecord), kept.notes) == ([], [])


def test_frames_of_what_failed_before_the_kill_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        kept.part("100 frames/s").add(FailureRecord(artifact=0, reason="it died"))
        again = Told()
        monkeypatch.setattr(workers, "Worker", again.worker)
        found, _ = measure_fixed_rate(SPECS, 100.0, BenchContext(PIXELS, seconds=1.0, journal=kept))
    assert found is not None
    assert [row.failed for row in found.rows] == ["it died", None]
    assert again.opened == ["b"]


# Of 86 answers: in the latency stages, between two of their rounds, in the thread sweep's rounds, and within the frames, whose
# turns are kept one by one.
@pytest.mark.parametrize(("killed_at", "lost"), [(9, 3), (12, 0), (37, 1), (39, 3), (75, 3), (76, 0), (79, 0), (85, 0)])
def test_latency_stages_threads_and_frames_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, lost: int
) -> None:
    told = Told(killed_at)
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {}, lambda text: None) as kept:
        all_of_it(told, kept, monkeypatch)
    again = Told()
    again.answers = 1000
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        session, by_threads, frames = all_of_it(again, kept, monkeypatch)
    assert again.answers - 1000 == 86 - (killed_at - lost)
    for one in session.measured:
        assert [len(samples) for samples in one.rounds_ns] == [1] * 3
        assert list(one.stages_ns) == ["io", "pipeline", "end_to_end"]
        assert [len(rounds) for rounds in one.stages_ns.values()] == [5, 5, 5]
    assert [(one.artifact, one.threads, len(one.rounds_ns)) for one in by_threads] == [
        ("a", 1, 10), ("a", 2, 10), ("b", 1, 10), ("b", 2, 10)
    ]  # fmt: skip
    assert [len(one.responses_ns) for one in frames] == [5, 5]
    # No sample was taken over by another part, and none is there twice.
    numbers = [
        value for one in session.measured for rounds in (one.rounds_ns, *one.stages_ns.values()) for [value] in rounds
    ]
    numbers += [value for one in by_threads for [value] in one.rounds_ns]
    numbers += [value for one in frames for [value] in one.responses_ns]
    assert len(set(numbers)) == len(numbers) == 86


def test_frames_of_another_rate_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {}, lambda text: None) as kept:
        all_of_it(Told(82), kept, monkeypatch, fps=30)
    again = Told()
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        all_of_it(again, kept, monkeypatch, fps=15)
    assert again.answers == 10


@pytest.mark.parametrize("change", ["conditions", "time"])
def test_what_does_not_belong_is_set_aside_and_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {"a": 1}, lambda text: None) as kept:
        measure(Told(4), kept, monkeypatch)
    if change == "time":
        now = time.time()
        monkeypatch.setattr(journal.time, "time", lambda: now + journal.MOST_PAUSE_S + 1)
    again = Told()
    with open_journal(tmp_path, {"a": 1 if change == "time" else 2}, lambda text: None) as kept:
        measure(again, kept, monkeypatch)
        (note,) = kept.notes
    assert again.answers == 14
    (stopped,) = tmp_path.glob("stopped-*")
    assert len((stopped / "journal.jsonl").read_text().splitlines()) == 3  # its conditions, and two rounds
    assert note == (
        "A bench that was stopped after 2 rounds, too long ago or under other conditions, is not part of this one: "
        f"its samples are in {stopped.name}."
    )


def test_a_damaged_journal_ends_where_the_damage_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {}, lambda text: None) as kept:
        measure(Told(13), kept, monkeypatch)
    journal = tmp_path / "unfinished" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], lines[2][:-9] + b"\n", *lines[3:]]))
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        assert len(kept.of(RoundRecord)) == 1
        assert kept.of(BatchRecord) == []
        kept.add(RoundRecord(turns=[], measured=[]))
        assert len(read_lines(journal)) == 4  # what is added can be read again: both starts, and two rounds


def test_logits_that_are_not_what_was_written_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, {}, lambda text: None) as kept:
        measure(Told(13), kept, monkeypatch)
    (path,) = (tmp_path / "unfinished").glob("*.npy")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    again = Told()
    with open_journal(tmp_path, {}, lambda text: None) as kept:
        measure(again, kept, monkeypatch)
    assert again.predicted == 4


def test_a_bench_without_a_result_leaves_nothing_and_two_do_not_meet(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no artifact"), open_journal(tmp_path, {}, lambda text: None):
        raise BenchError("no artifact could be measured")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with (
        locked(tmp_path, "bench"),
        pytest.raises(RunError, match=r"another process \(\d+\) is working on this bench"),
        open_journal(tmp_path, {}, lambda text: None),
    ):
        pytest.fail("it was let in")


def test_what_changes_by_itself_is_no_condition() -> None:
    def machine(cpu: str = "x", temperature_c: int = 40, load: float = 0.1) -> Machine:
        same = {**dict.fromkeys(("os", "kernel", "architecture", "python"), "x"), "virtual": False, "versions": {}}
        gpu = {"name": "g", "driver": "1", "temperature_c": temperature_c}
        changing = {"cpu": cpu, "gpus": [gpu], "load_average": [load], "cores": 2, "usable_cores": 2}
        return Machine.model_validate({**same, **changing})

    assert conditions(machine(), threads=1) == conditions(machine("x", 70, 2.0), threads=1)
    assert conditions(machine(), threads=1) != conditions(machine(), threads=2)
    assert conditions(machine()) != conditions(machine("y"))
